# SPDX-License-Identifier: Apache-2.0
"""With which camera a frame was filmed, found by filming its scene, which is exactly known, with many."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ...data.cameras import centres, orbit, rotation_error
from ...data.filmed_scenes import PIVOT, Scenes, Shots, film

__all__ = ["found_cameras", "judge"]

_COARSE = (10.0, 10.0, 0.15)  # first steps of pitch, yaw (degrees) and distance (shares)
_REACH = (3, 4, 2)  # so many of them each way
_ROUNDS = 5  # of half as long steps: to a third of a degree


def found_cameras(videos: Tensor, scenes: Scenes) -> Tensor:
    """Cameras on the paths there are under which scenes look most like frames of ``videos [N, 3, F, S, S]``.

    The least squared error over a grid of pitch, yaw and distance, then in steps of half the length around the best.

    Returns:
        ``[N, F, 3, 4]``.
    """
    side, frames = videos.shape[-1], videos.shape[2]
    step = torch.tensor(_COARSE, device=videos.device)
    best = torch.tensor([0.0, 0.0, 1.0], device=videos.device).expand(len(videos), frames, 3)
    least = torch.full(best.shape[:2], float("inf"), device=videos.device)

    def tried(about: Tensor, moves: Tensor, samples: int) -> None:
        nonlocal best, least
        for move in moves:
            ends = about + move
            seen = film(scenes, orbit(*ends.unbind(-1), PIVOT), side, samples)[0]
            wrong = (seen - videos).square().mean((1, 3, 4))
            better = wrong < least
            best, least = torch.where(better[..., None], ends, best), torch.where(better, wrong, least)

    tried(best, _grid(_REACH, videos.device) * step, 1)
    least = torch.full_like(least, float("inf"))
    for _ in range(_ROUNDS):
        step = step / 2
        tried(best, _grid((1, 1, 1), videos.device) * step, 2)
    return orbit(*best.unbind(-1), PIVOT)


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
