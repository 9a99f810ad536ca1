# SPDX-License-Identifier: Apache-2.0
"""Give each layer its own budget, drop what received little attention, and merge it into the most similar kept tokens.

Wan et al., "D2O: Dynamic Discriminative Operations for Efficient Generative Inference of Large Language Models",
arXiv 2406.13035. Three operations:

- Layers. a[j] is the attention that key j received in the prompt, summed over queries. Its variance over j is min-max
  normalised over the heads of a layer and averaged: the density F_l in [0, 1]. Layer l keeps the share
  r_l = clamp(softmax(-F)_l * L * rho, 0.01, 1) of its tokens, rho = ``budget``: where attention is spread evenly, more
  tokens are needed. The shares average to rho unless one is clamped (not renormalised afterwards, as released).
- Tokens. Of r_l, the part ``recent_share`` holds the last tokens, the rest the first ``sinks`` and those of most
  attention mass up to now (heavy hitters).
- Merging. A dropped token i looks for its nearest kept one, u_i = max_c cos(k_i, k_c) on cached (rotated) keys. The
  threshold tau starts as the mean of u at the first eviction and follows tau = alpha * tau + beta * mean(u) at later
  ones. Tokens with u_i >= tau are merged into their nearest, keys and values alike; the others are lost.

``weights="paper"`` makes a convex combination, w_c = e / Z and w_i = exp(u_i) / Z with Z = e + sum of exp(u_i).
``weights="code"`` (released) is the plain mean of k_c and the u_i * k_i, which shortens keys where u_i < 1. Both weigh
a token that was hardly attended to like one that was, and many that merge into one push it aside, whatever attention it
gets; ``weights="attention"`` (ours) is a convex combination by the attention that each received.

Where this differs from paper or released code: with grouped queries the mass of a group is summed, and every key/value
head evicts, merges and has its threshold for itself (released: keys repeated for all query heads, and one threshold
held against u averaged over heads, each of which dropped other tokens). F is over query heads, as released. rho is
this library's budget, so a fraction grows with the text, while a whole number is fixed as in the paper, which fixes
its sizes at the prompt. Eviction begins after the prompt (released: after the first new token). The default
``recent_share`` is the paper's 3:1; the released scripts halve. ``skip_layers="code"`` leaves the first two layers and
the last one whole, as released: then the cache is larger than its budget. Layers are shared out anew only as rho
changes; F stays that of the first forward.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..attention import reference
from ..attention.accumulated_attention import accumulated_attention
from ..attention.budget import keep_counts
from ..call import AttentionCall
from ..errors import UserError
from ._policy import SCHEDULES, Schedule
from ._strategy import EvictionStrategy
from ._view import CacheView, QueryWindow

__all__ = ["D2O"]

_LEAST_SHARE = 0.01  # of its tokens that every layer keeps


@dataclass(frozen=True, kw_only=True)
class D2O(EvictionStrategy):
    """Heavy hitters and recent tokens under budgets by layer; similar dropped tokens are merged into kept ones.

    Attributes:
        recent_share: part of a layer's slots that holds the last tokens.
        layer_alloc: ``variance`` of attention mass, or the same budget for all (``uniform``).
        skip_layers: ``none`` (paper), or ``code``: the first two layers and the last one are never compressed.
        merging: merge dropped tokens; without, they are lost.
        weights: of a merger, ``paper`` (convex), ``code`` or ``attention``.
        alpha, beta: of the threshold that was and of the new mean similarity.
    """

    accumulated_attention: ClassVar[bool] = True
    needs_queries: ClassVar[bool] = True
    cross_layer: ClassVar[bool] = True

    recent_share: float = field(default=0.25, metadata={"help": "part of the slots that holds the last tokens"})
    layer_alloc: Literal["variance", "uniform"] = field(
        default="variance", metadata={"help": "budgets of layers: variance of attention mass, or uniform"}
    )
    skip_layers: Literal["none", "code"] = field(
        default="none", metadata={"help": "layers left whole: none (paper), or code: first two and last"}
    )
    merging: bool = field(default=True, metadata={"help": "merge dropped tokens into similar kept ones"})
    weights: Literal["paper", "code", "attention"] = field(
        default="paper", metadata={"help": "of a merger: paper (convex), code, or attention received"}
    )
    alpha: float = field(default=0.5, metadata={"help": "weight of the similarity threshold so far"})
    beta: float = field(default=0.5, metadata={"help": "weight of the new mean similarity"})
    schedule: Schedule = field(default="step", metadata={"help": SCHEDULES})
    sinks: int = field(default=4, metadata={"help": "first tokens that are never dropped"})

    def __post_init__(self) -> None:
        if not 0 <= self.recent_share <= 1:
            raise UserError(f"d2o: recent_share is a part of the slots, 0 to 1, not {self.recent_share}")
        super().__post_init__()

    def observe(self, call: AttentionCall, queries: QueryWindow, state: dict[str, Tensor]) -> None:
        """Note the density F ``[B]`` of the first forward, whose queries stand where its keys stand."""
        if "density" in state:
            return
        heads, at = call.q.shape[1], queries.positions
        keys = reference.repeat_kv(call.k, heads)
        mass = accumulated_attention(
            queries.q, keys, at, at[:, None], scale=call.scale, softcap=call.softcap, sinks=call.sinks,
            causal=call.mask is None and bool((at >= 0).all()),
        )  # [B, H, S]  # fmt: skip
        state["density"] = density(mass, (at >= 0)[:, None])

    def layer_budgets(self, views: Mapping[int, CacheView]) -> Mapping[int, Tensor | float]:
        """r_l / rho, and the number of recent tokens that it leaves each layer."""
        shares: dict[int, Tensor | float] = dict.fromkeys(views, 1.0)
        if self.layer_alloc == "variance":
            spread = torch.stack([view.state["density"] for view in views.values()])  # [L, B]
            portions = torch.softmax(-spread, 0) * len(views)
            shares = {layer: self._share(portion, views[layer]) for layer, portion in zip(views, portions, strict=True)}
        for layer, view in views.items():
            peers = view.site.peers
            if self.skip_layers == "code" and layer in (*peers[:2], *peers[-1:]):
                shares[layer] = 1 / self._rho(view)
            equal = keep_counts(self.budget, view.counts, self.protected)
            room = (equal * shares[layer]).round().long().minimum(view.counts)
            recent = (room * self.recent_share).long().clamp(min=self.recent)
            view.state["recent"] = recent.minimum(room - self.sinks).clamp(min=0)
        return shares

    def _rho(self, view: CacheView) -> Tensor:
        """Part of its tokens that each row may keep, ``[B]``."""
        if isinstance(self.budget, float):
            return torch.full_like(view.counts, self.budget, dtype=torch.float32)
        return view.counts.clamp(max=self.budget) / view.counts.clamp(min=1)

    def _share(self, portion: Tensor, view: CacheView) -> Tensor:
        """What a layer keeps of its equal budget, ``[B]``; all of it in rows that have room for every token."""
        rho = self._rho(view)
        share = (portion * rho).clamp(_LEAST_SHARE, 1.0) / rho
        return torch.where(rho < 1, share, 1.0)

    def score(self, view: CacheView) -> Tensor:
        assert view.accumulated_attention is not None
        return view.accumulated_attention

    def protected_mask(self, view: CacheView) -> Tensor:
        late = view.positions >= (view.counts - view.state["recent"])[:, None, None]
        return (view.positions >= 0) & ((view.positions < self.sinks) | late)

    def merge(self, view: CacheView, kept: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.merging:
            return None
        if view.site.latent is not None or kept.shape[1] != view.k.shape[1]:
            raise UserError(
                f"d2o merges keys and values, and {view.site.name} caches latents instead: use d2o:merging=False"
            )
        gone = (view.positions >= 0) & ~kept
        most = int(gone.sum(-1).max())
        if not most:
            return None
        at = gone.int().argsort(dim=-1, descending=True, stable=True)[..., :most]  # [B, Hkv, E], dropped ones first
        gone = gone.gather(2, at)
        similarity, target = nearest(view.k, at, kept)
        tau = self._threshold(view, similarity, gone)
        joins = gone & (similarity >= tau[..., None])
        mass = view.accumulated_attention
        return (
            absorb(view.k, at, target, similarity, joins, self.weights, mass),
            absorb(view.v, at, target, similarity, joins, self.weights, mass),
        )

    def _threshold(self, view: CacheView, similarity: Tensor, gone: Tensor) -> Tensor:
        """tau ``[B, Hkv]`` after this eviction; where nothing was dropped it stays, NaN before the first."""
        count = gone.sum(-1)
        mean = torch.where(gone, similarity, 0.0).sum(-1) / count.clamp(min=1)
        before = view.state.get("threshold", torch.full_like(mean, torch.nan))
        after = torch.where(before.isnan(), mean, self.alpha * before + self.beta * mean)
        view.state["threshold"] = torch.where(count > 0, after, before)
        return view.state["threshold"]


def density(mass: Tensor, valid: Tensor) -> Tensor:
    """F ``[B]`` of a layer: variance of ``mass [B, H, S]`` where ``valid [B, 1, S]``, min-max over heads, averaged."""
    count = valid.sum(-1)
    mean = torch.where(valid, mass, 0.0).sum(-1) / count.clamp(min=1)
    variance = torch.where(valid, mass - mean[..., None], 0.0).square().sum(-1) / (count - 1).clamp(min=1)
    low, high = variance.amin(1, keepdim=True), variance.amax(1, keepdim=True)
    return ((variance - low) / (high - low + 1e-6)).mean(1)


def nearest(k: Tensor, at: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine to the most similar kept slot, and its index, for the slots ``at [B, Hkv, E]`` of ``k [B, Hkv, N, d]``."""
    unit = torch.nn.functional.normalize(reference.widened(k), dim=-1)
    block = reference.block_size(k, kept.numel())
    found = []
    for part in at.split(block, 2):
        similarity = unit.gather(2, part[..., None].expand(*part.shape, k.shape[3])) @ unit.transpose(2, 3)
        found.append(similarity.masked_fill_(~kept[:, :, None], -torch.inf).max(-1))
    return torch.cat([x.values for x in found], 2), torch.cat([x.indices for x in found], 2)


