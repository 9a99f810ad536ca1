# SPDX-License-Identifier: Apache-2.0
"""MAELRE: cheap attention while tokens are many, tokens merged between stages, exact attention once they are few.

Parag and Elgammal, "Modality Agnostic Efficient Long Range Encoder", arXiv 2507.19409. An encoder of N tokens of D
channels in stages of a few layers:

    N > D     attention by a matrix of channels, d x d a head: O(N d^2) time, O(d^2) memory
    between   stages tokens merge, N becomes N / ratio, as long as N > D
    N <= D    softmax attention

With N halved at each stage the layers cost about as much as two of the first. The paper's abstract and its figure say
this much; the operators are our choice among the usual ones:

    efficient   softmax over channels of Q times (softmax over tokens of K)^T V     Shen et al., arXiv 1812.01243
    xca         V softmax(K^T Q / tau) of unit channels                             XCiT, arXiv 2106.09681
    elu         (elu(Q) + 1)((elu(K) + 1)^T V), normalised                          arXiv 2006.16236

    pairs       neighbours, a mean weighted by a learned gate
    matching    ToMe's bipartite soft matching on the keys of the layer ahead       arXiv 2210.09461

A merged token counts as as many as it was made of: log sizes are added where keys are summed over tokens, in every
form, so that a token of size two is two equal tokens, exactly. Matching compares all pairs, N^2 / 4 of them; pairs are
the default, for they are linear in N.

It is a whole encoder: a layer alone mixes, and the model that holds it merges (:class:`manyheads.models.Encoder`,
:class:`manyheads.models.classifier.Classifier`) by what :meth:`Attention.reduce` says. An Encoder, which says something
of every token, gives each what its merged token has become. Padded texts are treated as they are alone. There are no
positions here: they are the input's (the Classifier's stem adds them). ``form=softmax`` and ``merge=none`` leave a part
out; ``merge=stride`` is plain pooling and ``merge=random`` matches by chance, both controls. Grouped queries are ours.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, normalize, pad, rms_norm, scaled_dot_product_attention

from ..attention.masks import each_text
from ..attention.merging import Grouping, adjacent, matched
from ..attention.reference import attention, repeat_kv, widened
from ..call import MixerConfig
from ..errors import UserError
from ..strategy import Mixer
from ._mixer import projections, split_heads, whole

__all__ = ["Maelre", "channel_attention"]

Form = Literal["efficient", "xca", "elu", "softmax"]
Merge = Literal["pairs", "matching", "stride", "random", "none"]


@dataclass(frozen=True, kw_only=True)
class Maelre(Mixer):
    """An encoder that merges its tokens stage by stage.

    Attributes:
        form: attention while tokens are many.
        merge: how tokens merge between stages.
        ratio: tokens that become one, a power of two for ``matching``.
        blocks: layers of a stage.
        switch: tokens up to which attention is exact and none merge; 0 for as many as there are channels, the paper's.
    """

    directions: ClassVar = ("bidirectional",)

    form: Form = field(default="efficient", metadata={"help": "attention while tokens are many"})
    merge: Merge = field(default="pairs", metadata={"help": "pairs or matching; stride, random and none are controls"})
    ratio: int = field(default=2, metadata={"help": "tokens that become one between stages"})
    blocks: int = field(default=1, metadata={"help": "layers of a stage"})
    switch: int = field(default=0, metadata={"help": "tokens up to which attention is exact; 0: the model's channels"})

    def __post_init__(self) -> None:
        if self.ratio < 2 or self.blocks < 1 or self.switch < 0:
            raise UserError(f"{self.slug}: two or more tokens become one, and a stage has a layer: {self.spec}")
        if self.merge in ("matching", "random") and self.ratio & (self.ratio - 1):
            raise UserError(f"{self.slug}: matching joins two at a time: ratio is a power of two, not {self.ratio}")

    def build(self, config: MixerConfig) -> nn.Module:
        if config.causal:
            raise UserError("maelre: merged tokens tell of tokens to come; it is encoder attention")
        return Attention(config, self)


def channel_attention(
    q: Tensor, k: Tensor, v: Tensor, form: Form = "efficient", *, tau: Tensor | float = 1.0,
    log_sizes: Tensor | None = None, mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Bidirectional attention whose matrix is of channels, linear in the number of tokens.

    Args:
        q, k: ``[B, H, T, d]``.
        v: ``[B, H, T, dv]``.
        form: ``efficient``, ``xca`` or ``elu``.
        tau: of ``xca``, a number or ``[H, 1, 1]``.
        log_sizes: ``[B, T]``, logarithm of the tokens that each stands for; of one each when None.
        mask: ``[B, T]``, True for tokens.

    Returns:
        ``[B, H, T, dv]`` in the dtype of v; what stands where there is no token means nothing.
    """
    q, k, sums = widened(q), widened(k), v.dtype
    weight = k.new_zeros(1, 1, 1, 1) if log_sizes is None else widened(log_sizes)[:, None, :, None]
    if mask is not None:
        weight = weight.masked_fill(~mask[:, None, :, None], torch.finfo(k.dtype).min)
    if form == "efficient":
        context = (k + weight).softmax(2).to(sums).mT @ v
        return q.softmax(3).to(sums) @ context
    if form == "xca":
        half = (0.5 * weight).exp()
        unit_q, unit_k = (normalize(x * half, dim=2) for x in (q, k))
        attended: Tensor = (unit_q.mT @ unit_k / tau).softmax(3).to(sums) @ v.mT
        return attended.mT
    feature_q, feature_k = elu(q) + 1, (elu(k) + 1) * weight.exp()
    total = feature_q @ feature_k.sum(2, keepdim=True).mT
    return (feature_q.to(sums) @ (feature_k.to(sums).mT @ v)) / total.to(sums).clamp(min=1e-6)


