# SPDX-License-Identifier: Apache-2.0
"""MASA: the layers of a checkpoint share a few matrices for each of their projections, of which each is a sum.

Layers do alike things, so that their projections are near a space of few dimensions. Of each projection (Q, K, V, O)
the L weights of a group of layers become sums of S < L shared matrices, and what is left of a weight is kept as a
product of thin matrices.

Zhussip et al., Share Your Attention: Transformer Weight Sharing via Matrix-based Dictionary Learning (arXiv
2508.04581), its section on pretrained models.

    W_l ~ sum_s c_ls D_s + A_l B_l        D [S, out, in], c [L, S], A [out, R], B [R, in]
    D, c   principal components of the L weights as vectors ("Matrix PCA"): eigenvectors of their L x L Gram matrix
    A, B   the SVD of (W_l - sum_s c_ls D_s) C, C C^T the mean of x x^T, times C^-1
    groups consecutive layers, cut where what they would predict changes most: KL of the logit lens of the mean
           output of a block and of that of the next

Training such a model from scratch, the paper's main subject, is the mixer ``weight_sharing``.

Open in the text that we had and chosen here: how many ``groups`` and how much of the budget the shared matrices get
(``atoms``, of the layers of a group; the thin ones get the rest); what is left of Q and O has twice the rank of K and V
(the paper: "more"). With ``normalise`` weights are scaled to one norm for the components, which is ours: else those of
layers with small weights are the first to be given up. Encoders, which predict no text, are parted into equal groups.
``refine=false`` spends all on shared matrices. A group of one layer stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ..calls.calibration import Statistic, Statistics
from ..conversion import Anatomy, Share, SurgeryPlan, largest
from ..errors import UserError
from ._low_rank import ProjectionConversion, factors, whitener

__all__ = ["MASA", "cut_groups", "dictionary"]

_MORE = {"q": 2, "k": 1, "v": 1, "o": 2}  # rank of what is left
_ROUNDING = 1e-9
_OUTPUT = Statistic(
    "block.mean_output", "block", lambda before, after: after.sum((0, 1), dtype=torch.float64),
    lambda total, _, tokens: total / tokens,
)  # fmt: skip


def dictionary(weights: Tensor, atoms: int, normalise: bool = True) -> tuple[Tensor, Tensor]:
    """``D [S, out, in]`` and ``c [L, S]``, float64, whose sums are nearest to ``weights [L, out, in]``.

    Each matrix has the norm that weights have in the mean, so that a step of training changes it as it changes them:
    of components of norm 1 Adam's first steps would leave nothing.

    Args:
        weights: of L layers.
        atoms: S, at most L.
        normalise: nearest to weights of norm 1, each times its norm afterwards.
    """
    flat, tiny = weights.double().flatten(1), torch.finfo(torch.float64).tiny
    norms = flat.norm(dim=1, keepdim=True)
    sizes = norms if normalise else torch.ones_like(norms)
    flat = flat / sizes.clamp_min(tiny)
    vectors = torch.linalg.eigh(flat @ flat.mT).eigenvectors.flip(1)[:, :atoms]
    found = vectors.mT @ flat
    grown = norms.mean() / found.norm(dim=1)
    grown = torch.where(grown.isfinite() & (grown > 0), grown, 1.0)
    return (grown[:, None] * found).unflatten(1, weights.shape[1:]), sizes * vectors / grown


def cut_groups(distances: Sequence[float], groups: int) -> list[range]:
    """``len(distances) + 1`` layers in groups, cut at the largest distances between neighbours."""
    order = sorted(range(len(distances)), key=lambda i: (-distances[i], i))[: groups - 1]
    bounds = [0, *sorted(i + 1 for i in order), len(distances) + 1]
    return [range(a, b) for a, b in pairwise(bounds)]


@dataclass(frozen=True, kw_only=True)
class MASA(ProjectionConversion):
    """See the head of this file; ``keep`` and ``parts`` are those of the base."""

    atoms: float = field(
        default=0.3, metadata={"help": "shared matrices, as a share of a group's layers; the rest of keep is rank"}
    )
    groups: int = field(default=3, metadata={"help": "groups of layers in a row, each with its own matrices"})
    refine: bool = field(default=True, metadata={"help": "keep a low rank of what the sums leave"})
    normalise: bool = field(default=True, metadata={"help": "weights of all layers count alike, whatever their norm"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.atoms <= 1 or self.groups < 1:
            raise UserError("atoms is a share of the layers, above 0 and at most 1, and there is one group at least")

    def wants(self, model: Anatomy) -> Sequence[Statistic]:
        return (*(super().wants(model) if self.refine else ()), *((_OUTPUT,) if model.causal else ()))

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        count = len(model.layers)
        if self.groups > count:
            raise UserError(f"the model has {count} layers: ask for that many groups at most")
        if self.keep == 1 and self.refine:  # nothing has to go
            return SurgeryPlan(())
        groups = cut_groups(self._distances(model, stats), self.groups)
        places = [(part, group) for group in groups if len(group) > 1 for part in self.parts]
        if not self.refine:
            whole = sum(len(group) == 1 for group in groups)
            share = (self.keep * count - whole) / max(1, count - whole)  # of the layers of other groups
            if share * min((len(group) for _, group in places), default=1) < 1 - _ROUNDING and places:
                raise UserError(f"{self.spec} leaves a group less than one matrix: keep more, or ask for fewer groups")
            return SurgeryPlan(
                tuple(
                    self._shared(model, stats, (part, group), int(share * len(group) + _ROUNDING), 0)
                    for part, group in places
                )
            )
        target = model.parameters() - (1 - self.keep) * self.projections(model)
        number = {place: max(1, round(self.atoms * len(place[1]))) for place in places}

        def steps(rank: int) -> SurgeryPlan:
            return SurgeryPlan(tuple(self._bare(model, place, number[place], rank) for place in places))

        rank = largest(0, model.width, lambda r: model.parameters(steps(r)) <= target)
        return SurgeryPlan(
            tuple(
                self._shared(model, stats, place, number[place], self._bare(model, place, number[place], rank).rank)
                for place in places
            )
        )

    def _distances(self, model: Anatomy, stats: Statistics) -> list[float]:
        """Between neighbouring layers, as they part groups."""
        count = len(model.layers)
        if not model.causal:
            cuts = {round(i * count / self.groups) for i in range(1, self.groups)}
            return [float(i + 1 in cuts) for i in range(count - 1)]
        said = model.predicted(torch.stack(list(stats[_OUTPUT]))).double().log_softmax(-1)
        return [float((a.exp() * (a - b)).sum()) for a, b in pairwise(said)]

    def _bare(self, model: Anatomy, place: tuple[str, range], atoms: int, rank: int) -> Share:
        """The step without its tensors; a group with as many matrices as layers leaves nothing."""
        part, layers = place
        most = min(model.weight(part, layers[0]).shape)
        own = min(_MORE[part] * rank, most) if atoms < len(layers) else 0
        return Share(part=part, layers=tuple(layers), atoms=atoms, rank=own)

    def _shared(self, model: Anatomy, stats: Statistics, place: tuple[str, range], atoms: int, rank: int) -> Share:
        part, layers = place
        weights = _stacked(model, place)
        found, coefficients = dictionary(weights, atoms, self.normalise)
        tensors = {"atoms": found, "coefficients": coefficients}
        if rank:
            rest = weights.double() - torch.tensordot(coefficients, found, 1)
            roots = [whitener(self.moment(stats, part, i, weights)) for i in layers]
            pairs = [factors(w, rank, root) for w, root in zip(rest, roots, strict=True)]
            tensors |= {"left": torch.stack([a for a, _ in pairs]), "right": torch.stack([b for _, b in pairs])}
        return Share(part=part, layers=tuple(layers), atoms=atoms, rank=rank, tensors=tensors)


def _stacked(model: Anatomy, place: tuple[str, range]) -> Tensor:
    """Weights ``[L, out, in]`` of a projection of some layers."""
    part, layers = place
    weights = [model.weight(part, i) for i in layers]
    if len({w.shape for w in weights}) > 1:
        raise UserError(f"layers whose {part} differ in shape share nothing: convert the model before it is pruned")
    return torch.stack(weights)