def absorb(
    x: Tensor, at: Tensor, target: Tensor, similarity: Tensor, joins: Tensor, weights: str, mass: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Merge slots of ``x [B, Hkv, N, d]`` into others: ``at`` into ``target``, both ``[B, Hkv, E]``, where ``joins``.

    ``mass [B, Hkv, N]`` is what ``weights="attention"`` weighs by.
    Written as what a target gains, sum of w_i (x_i - x_c) / Z: it is exactly nothing where they are equal.
    """
    values = reference.widened(x)

    def pick(slots: Tensor) -> Tensor:
        return values.gather(2, slots[..., None].expand(*slots.shape, x.shape[3]))

    own = torch.ones_like(values[..., 0])  # [B, Hkv, N]
    if weights == "paper":
        own, weight, moved = math.e * own, torch.where(joins, similarity.exp(), 0.0), pick(at)
    elif weights == "attention":
        assert mass is not None
        own = mass.to(values.dtype).clamp(min=torch.finfo(torch.float32).tiny)
        weight, moved = torch.where(joins, own.gather(2, at), 0.0), pick(at)
    else:
        weight, moved = joins.to(values.dtype), similarity[..., None] * pick(at)
    total = own.scatter_add(2, target, weight)
    gain = torch.zeros_like(values).scatter_add(
        2, target[..., None].expand_as(moved), weight[..., None] * (moved - pick(target))
    )
    return (values + gain / total[..., None]).to(x.dtype)