class Attention(nn.Module):
    """A layer, and how tokens merge before it."""

    def __init__(self, config: MixerConfig, strategy: Maelre) -> None:
        super().__init__()
        self.config, self.strategy = config, strategy
        self.limit = strategy.switch or config.dim
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = projections(config)
        self.merges = config.layer > 0 and config.layer % strategy.blocks == 0 and strategy.merge != "none"
        self.log_tau = nn.Parameter(torch.zeros(config.num_heads, 1, 1)) if strategy.form == "xca" else None
        self.gate = nn.Linear(config.dim, 1, bias=False) if self.merges and strategy.merge == "pairs" else None

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, state: Any = None, cu_seqlens: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Output ``[B, T, dim]`` of ``x [B, T, dim]``, padded anywhere by ``mask`` or packed; there is no state.

        ``sizes [B, T]`` says how many tokens each stands for; rows then begin at column 0.
        """
        whole(state)
        if sizes is not None:
            return self._attend(x, mask, sizes.clamp(min=1).log()), None

        def attend(rows: Tensor, lengths: Tensor | None) -> Tensor:
            real = None if lengths is None else torch.arange(rows.shape[1], device=x.device) < lengths[:, None]
            return self._attend(rows, real, None)

        return each_text(attend, x, mask, cu_seqlens), None

    def reduce(
        self, x: Tensor, mask: Tensor | None, sizes: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Grouping] | None:
        """Merge tokens before this layer: merged tokens, their sizes, and who is part of whom; None where none merge.

        Args:
            x: ``[B, T, dim]``, rows that begin at column 0.
            mask: ``[B, T]``, True for tokens.
            sizes: ``[B, T]`` of tokens, 0 for padding; None where all are alike. Those returned are the same.
        """
        length, ratio = x.shape[1], self.strategy.ratio
        if not self.merges or length <= self.limit:
            return None
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        held = real.sum(1)
        long = held > self.limit
        count = -(length // -ratio) if mask is None else max(-(length // -ratio), min(length, self.limit))
        alike = sizes is None and mask is None and length % ratio == 0
        sizes = real.to(widened(x).dtype) if sizes is None else sizes
        if self.strategy.merge in ("matching", "random"):
            alike, grouping = False, self._matching(x, sizes, torch.where(long, -(held // -ratio), held), count)
        else:
            grouping = adjacent(real, torch.where(long, ratio, 1), count)
        weights = sizes if self.gate is None else sizes * self.gate(rms_norm(x, x.shape[2:])).sigmoid()[..., 0]
        return grouping.reduce(x, weights), None if alike else grouping.totals(sizes), grouping

    @torch.no_grad()
    def _matching(self, x: Tensor, sizes: Tensor, kept: Tensor, count: int) -> Grouping:
        """Two become one, as often as the ratio takes."""
        keys = self.k_proj(rms_norm(x, x.shape[2:])).unflatten(2, (self.config.num_kv_heads, -1)).mean(2)
        choose: Literal["similar", "random"] = "random" if self.strategy.merge == "random" else "similar"
        found = adjacent(sizes > 0, 1, x.shape[1])
        for _ in range(self.strategy.ratio.bit_length() - 1):
            room = max(count, -(found.count // -2))
            step = matched(keys, sizes > 0, torch.maximum(kept, -((sizes > 0).sum(1) // -2)), room, choose=choose)
            keys, sizes, found = step.reduce(keys, sizes), step.totals(sizes), found.then(step)
        return found

    def _attend(self, x: Tensor, mask: Tensor | None, log_sizes: Tensor | None) -> Tensor:
        """Texts ``x [N, T, dim]`` that begin at column 0."""
        config, limit = self.config, self.limit
        q = split_heads(self.q_proj(x), config.num_heads)
        k, v = (repeat_kv(split_heads(p(x), config.num_kv_heads), config.num_heads) for p in (self.k_proj, self.v_proj))
        if x.shape[1] <= limit or self.strategy.form == "softmax":
            out = self._exact(q, k, v, mask, log_sizes)
        else:
            tau = 1.0 if self.log_tau is None else self.log_tau.exp()
            out = channel_attention(q, k, v, self.strategy.form, tau=tau, log_sizes=log_sizes, mask=mask)
            if mask is not None:  # texts that alone would be few tokens
                near_sizes = None if log_sizes is None else log_sizes[:, :limit]
                near = self._exact(q[:, :, :limit], k[:, :, :limit], v[:, :, :limit], mask[:, :limit], near_sizes)
                few = (mask.sum(1) <= limit)[:, None, None, None]
                out = torch.where(few, pad(near, (0, 0, 0, x.shape[1] - limit)), out)
        y: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return y

    def _exact(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, log_sizes: Tensor | None) -> Tensor:
        scale = self.config.head_dim**-0.5
        bias = None if log_sizes is None else log_sizes[:, None, None].to(q.dtype)
        if mask is not None:
            return attention(q, k, v, scale=scale, mask=mask[:, None, None], bias=bias).transpose(1, 2)
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
