# SPDX-License-Identifier: Apache-2.0
"""What strategies that use maps share: places of words, maps of unlike grids, masks of maps, and a blur.

Shapes: maps ``[B, ..., h, w]``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, interpolate, pad

from ..call import AttentionCall, Layout
from ..errors import UserError

__all__ = ["blur", "check_words", "grid_of", "merged", "scaled", "select_queries", "to_grid"]


def blur(x: Tensor, sigma: float, size: int) -> Tensor:
    """Gaussian blur of the last two axes by a kernel of ``size`` (odd) with reflected borders."""
    if sigma <= 0 or size <= 1:
        return x
    reach = torch.arange(size, device=x.device, dtype=torch.float64) - size // 2
    weight = torch.exp(-0.5 * (reach / sigma) ** 2)
    weight = (weight / weight.sum()).to(x.dtype)
    flat: Tensor = x.reshape(-1, 1, *x.shape[-2:])
    for axis in (0, 1):
        kernel = weight.reshape(1, 1, -1, 1) if axis == 0 else weight.reshape(1, 1, 1, -1)
        left = size // 2
        length = flat.shape[2 + axis]
        while left > 0:  # a reflection reaches no farther than the image
            step = min(left, length - 1)
            if step == 0:
                break
            flat = pad(flat, (0, 0, step, step) if axis == 0 else (step, step, 0, 0), mode="reflect")
            left, length = left - step, length + 2 * step
        if left:
            flat = pad(flat, (0, 0, left, left) if axis == 0 else (left, left, 0, 0), mode="replicate")
        flat = conv2d(flat, kernel)
    return flat.reshape(x.shape)


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


def grid_of(layout: Layout, length: int, batch: int) -> tuple[int, int, int, int] | None:
    """Frames in rows of the batch, frames, rows and columns among ``length`` tokens; None where they are no image."""
    if length == layout.tokens:
        return 1, layout.frames, layout.height, layout.width
    size = layout.grid(length)
    return None if size is None or batch % layout.frames else (layout.frames, 1, *size)


def to_grid(x: Tensor, grid: tuple[int, int, int, int]) -> Tensor:
    """``[B, H, T, C]`` as ``[rows, H, C, frames, h, w]``."""
    x = x.unflatten(2, grid[1:]).unflatten(0, (-1, grid[0]))  # [rows, frames, H, frames, h, w, C], one frames is 1
    return x.permute(0, 2, 6, 1, 3, 4, 5).flatten(3, 4)


def select_queries(call: AttentionCall, at: Tensor | slice) -> AttentionCall:
    """The call with some of its queries only."""
    mask, bias = (x if x is None or x.shape[-2] == 1 else x[..., at, :] for x in (call.allowed(), call.bias))
    return call.replace(q=call.q[:, :, at], mask=mask, bias=bias, is_causal=False)
