# SPDX-License-Identifier: Apache-2.0
"""How near edited voxel objects are to the one exact result, where the edit changes something and where it does not."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...data.voxels import Edits, spread, targets

__all__ = ["chamfer", "followed", "iou", "judge"]


def iou(found: Tensor, target: Tensor, within: Tensor) -> Tensor:
    """Intersection over union of voxels in a region, ``[N]``; 1 where both are empty. All ``[N, S, S, S]``."""
    both, either = ((x & within).flatten(1).sum(1) for x in (found & target, found | target))
    return torch.where(either == 0, 1.0, both / either.clamp(min=1))


def chamfer(found: Tensor, target: Tensor) -> float:
    """Mean distance to the nearest voxel of the other, the mean of both ways; ``[S, S, S]``.

    Where one is empty the diagonal of the grid, where both are, 0.
    """
    first, second = (x.nonzero().float() for x in (found, target))
    if not min(len(first), len(second)):
        return math.sqrt(3) * found.shape[0] if max(len(first), len(second)) else 0.0
    apart = torch.cdist(first, second)
    return float(apart.amin(0).mean() + apart.amin(1).mean()) / 2


def followed(found: Tensor, edits: Edits) -> Tensor:
    """Whether outputs ``[N, S, S, S]`` are nearer to what was asked than to all else that could be, bool ``[N]``."""
    others = torch.cat([targets(edits.source), edits.source[:, None]], 1)
    wrong = (others ^ found[:, None]).flatten(2).sum(2)
    asked = wrong.gather(1, edits.instruction[:, None])
    return (wrong <= asked).sum(1) == 1


def judge(found: Tensor, edits: Edits) -> Iterator[dict[str, float]]:
    """Figures of outputs, an edit after the other."""
    changed = edits.source ^ edits.target
    inner, kept = iou(found, edits.target, spread(changed)), iou(found, edits.target, ~changed)
    right, exact = followed(found, edits), (found == edits.target).flatten(1).all(1)
    for i in range(len(found)):
        yield {
            "edited_iou": float(inner[i]), "kept_iou": float(kept[i]),
            "kept_chamfer": chamfer(found[i] & ~changed[i], edits.target[i] & ~changed[i]),
            "followed": float(right[i]), "exact": float(exact[i]),
        }  # fmt: skip
