# SPDX-License-Identifier: Apache-2.0
"""Small scenes that move, filmed by any camera: every pixel and every depth is exact.

A scene is a wall of smooth colours across the view and discs before it, all facing the first camera; discs move. What
is further is paler, all discs are of one size and all walls of one coarseness, so that a picture tells depth as far as
pictures do. A *shot* is filmed by a camera that stands still, and is to be filmed by one that goes around a point, each
frame a part of the way further; with it comes what a user would have of the new path: the source rendered along it by
a depth that is wrong by a factor for the whole video and another at every pixel, down-sampled.
"""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ..errors import UserError
from .cameras import orbit, rays, render, shrunk

__all__ = ["AWAY", "PITCH", "PIVOT", "YAW", "Scenes", "Shots", "aimed", "depths", "draw", "film", "path", "scenes"]

PIVOT = 3.0  # depth of the point that cameras go around
YAW, PITCH, AWAY = 30.0, 20.0, 0.25  # the ends of a path at most: degrees, degrees, share of the distance
_DISCS, _RADIUS = 2, 0.55
_COARSE = 3.2  # length of a wave on the wall
_PALER, _SAMPLES = 0.3, 2  # of an object a unit further; rays of a pixel along each axis
_FACTOR, _GRAIN = 0.2, 0.03  # standard deviations of the logarithm of an estimated depth: of videos, of pixels


class Scenes(NamedTuple):
    """N scenes, in the world of the first camera.

    Attributes:
        wall: depth ``[N]``.
        waves: of the wall's colours, wave numbers ``[N, 2, 2]``.
        phases: ``[N, 3, 2]``, of the three colours.
        depth: of discs, ``[N, K]``.
        place, speed: of their centres at the first frame and from there to the last, ``[N, K, 2]``.
        colour: ``[N, K, 3]``, in -1 to 1.
    """

    wall: Tensor
    waves: Tensor
    phases: Tensor
    depth: Tensor
    place: Tensor
    speed: Tensor
    colour: Tensor

    def part(self, rows: Tensor | slice) -> "Scenes":
        """Some of them."""
        return Scenes(*(x[rows] for x in self))


class Shots(NamedTuple):
    """What is filmed and what is to be; videos ``[N, 3, F, S, S]`` in -1 to 1.

    Attributes:
        source, target: videos.
        depth: of the source, ``[N, F, S, S]``.
        cameras: of the target, ``[N, F, 3, 4]``.
        proxy: the source rendered from there by an estimated depth, ``[N, 3, F, S / times, S / times]``.
        ends: of the path, pitch, yaw and distance, ``[N, 3]``.
    """

    source: Tensor
    target: Tensor
    depth: Tensor
    cameras: Tensor
    proxy: Tensor
    ends: Tensor


