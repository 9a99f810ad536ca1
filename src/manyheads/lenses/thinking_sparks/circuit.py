# SPDX-License-Identifier: Apache-2.0
"""Circuits out of edge scores, the heads in them, and what two checkpoints of one model differ in.

A head's importance is what its edges in a prompt's circuit score, as a share of all heads' (the paper's I~); the effect
of post-training on it is ``E = (I_post - I_base) / (I_post + I_base)``, from -1, left alone, to 1, new. A head is
*emergent* if it stands in the circuit of the post-trained model and not in that of the base, *retained* if in both,
*lost* if in the base's alone. Sizes: N prompts, U writers, R readers, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UserError
from ...heads import HeadTable
from ...lens import table_of
from .attribution import Pair, PairRuns
from .graph import Graph

__all__ = ["Circuit", "HeadChange", "attribute", "cohorts", "compared", "effect", "strongest"]

_TINY = 1e-6  # the paper's, beside the sum of two importances


def strongest(graph: Graph, scores: Tensor, edges: int, threshold: float = 0.0) -> Tensor:
    """The edges of a circuit, bool ``[U, R]``: the ``edges`` of greatest magnitude, without nodes that lead nowhere.

    Args:
        graph: of the model.
        scores: ``[U, R]``.
        edges: n.
        threshold: share of the greatest magnitude below which none is kept.
    """
    size = scores.detach().cpu().abs() * graph.edges
    order = size.flatten().topk(min(edges, int(graph.edges.sum()))).indices
    kept = torch.zeros(size.numel(), dtype=torch.bool)
    kept[order] = True
    kept = kept.view_as(size) & (size > 0) & (size >= threshold * size.max())
    while True:
        fed = (graph.feeds & kept.any(0)[:, None]).any(0)
        fed[0] = True  # the embeddings
        leads = (graph.feeds & kept.any(1)).any(1)
        leads[-1] = True  # the logits
        left = kept & fed[:, None] & leads
        if torch.equal(left, kept):
            return kept
        kept = left


@dataclass(frozen=True)
class Circuit:
    """Edge scores of a model over prompts.

    Attributes:
        graph: its writers and readers.
        scores: float32 ``[N, U, R]`` on the CPU.
        losses: what the corrupted runs lose, nats.
        edges, threshold: of :func:`strongest`.
    """

    graph: Graph
    scores: Tensor
    losses: tuple[float, ...]
    edges: int
    threshold: float = 0.0

    @property
    def kept(self) -> Tensor:
        """The circuit by the mean magnitude over the prompts, bool ``[U, R]``."""
        return strongest(self.graph, self.scores.abs().mean(0), self.edges, self.threshold)

    @property
    def heads(self) -> frozenset[str]:
        """``layer.head`` of those in it."""
        used = self.kept.any(1)
        names, _ = self.graph.names()
        return frozenset(name for name, inside in zip(names, used.tolist(), strict=True) if inside and "." in name)

    def importance(self) -> HeadTable:
        """I~ of each prompt, in its own circuit: ``[N, L, H]``, each prompt's heads adding up to 1."""
        each = [s.abs() * strongest(self.graph, s, self.edges, self.threshold) for s in self.scores]
        return self._table("share of the circuit's scores", torch.stack(each).sum(2), normalised=True)

    def magnitude(self) -> HeadTable:
        """The same of all edges, circuit or not."""
        return self._table("share of the scores of all edges", self.scores.abs().sum(2), normalised=True)

    def worth(self) -> HeadTable:
        """What corrupting a head would cost, to the first order: its edges' scores added up, nats ``[N, L, H]``."""
        return self._table("loss by corruption, estimated, in nats", -self.scores.sum(2), normalised=False)

    def _table(self, name: str, values: Tensor, normalised: bool) -> HeadTable:
        layers = self.graph.layers
        rows = [values[:, layer.sources : layer.sources + layer.heads].double().numpy() for layer in layers]
        if normalised:
            total = np.concatenate(rows, 1).sum(1, keepdims=True)
            rows = [row / np.maximum(total, 1e-30) for row in rows]
        return table_of(name, [layer.site for layer in layers], rows, edges=self.edges, share=normalised)


def attribute(
    model: nn.Module, use: Callable[..., Any], pairs: Sequence[Pair], *, edges: int = 5000, threshold: float = 0.0,
    steps: int = 5, on_pair: Callable[[int], None] | None = None,
) -> Circuit:  # fmt: skip
    """Edge scores of a model over pairs of prompts.

    Args:
        model: as for :class:`.attribution.PairRuns`.
        use: :func:`manyheads.use`.
        pairs: of prompts.
        edges, threshold: of the circuit.
        steps: m; 0 is EAP.
        on_pair: receives how many pairs are done.

    Raises:
        UserError: no pair is given.
    """
    if not pairs:
        raise UserError(
            "no pair of prompts is left: both are answered alike, or too briefly; give more prompts, or more tokens"
        )
    scores, losses = [], []
    for i, pair in enumerate(pairs):
        runs = PairRuns(model, use, pair)
        scores.append(runs.scores(steps).float().cpu())
        losses.append(runs.loss)
        if on_pair:
            on_pair(i + 1)
    return Circuit(runs.graph, torch.stack(scores), tuple(losses), edges, threshold)


@dataclass(frozen=True)
class HeadChange:
    """How the heads of a post-trained model differ from its base's, ``layer.head`` each.

    Attributes:
        effect: E.
        emergent: most important to the post-trained model first.
        retained: likewise.
        lost: most important to the base first.
    """

    effect: HeadTable
    emergent: tuple[str, ...]
    retained: tuple[str, ...]
    lost: tuple[str, ...]


def effect(base: HeadTable, post: HeadTable) -> HeadTable:
    """E of mean importances, ``[1, L, H]``; 0 for a head that neither has."""
    before, after = base.mean, post.mean
    values = (after - before) / (after + before + _TINY)
    about = {**post.about, "share": False}
    return HeadTable("effect of post-training", post.sites, values[None], about, post.layers)


def compared(base: Circuit, post: Circuit) -> HeadChange:
    """What two checkpoints of one model differ in.

    Raises:
        UserError: their heads are not the same.
    """
    if base.graph.names() != post.graph.names():
        raise UserError("the models differ in layers or heads: compare two checkpoints of one model")
    before, after = base.importance(), post.importance()

    def ordered(table: HeadTable, heads: frozenset[str]) -> tuple[str, ...]:
        return tuple(name for name in table.names(table.top(table.mean.size)) if name in heads)

    return HeadChange(
        effect(before, after), ordered(after, post.heads - base.heads), ordered(after, post.heads & base.heads),
        ordered(before, base.heads - post.heads),
    )  # fmt: skip


def cohorts(base: frozenset[str], later: Sequence[frozenset[str]]) -> list[list[int]]:
    """For each checkpoint, how many heads of its circuit are there since: ``[C][C + 1]``.

    Entry 0 counts heads of the base's circuit, entry ``c + 1`` those that no earlier circuit had than that of
    checkpoint c. Later columns are 0.
    """
    since = dict.fromkeys(base, 0)
    made = []
    for c, heads in enumerate(later):
        for head in heads:
            since.setdefault(head, c + 1)
        made.append([sum(since[head] == first for head in heads) for first in range(len(later) + 1)])
    return made
