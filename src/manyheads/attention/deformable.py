# SPDX-License-Identifier: Apache-2.0
r"""Deformable attention over feature maps of several scales (Deformable DETR, arXiv 2010.04159).

A query looks at a few points of each map, whose places and weights it says itself:

    out[q, h] = sum_{l, p} A[q, h, l, p] V_l,h(phi_l(ref[q] + offset[q, h, l, p])),   A sums to 1 over levels and points

``V_l(x)`` is the map between its cells' centres, by bilinear interpolation, and 0 outside of it.

Legend: B batch, Q queries, H heads, L levels, P points, N cells of all maps one after the other, row by row, d head
dimension. Places are (x, y), 0 the left and upper edge of a map, 1 the right and lower one, on all levels alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample

from .reference import widened

__all__ = ["DeformableAttention", "Shapes", "dense_weights", "received", "sampled"]

Shapes = Sequence[tuple[int, int]]  # height and width of each level


def sampled(value: Tensor, shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    """``[B, Q, H, d]`` of ``value [B, N, H, d]`` at ``places [B, Q, H, L, P, 2]`` with ``weights [B, Q, H, L, P]``.

    In the dtype of ``places``, float32 or more: of a wide map bfloat16 would not tell neighbours apart.
    """
    batch, _, heads, size = value.shape
    found = []
    maps = value.split([height * width for height, width in shapes], 1)
    for level, ((height, width), held) in enumerate(zip(shapes, maps, strict=True)):
        cells = held.permute(0, 2, 3, 1).reshape(batch * heads, size, height, width)
        grid = 2 * places[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        found.append(grid_sample(cells.to(grid.dtype), grid, padding_mode="zeros", align_corners=False))
    points = torch.stack(found, -2).flatten(-2)  # [B H, d, Q, L P]
    shares = weights.transpose(1, 2).flatten(0, 1).flatten(2)[:, None]
    made: Tensor = (points * shares).sum(-1).unflatten(0, (batch, heads)).permute(0, 3, 1, 2)
    return made


def _hats(at: Tensor, count: int) -> Tensor:
    """What each of ``count`` cells in a row counts at places ``at [...]``, linearly: ``[..., count]``."""
    centres = torch.arange(count, device=at.device, dtype=at.dtype) + 0.5
    return (1 - (at[..., None] * count - centres).abs()).clamp(min=0)


def dense_weights(shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    """The same attention as a matrix ``[B, H, Q, N]``: times the values it is :func:`sampled`, by its formula."""
    return _weighed("bqhpy,bqhpx,bqhp->bhqyx", shapes, places, weights)


def received(shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    """Attention that each cell gets of all queries and heads together, ``[B, N]``; the matrix is not made."""
    return _weighed("bqhpy,bqhpx,bqhp->byx", shapes, places, weights)


def _weighed(sums: str, shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    found = []
    for level, (height, width) in enumerate(shapes):
        at = places[:, :, :, level]
        rows, columns = _hats(at[..., 1], height), _hats(at[..., 0], width)
        found.append(torch.einsum(sums, rows, columns, weights[:, :, :, level]).flatten(-2))
    return torch.cat(found, -1)


class DeformableAttention(nn.Module):
    """The attention with its projections, begun as in the paper: points go out from a query, each head its own way.

    Attributes:
        show: whether ``shown``, what each cell received ``[B, N]``, is kept of a forward.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.offsets = nn.Linear(dim, heads * levels * points * 2)
        self.weights = nn.Linear(dim, heads * levels * points)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.show, self.shown = False, torch.empty(0)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weights.weight)
        nn.init.zeros_(self.weights.bias)
        angle = torch.arange(heads) * (2 * math.pi / heads)
        ways = torch.stack((angle.cos(), angle.sin()), -1)
        ways = (ways / ways.abs().max(-1, keepdim=True).values)[:, None, None]
        steps = torch.arange(1, points + 1)[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_((ways * steps).expand(-1, levels, -1, -1).flatten())

    def forward(self, q: Tensor, reference: Tensor, x: Tensor, there: Tensor, shapes: Shapes) -> Tensor:
        """``[B, Q, D]``.

        Args:
            q: queries with their positions, ``[B, Q, D]``.
            reference: points ``[B, Q, 2]``, from which offsets count cells, or boxes ``[B, Q, 4]`` (centre, width,
                height), from which P offsets count halves of the box.
            x: the maps, ``[B, N, D]``; those of them that are not ``there [B, N]`` are 0.
            shapes: of the maps.
        """
        places, weights = self.looks(q, reference, shapes)
        if self.show:
            self.shown = received(shapes, places, weights).detach()
        value = self.value(x).masked_fill(~there[..., None], 0.0).unflatten(-1, (self.heads, -1))
        made: Tensor = self.out(sampled(value, shapes, places, weights).flatten(2).to(x.dtype))
        return made

    def looks(self, q: Tensor, reference: Tensor, shapes: Shapes) -> tuple[Tensor, Tensor]:
        """Places and weights, ``[B, Q, H, L, P, 2]`` and ``[B, Q, H, L, P]``."""
        each = (self.heads, self.levels, self.points)
        offsets = widened(self.offsets(q)).unflatten(-1, (*each, 2))
        if reference.shape[-1] == 2:
            sizes = offsets.new_tensor([(width, height) for height, width in shapes])
            offsets = offsets / sizes[:, None]
        else:
            offsets = offsets / self.points * reference[:, :, None, None, None, 2:] / 2
        weights = widened(self.weights(q)).unflatten(-1, (self.heads, -1)).softmax(-1).unflatten(-1, each[1:])
        return reference[:, :, None, None, None, :2] + offsets, weights
