# SPDX-License-Identifier: Apache-2.0
"""Other normalizers in place of softmax, in a published model as it is or in one that is trained with them.

Mudarisov, Burtsev, Petrova and State, "Limitations of Normalization in Attention Mechanism", NeurIPS 2025,
arXiv 2508.17821. Whatever increasing positive F makes weights ``F(l_i) / sum_j F(l_j)`` of bounded logits gives each of
L keys a weight of the order of 1 / L, so that few cannot stand out among many; what is trained with a low temperature
has steep gradients instead. The paper's three measures of that are a lens, :mod:`.measures`; what it names as ways out
(sparsemax, scalable softmax) and others of the kind are here, see :mod:`manyheads.attention.normalizers`:

    manyheads.use(model, "attention_normalization_limits:normalizer=entmax15")     changes attention, trains nothing
    manyheads.watch(model, "attention_normalization_limits.measures")              looks, and changes no bit
    manyheads compare --train --strategies "softmax,attention_normalization_limits:normalizer=entmax15"

In a published model logits are made and normalized in float32 or wider, a block of queries at a time, so that memory
does not grow with the square of the length; time does. Mask, bias and cap stay. Learned sinks (gpt-oss) are a part of
their softmax alone, and are refused. ``ssmax`` has one scale there, that of ``trained`` keys; in a layer that is
trained each head has its own, learned, which starts at that of the training length.

Of the layer, the paper says nothing: projections, positions and cache are those of the ``softmax`` mixer.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ...attention import reference
from ...attention.masks import MaskSpec
from ...attention.normalizers import Kind, Normalizer, log_n_scale
from ...call import AttentionCall, MixerConfig, Site
from ...calls.visible import rows_of, visible
from ...errors import UserError
from ...strategy import AttentionCompute, Mixer
from .._positions import Position, PositionedMixer, Positions
from .measures import NormalizationMeasures

__all__ = ["NormalizationMeasures", "Normalized", "normalized_attention"]

_HERE = Site("a layer that is trained", 0, 0, "self", True)


def normalized_attention(call: AttentionCall, normalizer: Normalizer, s: Tensor | None = None) -> Tensor:
    """Attention ``[B, T, H, dv]`` with the weights of ``normalizer``, a block of queries at a time.

    Args:
        call: the attention computation; its mask, bias and cap count.
        normalizer: makes weights of its logits.
        s: scales of ``ssmax`` by head, ``[H, 1, 1]``, in place of the normalizer's.
    """
    (batch, heads, length, _), size = call.q.shape, call.k.shape[2]
    k, v = (reference.repeat_kv(reference.widened(x), heads) for x in (call.k, call.v))
    block, made = reference.block_size(call.q, batch * heads * size), []
    for start in range(0, length, block):
        rows = torch.arange(start, min(start + block, length), device=call.q.device)
        # A causal block ends with its last query: no row of it sees what comes behind.
        end = max(1, start + len(rows) + size - length) if call.is_causal else size
        few = call if len(rows) == length else rows_of(call, rows)
        mask = visible(few)
        x = reference.logits(
            reference.widened(few.q), k[:, :, :end], scale=few.scale, softcap=few.softcap, bias=_cut(few.bias, end)
        )
        weights = dropout(normalizer(x, _cut(mask, end), s), call.dropout)
        made.append(weights @ v[:, :, :end])
    return torch.cat(made, 2).transpose(1, 2).to(call.v.dtype)


def _cut(x: Tensor | None, end: int) -> Tensor | None:
    return x if x is None or x.shape[-1] == 1 else x[..., :end]


@dataclass(frozen=True, kw_only=True)
class Normalized(AttentionCompute, Mixer):
    """Attention with another normalizer.

    Attributes:
        normalizer: ``softmax``, ``ssmax``, ``sparsemax``, ``entmax15``, ``entmax``, ``topk``, ``sigmoid`` or ``relu``.
        temperature: divides the logits.
        alpha: of ``entmax``.
        k: keys that ``topk`` keeps.
        trained: keys of a row at which ``ssmax`` is softmax.
        position: of a layer that is trained, see ``softmax``; a published model has its own.
    """

    directions: ClassVar = ("causal", "bidirectional")

    normalizer: Kind = field(
        default="ssmax", metadata={"help": "softmax, ssmax, sparsemax, entmax15, entmax, topk, sigmoid or relu"}
    )
    temperature: float = field(default=1.0, metadata={"help": "divides the logits"})
    alpha: float = field(default=1.5, metadata={"help": "of entmax, above 1 (softmax) and at most 2 (sparsemax)"})
    k: int = field(default=32, metadata={"help": "keys that topk keeps"})
    trained: int = field(default=2048, metadata={"help": "keys of a row at which ssmax is softmax"})
    position: Position = field(default="rope", metadata={"help": "rope, alibi, t5 or none, of a layer that is trained"})

    def __post_init__(self) -> None:
        if self.trained < 2:
            raise UserError(f"{self.slug}: trained is a number of keys of at least 2, not {self.trained}")
        _ = self.rule

    @property
    def rule(self) -> Normalizer:
        """What makes weights of logits."""
        return Normalizer(self.normalizer, self.temperature, self.alpha, self.k, log_n_scale(self.trained))

    def attend(self, call: AttentionCall) -> Tensor:
        call.require_softmax()
        if call.sinks is not None:
            raise UserError(
                f"{self.slug}: {call.site.name} has learned sinks, a part of its softmax alone; leave its layer out by "
                "layers=..., or take a model without"
            )
        return normalized_attention(call, self.rule)

    def build(self, config: MixerConfig) -> nn.Module:
        return Layer(config, self)


class Layer(PositionedMixer):
    """Multi-head attention whose weights the strategy's normalizer makes."""

    def __init__(self, config: MixerConfig, strategy: Normalized) -> None:
        super().__init__(config, Positions(strategy.position))
        self.rule = strategy.rule
        scale = torch.full((config.num_heads,), log_n_scale(config.length))
        self.s = nn.Parameter(scale) if strategy.normalizer == "ssmax" else None

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, bias: Tensor | None, **given: Any) -> Tensor:
        """As of the base, by the normalizer."""
        mask = spec.dense(q.shape[2], k.shape[2], device=q.device, **given)
        call = AttentionCall(_HERE, q, k, v, self.scale, mask=mask, bias=bias)
        s = None if self.s is None else self.s[:, None, None]
        return normalized_attention(call, self.rule, s).transpose(1, 2)
