# SPDX-License-Identifier: Apache-2.0
"""Factors of matrices that lose least of what they give for the inputs at hand, and what such conversions share.

For inputs with mean ``E[x x^T] = S S^T`` the mean squared change of ``W x`` is ``|(W - W') S|^2``, so that the best
``W'`` of a rank is the truncated SVD of ``W S`` times ``S^-1``: SVD-LLM's whitening (Wang et al., arXiv 2403.07378),
with the symmetric root, which few tokens cannot break, for its Cholesky factor: any root gives the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor

from ..calls.calibration import Statistic, Statistics, gram
from ..conversion import Anatomy, Conversion
from ..errors import UserError

__all__ = ["READS", "ProjectionConversion", "factors", "product_factors", "rank_for", "whitener"]

_LEAST = 1e-6  # of the mean square of a channel: what a direction counts at least
_ATTENTION, _HEADS = gram("attention"), gram("heads")
READS = {"q": _ATTENTION, "k": _ATTENTION, "v": _ATTENTION, "o": _HEADS}  # what is known of what a projection reads


def whitener(moment: Tensor) -> Tensor:
    """S, symmetric float64 ``[C, C]`` with ``S S = moment``; directions that are hardly used count a little."""
    values, vectors = torch.linalg.eigh(moment.double())
    root: Tensor = vectors * values.clamp_min(_LEAST * values.mean()).sqrt() @ vectors.mT
    return root


def factors(weight: Tensor, rank: int, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``left [out, rank]`` and ``right [rank, in]``, float64, nearest to ``weight [out, in]``; as whitened by ``root``.

    What is above ``min(out, in)`` of a rank is zeros.
    """
    weight = weight.double()
    u, s, vh = torch.linalg.svd(weight if root is None else weight @ root, full_matrices=False)
    rest = max(0, rank - len(s))
    left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank]
    if root is not None:  # right S^-1
        right = torch.linalg.solve(root, right.mT).mT
    pad = torch.nn.functional.pad
    return pad(left, (0, rest)), pad(right, (0, 0, 0, rest))


def rank_for(keep: float, out: int, inside: int) -> int:
    """The largest rank at which two thin matrices have at most ``keep`` of the parameters of ``[out, inside]``.

    Raises:
        UserError: not even rank 1 has so few; the message has the least share.
    """
    rank = int(keep * out * inside / (out + inside))
    if not rank:
        least = ceil(1000 * (out + inside) / (out * inside)) / 1000
        raise UserError(f"rank 1 of {out} x {inside} has more than {keep:g} of its parameters: keep {least:g} or more")
    return rank


def product_factors(
    a: Tensor, b: Tensor, root_a: Tensor | None = None, root_b: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of ``a^T b``, or of ``S_a a^T b S_b``, with the roots of singular values on both sides.

    Args:
        a: ``[d, C]``, float64; perhaps with leading dimensions, as ``b``.
        b: ``[d, E]``.
        root_a, root_b: S of each side, symmetric; none where None.

    Returns:
        ``a' [d, C]``, ``b' [d, E]`` and singular values ``[d]`` from the largest (fewer where C or E is less than d):
        the first r rows are the best of rank r, and all of them give ``a^T b``.
    """
    left, right = a if root_a is None else a @ root_a, b if root_b is None else b @ root_b
    (qa, ra), (qb, rb) = torch.linalg.qr(left.mT), torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(ra @ rb.mT, full_matrices=False)
    one, other = (qa @ u * s.sqrt()[..., None, :]).mT, s.sqrt()[..., None] * (vh @ qb.mT)
    if root_a is not None:
        one = torch.linalg.solve(root_a, one.mT).mT
    if root_b is not None:
        other = torch.linalg.solve(root_b, other.mT).mT
    return one, other, s


@dataclass(frozen=True, kw_only=True)
class ProjectionConversion(Conversion):
    """Base: which projections of attention are changed, and how many of their parameters stay; all with ``keep=1``."""

    families: ClassVar[frozenset[str]] = frozenset({"llama", "gemma", "bert", "vit", "dinov2"})  # q, k, v of their own

    keep: float = field(default=0.8, metadata={"help": "share of the parameters of these projections that stays"})
    parts: str = field(default="qkvo", metadata={"help": "projections that are changed, of q, k, v and o"})

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UserError("keep is a share, above 0 and at most 1")
        if not self.parts or set(self.parts) - set("qkvo") or len(set(self.parts)) < len(self.parts):
            raise UserError(f"parts are of q, k, v and o, each once, not {self.parts!r}")

    def wants(self, model: Anatomy) -> Sequence[Statistic]:
        return tuple({READS[part].name: READS[part] for part in self.parts}.values())

    def projections(self, model: Anatomy) -> int:
        """Their parameters, biases apart."""
        return sum(model.weight(part, i).numel() for part in self.parts for i in range(len(model.layers)))

    @staticmethod
    def moment(stats: Statistics, part: str, layer: int, like: Tensor) -> Tensor:
        """``E[x x^T]`` of what a projection reads, on the device of ``like``."""
        return stats[READS[part]][layer].to(like.device)
