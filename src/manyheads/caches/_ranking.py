# SPDX-License-Identifier: Apache-2.0
"""One ranking of all tokens of all heads and layers: for scores that mean the same everywhere."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..attention.budget import keep_counts
from ._policy import must_stay
from ._strategy import EvictionStrategy
from ._view import CacheView

__all__ = ["JointRanking", "places"]


def places(scores: list[Tensor]) -> list[Tensor]:
    """Place of each of ``[B, Hs, N]`` among all of its row, 1 for the best; of equals the newer, then the first."""
    flat = torch.cat([x.flip(-1).flatten(1) for x in scores], 1)
    order = flat.argsort(dim=1, descending=True, stable=True)
    place = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=torch.float64)
    ranked = torch.empty_like(place.expand_as(flat)).scatter(1, order, place.expand_as(flat))
    pieces = ranked.split([x.shape[1] * x.shape[2] for x in scores], 1)
    return [piece.view(x.shape).flip(-1) for piece, x in zip(pieces, scores, strict=True)]


@dataclass(frozen=True, kw_only=True)
class JointRanking(EvictionStrategy):
    """Base of strategies whose layers and heads share one budget. A sliding-window layer is ranked by itself."""

    cross_layer: ClassVar[bool] = True

    @abstractmethod
    def rank(self, views: list[CacheView]) -> list[Tensor]:
        """Scores ``[B, Hs, N]`` of each view that can be compared among them; the highest stay."""

    def room(self, view: CacheView) -> Tensor:
        """Tokens of a head that the budget holds on average, ``[B]``."""
        return keep_counts(self.budget, view.counts, self.protected, self.kept_whole)

    def layer_budgets(self, views: Mapping[int, CacheView]) -> Mapping[int, Tensor | float]:
        """Rank the tokens of all layers together, and note in each layer's state what it keeps."""
        whole = [view for view in views.values() if view.site.window is None]
        for pool in [whole, *([view] for view in views.values() if view.site.window is not None)]:
            if pool:
                self._rank(pool)
        shares = {}
        for layer, view in views.items():
            equal = keep_counts(self.budget, view.counts, self.protected, self.kept_whole).clamp(min=1)
            shares[layer] = view.state["kept"].float().mean(1) / equal
        return shares

    def score(self, view: CacheView) -> Tensor:
        if "ranking" not in view.state:
            self._rank([view])
        return view.state.pop("ranking")

    def head_budgets(self, view: CacheView, scores: Tensor, budgets: Tensor) -> Tensor | None:
        del scores, budgets
        return view.state["kept"]

    def _rank(self, views: list[CacheView]) -> None:
        """Write the joint ranking ``[B, Hs, N]`` and how many of it stay ``[B, Hs]`` into the state of each view."""
        total, fixed = torch.zeros_like(views[0].counts), []
        for view, rank in zip(views, self.rank(views), strict=True):
            view.state["ranking"] = rank.masked_fill(view.positions < 0, -torch.inf)
            fixed.append(view.state["ranking"].masked_fill(must_stay(self, view), torch.inf))
            total = total + self.room(view) * view.positions.shape[1]
        for view, place, rank in zip(views, places(fixed), fixed, strict=True):
            view.state["kept"] = (((place <= total[:, None, None]) | (rank == torch.inf)) & (rank > -torch.inf)).sum(-1)
