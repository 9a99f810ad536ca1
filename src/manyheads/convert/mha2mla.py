# SPDX-License-Identifier: Apache-2.0
"""MHA2MLA: give a trained decoder latent attention, by partial rotary positions and an SVD of keys and values together.

Most rotary pairs of a head move its logits little. The others keep turning and are cached as they are; keys without
positions and values are both linear in the block's input, so one low-rank factorisation serves both, and what is
cached of a token is one latent. Little training mends what that breaks.

Towards Economical Inference: Enabling DeepSeek's Multi-Head Latent Attention in Any Transformer-based LLMs (arXiv
2502.14837). For each key/value head g, pair j of its d/2 rotary pairs, r of d channels kept:

    2-norm    the r/2 pairs with the largest  E|q_j| E|k_j|,  |q_j| averaged over the query heads of g
    high, low the r/2 fastest, slowest;  uniform: every (d/r)-th
    joint     [W_kc; W_v] ~ U_R S_R V_R^T,  c = V_R^T x,  [k_c; v] = U_R S_R c      (W_kc: rows of pairs not kept)
    split     the same for W_kc and W_v apart, half of R each
    logits    (q_r . rot(k_r) + q_c . k_c) / sqrt(d)
    cache     G r + R numbers a token and layer, of 2 G d

Open in the text and chosen here: E is over tokens, of each norm by itself, for query and key are of different tokens.
``keep`` says the share of the cache, from which R follows (the paper names r and R / G: 8 and 32 of d = 64 are
keep=0.3125). Query heads that share a key/value head get up-projections of their own, equal at first. A bias of keys
or values takes one of the R channels, which is constant. Recovery is on the text, as in the paper; its schedule is that
of every recovery here. ``same`` (ours) takes one choice of pairs for all layers, by the sum of their scores: only then,
or with ``high``, ``low`` and ``uniform``, does a stock config (DeepSeek-V3) say the result.

The paper's four-bit caches are any cache strategy that takes latents; decode without expanding them by ``mla_hw``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..calls.calibration import Statistic, Statistics
from ..conversion import Anatomy, Conversion, Recovery, Replace, SurgeryPlan
from ..errors import UserError
from ._rotary import check_rotary

__all__ = ["MHA2MLA"]

_MODULE = "manyheads.integrations.latent_attention:LatentAttention"


@dataclass(frozen=True, kw_only=True)
class MHA2MLA(Conversion):
    """See the head of this file."""

    families: ClassVar[frozenset[str]] = frozenset({"llama"})

    keep: float = field(default=0.3125, metadata={"help": "share of the cache's numbers that is left"})
    rope: float = field(default=0.125, metadata={"help": "share of a head's channels that keep rotary positions"})
    select: Literal["2-norm", "high", "low", "uniform"] = field(
        default="2-norm", metadata={"help": "which pairs keep turning: 2-norm, high, low or uniform (by frequency)"}
    )
    factors: Literal["joint", "split"] = field(
        default="joint", metadata={"help": "SVD of keys and values together, or of each by itself"}
    )
    same: bool = field(default=False, metadata={"help": "all layers keep the same pairs, so that DeepSeek-V3 says it"})
    loss: Literal["nll", "kl"] = field(
        default="nll", metadata={"help": "of the recovery: nll (of the text) or kl (to the model before)"}
    )
    lr: float = field(default=1e-4, metadata={"help": "highest learning rate of the recovery"})

    def __post_init__(self) -> None:
        if self.select not in ("2-norm", "high", "low", "uniform") or self.factors not in ("joint", "split"):
            raise UserError("mha2mla: select is 2-norm, high, low or uniform, and factors is joint or split")
        if not (0 < self.keep <= 1 and 0 < self.rope <= 1) or self.lr <= 0 or self.loss not in ("nll", "kl"):
            raise UserError("mha2mla: keep and rope are shares above 0, lr is above 0, and loss is nll or kl")

    def wants(self, model: Anatomy) -> Sequence[Statistic]:
        check_rotary(self.slug, model)
        return (_pair_norms(model.layers[0].head_dim),) if self.select == "2-norm" else ()

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        shape, biased = model.layers[0], any(model.bias(part, 0) is not None for part in "qkv")
        heads, groups, dim = shape.heads, shape.kv_heads, shape.head_dim
        turned = 2 * max(1, round(self.rope * dim / 2))
        rows = groups * (2 * dim - turned)
        rank = min(int(self.keep * 2 * groups * dim + 1e-6) - groups * turned, min(rows, model.width) + 2 * biased)
        rank -= rank % 2  # two channels share a byte of a four-bit cache
        least = 4 if biased and self.factors == "split" else 2
        if rank < least:
            need = ceil(1000 * (groups * turned + least) / (2 * groups * dim)) / 1000
            raise UserError(f"mha2mla: {turned} rotary channels of {groups} heads fill that cache; keep {need}")
        steps = []
        for i, pairs in enumerate(self._pairs(model, stats, turned // 2)):
            nope = [[j for j in range(dim // 2) if j not in own] for own in pairs]
            config = {
                "width": model.width, "heads": heads, "head_dim": dim, "rank": rank, "pairs": pairs, "bias": biased,
                "out_bias": model.bias("o", i) is not None,
            }  # fmt: skip
            tensors = self._weights(model, i, pairs, nope, rank - biased, biased)
            steps.append(Replace(part="attention", layer=i, module=_MODULE, config=config, tensors=tensors))
        return SurgeryPlan(tuple(steps))

    def recovery(self, model: Anatomy) -> Recovery:
        return Recovery(loss=self.loss, lr=self.lr)

    def _pairs(self, model: Anatomy, stats: Statistics, count: int) -> list[list[list[int]]]:
        """The pairs that each key/value head of each layer keeps, ascending."""
        shape, layers = model.layers[0], len(model.layers)
        half = shape.head_dim // 2
        if self.select != "2-norm":
            step = half // count
            fixed = {
                "high": range(count), "low": range(half - count, half), "uniform": range(0, step * count, step),
            }[self.select]  # fmt: skip
            return [[list(fixed)] * shape.kv_heads] * layers
        scores = torch.stack(list(stats[_pair_norms(shape.head_dim)])).split([shape.heads, shape.kv_heads], 1)
        score = scores[0].unflatten(1, (shape.kv_heads, -1)).mean(2) * scores[1]
        if self.same:
            score = score.sum(0, keepdim=True).expand(layers, -1, -1)
        found: list[list[list[int]]] = score.topk(count, -1).indices.sort(-1).values.tolist()
        return found

    def _weights(
        self, model: Anatomy, layer: int, pairs: list[list[int]], nope: list[list[int]], rank: int, biased: bool
    ) -> dict[str, Tensor]:
        """The state of the module of a layer."""
        shape = model.layers[layer]
        groups, dim = shape.kv_heads, shape.head_dim
        size = shape.heads // groups
        q, k, v = (self._rows(model, part, layer) for part in "qkv")  # [heads, d, D + 1], the bias behind
        turned, still = ([_channels(own, dim) for own in chosen] for chosen in (pairs, nope))
        q = torch.cat([
            torch.cat([q[h, still[h // size]], q[h, turned[h // size]]]) for h in range(shape.heads)
        ])  # fmt: skip
        k_nope = torch.stack([k[g, still[g]] for g in range(groups)])
        halves = torch.stack([k[g, turned[g]] for g in range(groups)]).unflatten(1, (2, -1))
        k_rope = halves.transpose(0, 1).flatten(0, 2)
        both = torch.cat([k_nope, v], 1)  # [G, dn + d, D + 1]
        if self.factors == "joint":
            up, down = _svd(both[..., :-1].flatten(0, 1), rank)
        else:
            (up_k, down_k), (up_v, down_v) = (
                _svd(x[..., :-1].flatten(0, 1), r) for x, r in ((k_nope, rank // 2), (v, rank - rank // 2))
            )
            own = [x.unflatten(0, (groups, -1)) for x in (up_k, up_v)]
            zeros = [x.new_zeros(*x.shape[:2], r) for x, r in zip(own, (up_v.shape[1], up_k.shape[1]), strict=True)]
            up = torch.cat([torch.cat([own[0], zeros[0]], -1), torch.cat([zeros[1], own[1]], -1)], 1).flatten(0, 1)
            down = torch.cat([down_k, down_v])
        offsets = [down.new_zeros(len(down)), k_rope[:, -1]]
        if biased:  # one channel of the latent is constant, and carries the biases
            up, down = (
                torch.cat([up, both[..., -1].reshape(-1, 1)], 1),
                torch.cat([down, down.new_zeros(1, len(down[0]))]),
            )
            offsets.insert(1, down.new_ones(1))
        made = {
            "q_proj.weight": q[:, :-1], "kv_a_proj_with_mqa.weight": torch.cat([down, k_rope[:, :-1]]),
            "kv_b_proj.weight": up.unflatten(0, (groups, -1)).repeat_interleave(size, 0).flatten(0, 1),
            "o_proj.weight": model.weight("o", layer),
        }  # fmt: skip
        if biased:
            made |= {"q_proj.bias": q[:, -1], "kv_a_proj_with_mqa.bias": torch.cat(offsets)}
        if (out := model.bias("o", layer)) is not None:
            made["o_proj.bias"] = out
        return made

    @staticmethod
    def _rows(model: Anatomy, part: str, layer: int) -> Tensor:
        """Weight and bias of all heads, ``[heads, d, D + 1]``, in float32 or better."""
        weight, bias = model.weight(part, layer), model.bias(part, layer)
        whole = torch.cat([weight, (weight.new_zeros(len(weight)) if bias is None else bias)[:, None]], 1)
        whole = whole if whole.dtype == torch.float64 else whole.float()
        heads: Tensor = whole.unflatten(0, (-1, model.layers[layer].head_dim))
        return heads


def _channels(pairs: list[int], dim: int) -> list[int]:
    """Channels of rotary pairs of a head, first halves before second halves."""
    return [*pairs, *(j + dim // 2 for j in pairs)]


def _svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``U S [out, rank]`` and ``V^T [rank, in]``; of a rank that the weight has not, the rest is zero."""
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    more = max(0, rank - len(s))
    up, down = (u * s)[:, :rank], vh[:rank]
    return torch.cat([up, up.new_zeros(len(up), more)], 1), torch.cat([down, down.new_zeros(more, down.shape[1])])


def _pair_norms(dim: int) -> Statistic:
    """Mean over tokens of the norm of each rotary pair of queries and keys, ``[H + G, d / 2]``; turning keeps it."""

    def add(x: Tensor, q: Tensor, k: Tensor, q_bias: Tensor, k_bias: Tensor) -> Tensor:
        made = torch.cat([linear(x, q, q_bias), linear(x, k, k_bias)], -1)
        norms: Tensor = made.unflatten(-1, (-1, 2, dim // 2)).norm(dim=-2)
        return norms.flatten(0, 1).sum(0, dtype=torch.float64)

    return Statistic(
        "attention.pair_norms", "attention", add, lambda total, _, tokens: total / tokens,
        parts=("q", "k", "q.bias", "k.bias"),
    )  # fmt: skip
