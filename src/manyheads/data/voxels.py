# SPDX-License-Identifier: Apache-2.0
"""Voxel objects and edits of them by instruction, each with its one exact result.

An object is one to three boxes and ellipsoids, of random size, place and rotation, on a grid of ``side^3`` voxels whose
axes are x, y and z (up). Its edits are

    add       a cube of a quarter of the side on top, centred over the object's highest layer
    delete    what lies on the +x side of the middle of the object's bounding box
    hollow    the inside: voxels whose six neighbours are all filled
    grow      one voxel in each of the six directions

All four change every object that is drawn and stay within the grid, and the instruction is drawn apart from the object,
so that neither a source nor an instruction by itself tells the target. Objects are parted by a hash of their voxels:
one that is judged is never trained on.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Generator, Tensor

from ..errors import UserError

__all__ = ["INSTRUCTIONS", "Edits", "Instruction", "Split", "draw", "edited", "held_out", "inside", "spread", "targets"]

Instruction = Literal["add", "delete", "hollow", "grow"]
INSTRUCTIONS: tuple[Instruction, ...] = get_args(Instruction)
Split = Literal["train", "test"]
_PARTS, _JUDGED = 3, 8  # parts of an object at most; one object of so many is judged
_AT_ONCE = 2048  # objects drawn at once
_LEAST = 6  # side of the smallest grid: objects leave room for what is added
_PRIME, _FACTOR = 2_147_483_647, 48_271


class Edits(NamedTuple):
    """Objects and what is to become of them.

    Attributes:
        source, target: bool ``[N, S, S, S]``.
        instruction: int64 ``[N]``, numbers of :data:`INSTRUCTIONS`.
    """

    source: Tensor
    instruction: Tensor
    target: Tensor


def _neighbours(voxels: Tensor) -> Tensor:
    """The six neighbours ``[6, N, S, S, S]``; beyond the grid nothing is filled."""
    padded = torch.nn.functional.pad(voxels, (1,) * 6)
    side, found = voxels.shape[-1], []
    for axis in (1, 2, 3):
        middle = padded
        for other in {1, 2, 3} - {axis}:
            middle = middle.narrow(other, 1, side)
        found += [middle.narrow(axis, 0, side), middle.narrow(axis, 2, side)]
    return torch.stack(found)


def spread(voxels: Tensor) -> Tensor:
    """Voxels ``[N, S, S, S]`` and their six neighbours."""
    return voxels | _neighbours(voxels).any(0)


def inside(voxels: Tensor) -> Tensor:
    """Those whose six neighbours are all filled; none at the edge of the grid."""
    return voxels & _neighbours(voxels).all(0)


def _along(voxels: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """First and last place with a voxel on an axis (0 to 2), int64 ``[N]``."""
    there = voxels.movedim(axis + 1, 1).flatten(2).any(2).long()
    return there.argmax(1), there.shape[1] - 1 - there.flip(1).argmax(1)


def _added(voxels: Tensor) -> Tensor:
    side = voxels.shape[-1]
    cube, at = max(2, side // 4), torch.arange(side, device=voxels.device)
    top = _along(voxels, 2)[1]
    layer = voxels.gather(3, top[:, None, None, None].expand(-1, side, side, 1))[..., 0]
    weight, found = layer.sum((1, 2)).clamp(min=1), []
    for axis in (1, 2):
        middle = (layer.sum(3 - axis) * at).sum(1) / weight
        first = (middle - (cube - 1) / 2 + 0.5).floor().clamp(0, side - cube)
        found.append((at >= first[:, None]) & (at < first[:, None] + cube))
    tall = (at > top[:, None]) & (at <= top[:, None] + cube)
    return voxels | (found[0][:, :, None, None] & found[1][:, None, :, None] & tall[:, None, None, :])


def edited(voxels: Tensor, instruction: Instruction) -> Tensor:
    """What becomes of objects ``[N, S, S, S]`` under one instruction.

    Raises:
        UserError: another instruction, or no such grid.
    """
    if voxels.ndim != 4 or voxels.dtype != torch.bool or len(set(voxels.shape[1:])) != 1:
        raise UserError(f"objects are bool [N, S, S, S], not {voxels.dtype} {list(voxels.shape)}")
    if instruction == "add":
        return _added(voxels)
    if instruction == "delete":
        first, last = _along(voxels, 0)
        at = torch.arange(voxels.shape[1], device=voxels.device)
        return voxels & (2 * at[None, :] <= (first + last)[:, None])[:, :, None, None]
    if instruction == "hollow":
        return voxels & ~inside(voxels)
    if instruction == "grow":
        return spread(voxels)
    raise UserError(f"there is no instruction {instruction!r}; there are {', '.join(INSTRUCTIONS)}")


def held_out(voxels: Tensor) -> Tensor:
    """Whether objects are among those that are judged, bool ``[N]``; told by their voxels alone."""
    count, weights, weight = voxels[0].numel(), [], 1
    for _ in range(count):
        weight = weight * _FACTOR % _PRIME
        weights.append(weight)
    table = torch.tensor(weights, device=voxels.device)
    return (voxels.flatten(1) * table).sum(1) % _PRIME % _JUDGED == 0


def _objects(count: int, side: int, generator: Generator, device: torch.device) -> Tensor:
    """Objects, some of which may be too small to be edited."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(count, _PARTS, *shape, generator=generator).to(device)

    cube = max(2, side // 4)
    low = torch.tensor([1.0, 1.0, 1.0], device=device)  # the outermost layer is kept free, and room on top
    high = torch.tensor([side - 2.0, side - 2.0, side - 1.0 - cube], device=device)
    half = side * (0.14 + 0.2 * uniform(3))
    centre = low + (0.25 + 0.5 * uniform(3)) * (high - low)
    turn = torch.linalg.qr(torch.randn(count, _PARTS, 3, 3, generator=generator))[0].to(device)
    kind, there = uniform() < 0.5, uniform() < torch.tensor([1.0, 0.6, 0.3], device=device)
    at = torch.stack(torch.meshgrid(*[torch.arange(side, device=device)] * 3, indexing="ij"), -1).float()
    offset = at.flatten(0, 2) - centre[:, :, None]
    scaled = offset @ turn / half[:, :, None]
    filled = torch.where(kind[..., None], scaled.abs().amax(-1), scaled.norm(dim=-1)) <= 1
    filled &= there[..., None]
    room = ((at >= low) & (at <= high)).all(-1)
    anywhere: Tensor = filled.any(1).unflatten(1, (side,) * 3)
    return anywhere & room


def draw(
    count: int, side: int, generator: Generator, split: Split = "train", device: torch.device | str = "cpu"
) -> Edits:  # fmt: skip
    """Draw ``count`` edits.

    Args:
        count: N.
        side: S of the grid.
        generator: on the CPU.
        split: objects that are trained on, or those that are judged.
        device: where they are put together.
    """
    if side < _LEAST or count < 1:
        raise UserError(f"a grid has a side of at least {_LEAST}, and there is at least one object")
    found, there = [], 0
    while there < count:
        tried = 2 * (count - there) * (_JUDGED if split == "test" else 1)
        some = _objects(min(max(32, tried), _AT_ONCE), side, generator, torch.device(device))
        fit = inside(some).flatten(1).any(1)  # and then the other edits change it too
        fit &= held_out(some) == (split == "test")
        found.append(some[fit])
        there += len(found[-1])
    source = torch.cat(found)[:count]
    instruction = torch.randint(len(INSTRUCTIONS), (count,), generator=generator).to(source.device)
    return Edits(source, instruction, targets(source)[torch.arange(count, device=source.device), instruction])


def targets(source: Tensor) -> Tensor:
    """All edits of objects, bool ``[N, 4, S, S, S]``, in the order of :data:`INSTRUCTIONS`."""
    return torch.stack([edited(source, name) for name in INSTRUCTIONS], 1)
