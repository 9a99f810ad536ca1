# SPDX-License-Identifier: Apache-2.0
"""Projections of attention as products of thin matrices: the baselines of conversions that factorise or share them.

    svd       the truncated SVD of each weight W ``[out, in]``
    whitened  of W S, S S^T being the mean of ``x x^T`` over inputs: SVD-LLM's (arXiv 2403.07378), without its update
              of the left factors
    basis     ``group`` layers in a row read with one basis: the whitened SVD of their weights upon each other, by the
              mean of their inputs; Basis Sharing (arXiv 2410.03765). The output projection has a basis in every layer,
              as there.

A weight keeps the rank at which ``keep`` of its parameters stay, the same in every layer; with ``keep=1`` it stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..calls.calibration import Statistic, Statistics
from ..conversion import Anatomy, Factorise, SurgeryPlan
from ..errors import UserError
from ._low_rank import ProjectionConversion, factors, rank_for, whitener

__all__ = ["LowRankAttention"]


@dataclass(frozen=True, kw_only=True)
class LowRankAttention(ProjectionConversion):
    """See the head of this file; ``keep`` and ``parts`` are those of the base."""

    method: str = field(default="whitened", metadata={"help": "svd, whitened or basis"})
    group: int = field(default=2, metadata={"help": "layers in a row that share a basis, with method=basis"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("svd", "whitened", "basis"):
            raise UserError(f"method is svd, whitened or basis, not {self.method!r}")
        if self.group < 1:
            raise UserError("a group has one layer at least")

    def wants(self, model: Anatomy) -> Sequence[Statistic]:
        return () if self.method == "svd" or self.keep == 1 else super().wants(model)

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        if self.keep == 1:  # thin matrices of as many parameters would have about half the rank
            return SurgeryPlan(())
        count = len(model.layers)
        steps: list[Factorise] = []
        for part in self.parts:
            size = self.group if self.method == "basis" and part != "o" else 1
            for first in range(0, count, size):
                steps += self._factorised(model, stats, part, range(first, min(first + size, count)))
        return SurgeryPlan(tuple(steps))

    def _factorised(self, model: Anatomy, stats: Statistics, part: str, layers: range) -> Iterator[Factorise]:
        weights = [model.weight(part, i) for i in layers]
        root = None
        if self.method != "svd":
            root = whitener(torch.stack([self.moment(stats, part, i, weights[0]) for i in layers]).mean(0))
        whole = torch.cat(weights)
        out, inside = whole.shape
        rank = rank_for(self.keep, out, inside)
        left, right = factors(whole, rank, root)
        for i, own in zip(layers, left.split([len(w) for w in weights]), strict=True):
            tensors = {"left": own, "right": right} if i == layers[0] else {"left": own}
            yield Factorise(part=part, layer=i, rank=rank, reads=None if i == layers[0] else layers[0], tensors=tensors)
