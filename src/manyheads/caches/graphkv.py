# SPDX-License-Identifier: Apache-2.0
"""Lower the scores of tokens that resemble the best-scored ones, so that any scorer keeps a diverse set.

Li et al., "GraphKV: Breaking the Static Selection Paradigm with Graph-Based KV Cache Eviction", arXiv 2509.00388.
Scores rank tokens one by one, so several that say the same all stay. Here the tokens of a head are nodes of a graph
with the scores of another strategy, s_j >= 0, and edges e_ij = cos(k_i, k_j) of their cached (rotated) keys. The K
best nodes are sources. Each source i reaches the m tokens most similar to it that are no sources, N(i), and takes from
them in proportion: s_j <- s_j * prod over i with j in N(i) of (1 - e_ij). After ``rounds`` of this, each from the
sources of its new scores, the best stay.

Shapes: scores ``[B, Hs, N]`` and keys ``[B, Hs, N, d]`` of the heads as stored (Hs = Hkv; where a cache holds latents,
one, whose key is the keys of all heads side by side). K x N similarities per head, in blocks.

Chosen here, as the paper's code is not released and its text leaves it open: K = ceil(``num_sources`` * slots that the
base may fill freely), so that protected tokens (the base's window, sinks) are neither sources nor targets. m, which the
paper adapts by a rule not given, is ceil(0.1 * nodes / K) unless set. Cosines are clipped to [0, 1], so that no score
grows or changes its sign under ``update="mul"``; ``"add"`` is the one-round form of the paper's figure,
s_j - sum of e_ij s_j. Of m-th neighbours that are equally similar all are reached. Where a base has negative scores
(keydiff, knorm), they are first shifted up by the least of the head: the order is the base's, but how much a cosine
takes then depends on that zero.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..attention import reference
from ..attention.budget import keep_counts
from ..errors import UserError
from ._policy import must_stay
from ._view import CacheView
from ._wrap import Wrapper

__all__ = ["GraphKV"]


@dataclass(frozen=True, kw_only=True)
class GraphKV(Wrapper):
    """The scores of ``base``, less what resembles its best.

    Attributes:
        num_sources: sources as a fraction of the slots that are freely filled; 0 leaves the scores as they are.
        neighbours: m, tokens that a source reaches; None for ceil(0.1 * nodes / sources).
        rounds: how often sources are chosen and take.
        update: ``mul`` or ``add``.
        edges: between tokens whose ``keys`` are alike, or ``shuffled``: as strong, and between tokens drawn at random,
            which is the control that resemblance has to beat.
        seed: of the shuffling.
    """

    num_sources: float = field(default=0.3, metadata={"help": "sources, as a fraction of the freely filled slots"})
    neighbours: int | None = field(default=None, metadata={"help": "tokens that a source reaches; adaptive if not set"})
    rounds: int = field(default=1, metadata={"help": "how often sources are chosen and take"})
    update: Literal["mul", "add"] = field(default="mul", metadata={"help": "mul: products of 1 - e; add: sums of e"})
    edges: Literal["keys", "shuffled"] = field(
        default="keys", metadata={"help": "by likeness of keys, or shuffled: as strong, and random (control)"}
    )
    seed: int = field(default=0, metadata={"help": "of the shuffling"})

    def __post_init__(self) -> None:
        if not 0 <= self.num_sources <= 1:
            raise UserError(f"graphkv: num_sources is a fraction of the slots, 0 to 1, not {self.num_sources}")
        if self.rounds < 0 or (self.neighbours or 0) < 0:
            raise UserError("graphkv: rounds and neighbours cannot be negative")
        super().__post_init__()

    def layer_budgets(self, views: Mapping[int, CacheView]) -> Mapping[int, Tensor | float]:
        shares = super().layer_budgets(views)
        for layer, view in views.items():
            view.state["share"] = torch.as_tensor(shares[layer], device=view.k.device).expand(view.k.shape[0]).clone()
        return shares

    def score(self, view: CacheView) -> Tensor:
        scores, heads = reference.widened(super().score(view)), view.positions.shape[1]
        if 0 in (self.num_sources, self.neighbours, self.rounds):
            return scores
        if scores.shape[1] != heads:
            scores = scores.unflatten(1, (heads, -1)).mean(2)
        protected = must_stay(self, view)
        nodes = (view.positions >= 0) & ~protected & scores.isfinite()
        free = self._room(view, scores) - protected.sum(-1)
        sources = (free.clamp(min=0) * self.num_sources - 1e-6).ceil().long()
        if self.neighbours is None:
            neighbours = (0.1 * nodes.sum(-1) / sources.clamp(min=1) - 1e-6).ceil().long().clamp(min=1)
        else:
            neighbours = torch.full_like(sources, self.neighbours)
        low = scores.masked_fill(~nodes, torch.inf).amin(-1, keepdim=True).clamp(max=0)
        return propagate(
            scores - low, self.keys(view), nodes, sources, neighbours, rounds=self.rounds, update=self.update
        )

    def _room(self, view: CacheView, scores: Tensor) -> Tensor:
        """Slots that the base's own layers and heads get, ``[B, Hs]``."""
        room = keep_counts(self.budget, view.counts, self.protected)
        if "share" in view.state:
            room = (room * view.state["share"]).round().long()
        room = room[:, None].expand(-1, scores.shape[1])
        given = super().head_budgets(view, scores, room)
        return room if given is None else given

    def keys(self, view: CacheView) -> Tensor:
        """What similarity is measured on, ``[B, Hs, N, d]``."""
        grouped: Tensor = view.k.unflatten(1, (view.positions.shape[1], -1))
        keys = grouped.transpose(2, 3).flatten(3)
        if self.edges == "keys":
            return keys
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + (view.site.layer or 0))
        order = torch.rand(keys.shape[:3], generator=generator).argsort(-1).to(keys.device)
        return keys.gather(2, order[..., None].expand_as(keys))


