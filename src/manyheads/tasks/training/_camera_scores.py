# SPDX-License-Identifier: Apache-2.0
"""With which camera a frame was filmed, found by filming its scene, which is exactly known, with many."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...data.cameras import centres, rotation_error
from ...data.filmed_scenes import PIVOT, Scenes, Shots, aimed, film

__all__ = ["found_cameras", "judge"]

_COARSE = (10.0, 10.0, 0.15)  # first steps of pitch, yaw (degrees) and distance (shares)
_REACH = (3, 4, 2)  # so many of them each way
_ROUNDS = 5  # of half as long steps: to a third of a degree
_RAYS = 1 << 17  # pixels filmed at once


def found_cameras(videos: Tensor, scenes: Scenes) -> Tensor:
    """Cameras on the paths there are under which scenes look most like frames of ``videos [N, 3, F, S, S]``.

    The least squared error over a grid of pitch, yaw and distance, then in steps of half the length around the best.

    Returns:
        ``[N, F, 3, 4]``.
    """
    side, frames, step = videos.shape[-1], videos.shape[2], torch.tensor(_COARSE, device=videos.device)
    best = torch.tensor([0.0, 0.0, 1.0], device=videos.device).expand(len(videos), frames, 3)
    at_once = max(1, _RAYS // (len(videos) * frames * side * side))

    def tried(about: Tensor, moves: Tensor, samples: int) -> Tensor:
        """The best of ``moves [C, 3]`` from ``about [N, F, 3]``."""
        errors = []
        for some in moves.split(at_once):
            ends = (about + some[:, None, None]).flatten(0, 1)
            many = scenes.part(torch.arange(len(videos), device=videos.device).repeat(len(some)))
            seen = film(many, aimed(ends), side, samples).unflatten(0, (len(some), -1))
            errors.append((seen - videos).square().mean((2, 4, 5)))
        return about + moves[torch.cat(errors).argmin(0)]

    best = tried(best, _grid(_REACH, videos.device) * step, 1)
    for _ in range(_ROUNDS):
        step = step / 2
        best = tried(best, _grid((1, 1, 1), videos.device) * step, 2)
    return aimed(best)


def _grid(reach: tuple[int, int, int], device: torch.device) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(-n, n + 1.0, device=device) for n in reach])


def judge(videos: Tensor, scenes: Scenes, shots: Shots) -> Iterator[dict[str, float]]:
    """Figures of outputs ``[N, 3, F, S, S]``, one after the other, means over frames."""
    cameras = found_cameras(videos, scenes)
    turned = rotation_error(cameras, shots.cameras).mean(1)
    moved = (centres(cameras) - centres(shots.cameras)).norm(dim=-1).mean(1) / PIVOT
    wrong = (videos - shots.target).square().flatten(1).mean(1).sqrt()
    for i in range(len(videos)):
        yield {"rotation_error": float(turned[i]), "centre_error": float(moved[i]), "pixel_error": float(wrong[i])}