def scenes(count: int, generator: Generator, device: torch.device | str = "cpu") -> Scenes:
    """Draw ``count`` scenes."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(count, *shape, generator=generator)).to(device)

    angle, depth = uniform(0, math.tau, 2), uniform(1.7, 2.7, _DISCS)
    length = math.tau / _COARSE * torch.tensor([1.0, 1.7], device=device)
    waves = torch.stack([angle.cos(), angle.sin()], -1) * length[:, None]
    place = uniform(-0.3, 0.3, _DISCS, 2) * depth[..., None]  # in the picture wherever a disc stands
    return Scenes(
        uniform(3.4, 4.6), waves, uniform(0, math.tau, 3, 2), depth, place, uniform(-0.4, 0.4, _DISCS, 2),
        uniform(-1, 1, _DISCS, 3).sign() * uniform(0.5, 1, _DISCS, 3),
    )  # fmt: skip


def film(given: Scenes, poses: Tensor, side: int, samples: int = _SAMPLES) -> Tensor:
    """Videos ``[N, 3, F, S, S]`` from cameras ``[N, F, 3, 4]``; frame f is at the time f / (F - 1).

    The focal length is ``side`` pixels. ``samples`` rays along an axis of a pixel.
    """
    fine = _cast(given, poses, side * samples)[0].movedim(-1, 1)
    video: Tensor = fine.unflatten(-1, (side, samples)).mean(-1).unflatten(-2, (side, samples)).mean(-2)
    return video


def depths(given: Scenes, poses: Tensor, side: int) -> Tensor:
    """Depths ``[N, F, S, S]`` at the middle of pixels, along the axes of cameras."""
    return _cast(given, poses, side)[1]


def _cast(given: Scenes, poses: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Colours ``[N, F, S, S, 3]`` and depths ``[N, F, S, S]``, a ray for a pixel."""
    frames, device = poses.shape[1], poses.device
    turn, centre = poses[:, :, None, None, :, :3], -(poses[..., :3].mT @ poses[..., 3:])[:, :, None, None, :, 0]
    toward = (rays(side, side, side, device, poses.dtype)[..., None, :] @ turn)[..., 0, :]
    time = torch.arange(frames, device=device, dtype=poses.dtype) / max(1, frames - 1)

    def hit(depth: Tensor) -> tuple[Tensor, Tensor]:
        along = (depth[:, None, None, None] - centre[..., 2]) / toward[..., 2]
        return along, centre[..., :2] + along[..., None] * toward[..., :2]

    near, at = hit(given.wall)
    phase = torch.einsum("nfyxc,nwc->nfyxw", at, given.waves)[..., None, :] + given.phases[:, None, None, None]
    shade = torch.tensor([0.6, 0.3], device=device)
    colour = (phase.sin() * shade).sum(-1) * _paler(given.wall)[:, None, None, None, None]
    for disc in range(given.depth.shape[1]):
        along, at = hit(given.depth[:, disc])
        middle = given.place[:, disc, None] + given.speed[:, disc, None] * time[:, None]
        front = ((at - middle[:, :, None, None]).norm(dim=-1) < _RADIUS) & (along > 0) & (along < near)
        own = (given.colour[:, disc] * _paler(given.depth[:, disc])[:, None])[:, None, None, None]
        colour, near = torch.where(front[..., None], own, colour), torch.where(front, along, near)
    return colour, near


def _paler(depth: Tensor) -> Tensor:
    return (-_PALER * (depth - 1.7)).exp()


def path(ends: Tensor, frames: int) -> Tensor:
    """Cameras ``[N, F, 3, 4]`` on the way to ``ends [N, 3]`` (pitch, yaw, distance), frame f at (f + 1) / F of it."""
    part = torch.arange(1, frames + 1, device=ends.device) / frames
    start = torch.tensor([0.0, 0.0, 1.0], device=ends.device)
    return aimed(start + part[:, None] * (ends - start)[:, None])


def aimed(ends: Tensor) -> Tensor:
    """Cameras ``[..., 3, 4]`` that have gone around the point by ``ends [..., 3]``: pitch, yaw, distance."""
    return orbit(ends[..., 0], ends[..., 1], ends[..., 2], PIVOT)


def draw(
    count: int, side: int, frames: int, times: int, generator: Generator, device: torch.device | str = "cpu"
) -> tuple[Scenes, Shots]:
    """Draw ``count`` scenes and their shots.

    Args:
        count: N.
        side: S of videos.
        frames: F.
        times: the proxy is down-sampled by that.
        generator: on the CPU.
        device: where they are put together.
    """
    if count < 1 or frames < 1 or side % times:
        raise UserError("there is at least one shot of one frame, and a side that down-sampling parts")
    made = scenes(count, generator, device)
    unit = 2 * torch.rand(count, 3, generator=generator).to(device) - 1
    ends = unit * torch.tensor([PITCH, YAW, AWAY], device=device) + torch.tensor([0.0, 0.0, 1.0], device=device)
    still = torch.eye(3, 4, device=device).expand(count, frames, 3, 4)
    cameras = path(ends, frames)
    source, target, depth = film(made, still, side), film(made, cameras, side), depths(made, still, side)
    wrong = _FACTOR * torch.randn(count, 1, 1, 1, generator=generator)
    wrong = (wrong + _GRAIN * torch.randn(depth.shape, generator=generator)).exp().to(device)
    proxy = shrunk(render(source, depth * wrong, still, cameras, side), times)
    return made, Shots(source, target, depth, cameras, proxy, ends)