def propagate(
    scores: Tensor, keys: Tensor, nodes: Tensor, sources: Tensor, neighbours: Tensor, *, rounds: int, update: str
) -> Tensor:
    """Scores after ``rounds`` of decay.

    Args:
        scores: ``[B, Hs, N]``, at least 0 at the nodes.
        keys: ``[B, Hs, N, d]``.
        nodes: bool ``[B, Hs, N]``; other slots neither take nor lose.
        sources: K of each head, ``[B, Hs]``.
        neighbours: m of each head, ``[B, Hs]``, at least 1.
        rounds: T.
        update: ``mul`` or ``add``.
    """
    unit = torch.nn.functional.normalize(reference.widened(keys), dim=-1)
    size = scores.shape[2]
    most, reach = min(int(sources.max()), size), min(int(neighbours.max()), size)
    block = reference.block_size(scores, scores.numel())
    for _ in range(rounds if most else 0):
        # Flipped, so that the stable sort puts the newer of two equal slots first.
        ranked = scores.masked_fill(~nodes, -torch.inf).flip(-1).argsort(dim=-1, descending=True, stable=True)
        best = size - 1 - ranked[..., :most]
        takes = (torch.arange(most, device=best.device) < sources[..., None]) & nodes.gather(2, best)  # [B, Hs, K]
        targets = nodes & ~torch.zeros_like(nodes).scatter(2, best, takes)
        left = torch.ones_like(scores)
        for slots, real in zip(best.split(block, 2), takes.split(block, 2), strict=True):
            edges = unit.gather(2, slots[..., None].expand(*slots.shape, unit.shape[3])) @ unit.transpose(2, 3)
            edges = edges.masked_fill_(~targets[:, :, None], -torch.inf)
            last = (neighbours - 1).clamp(max=reach - 1)[..., None, None].expand(*slots.shape, 1)
            least = edges.topk(reach, -1).values.gather(3, last)
            edges = torch.where((edges >= least) & real[..., None], edges.clamp(0.0, 1.0), 0.0)
            left = left * (1 - edges).prod(2) if update == "mul" else left - edges.sum(2)
        scores = scores * left
    return scores
