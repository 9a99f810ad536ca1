# SPDX-License-Identifier: Apache-2.0
"""What strategies that read maps of words share: places of words, maps of unlike grids, and masks of maps.

Shapes: maps ``[B, ..., h, w]``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import UserError

__all__ = ["check_words", "merged", "scaled"]


def check_words(tokens: Sequence[int], count: int, slug: str) -> None:
    """Refuse places that a prompt of ``count`` tokens does not have."""
    if min(tokens) < 0 or max(tokens) >= count:
        raise UserError(f"{slug}: the prompt has tokens 0 to {count - 1}, not {max(tokens, key=lambda t: (t < 0, t))}")


def merged(maps: Sequence[Tensor], size: Sequence[int] | None = None) -> Tensor:
    """Mean of maps of unlike grids, each cell of a coarse one repeated.

    Args:
        maps: ``[..., h, w]``, alike but for the grid.
        size: of the result; the largest grid among them when not given.
    """
    large = size or max((m.shape[-2:] for m in maps), key=lambda s: s[0] * s[1])
    flat = (interpolate(m.reshape(-1, 1, *m.shape[-2:]), size=tuple(large), mode="nearest") for m in maps)
    return torch.stack([x.reshape(*m.shape[:-2], *large) for x, m in zip(flat, maps, strict=True)]).mean(0)


def scaled(maps: Tensor) -> Tensor:
    """Maps whose least value of a row of the batch is 0 and whose greatest is 1."""
    flat = maps.flatten(1)
    low, high = (x.reshape(-1, *[1] * (maps.ndim - 1)) for x in (flat.amin(1), flat.amax(1)))
    return (maps - low) / (high - low + 1e-8)
