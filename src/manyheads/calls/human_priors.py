# SPDX-License-Identifier: Apache-2.0
"""What a denoiser of people is told of the body, and what it is trained to get right there, as ``cyberhost`` has it.

- **Body movement map**: a box around all places of the chest in the clip, enlarged, encoded and added to the noisy
  latents of every frame: how much the body moves, not where it is when.
- **Hand clarity score**: the standard deviation of the Laplacian of a crop of the hands, added to the embedding of
  time. Training sees what blur is; in inference a high score is given.
- **Pose-aligned reference**: a drawing of the reference's skeleton, encoded and added to the latents of the reference.
- **Local supervision**: (1 + M) L, M being 1 in the regions, with the squared error of the keypoints' heat maps, which
  counts for half of the samples and only below a noise of 0.5 (t < 500), and the masks' own loss.

Chosen here, where notes of the paper (arXiv 2409.01876) are silent: maps go through two convolutions of which the
second is zero at first (:class:`PoseEncoder`); the box is 1 to 1.5 times as wide and high ("enlarged by 100 to 150 %"
can be read otherwise); masks are learned by binary cross-entropy with weight 0.1; a score is of a clip, the mean over
its frames and hands.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, conv2d, interpolate, silu

from .stage_blocks import RegionSeen

__all__ = ["MASK_WEIGHT", "ClarityEmbedding", "PoseEncoder", "clarity_score", "heat_maps", "local_loss", "movement_map"]

MASK_WEIGHT = 0.1
_GREY = (0.299, 0.587, 0.114)


def movement_map(chest: Tensor, factor: Tensor, side: int) -> Tensor:
    """Boxes of a clip's movement, float32 ``[B, 1, side, side]``, 1 within.

    Args:
        chest: corners of the chest in every frame, ``[B, T, K, 2]``, x and y in pixels.
        factor: ``[B]``, how many times as wide and high the box is drawn.
        side: pixels.
    """
    points = chest.flatten(1, 2)
    low, high = points.amin(1), points.amax(1)
    middle, half = (low + high) / 2, (high - low) / 2 * factor[:, None]
    at = torch.arange(side, device=chest.device) + 0.5
    x, y = ((at[None] - middle[:, i, None]).abs() <= half[:, i, None] for i in (0, 1))
    return (y[:, :, None] & x[:, None, :])[:, None].float()


def clarity_score(crops: Tensor, size: int = 128) -> Tensor:
    """How sharp crops ``[..., 3, S, S]`` in -1..1 are, ``[...]``: the deviation of the grey Laplacian at ``size``."""
    flat = crops.flatten(0, -4).float()
    grey = (flat * torch.tensor(_GREY, device=crops.device)[:, None, None]).sum(1, keepdim=True)
    if grey.shape[-1] != size:
        grey = interpolate(grey, size=(size, size), mode="bilinear")
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=crops.device)[None, None]
    score: Tensor = conv2d(grey, kernel).flatten(1).std(1, unbiased=False).unflatten(0, crops.shape[:-3])
    return score


def heat_maps(points: Tensor, side: int, grid: int, spread: float) -> Tensor:
    """Gaussians of deviation ``spread`` pixels around keypoints ``[..., K, 2]``, ``[..., K, grid, grid]``.

    Points are in pixels of a frame of ``side``; a map's cell is read at its middle.
    """
    at = (torch.arange(grid, device=points.device) + 0.5) * (side / grid)
    x, y = ((-((at - points[..., i, None]) ** 2) / (2 * spread**2)).exp() for i in (0, 1))
    return y[..., :, None] * x[..., None, :]


class PoseEncoder(nn.Module):
    """A drawing ``[B, 1, H, W]`` to what is added to latents ``[B, C, H, W]``; nothing at first."""

    def __init__(self, channels: int, inner: int = 8) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, inner, 3, padding=1), nn.Conv2d(inner, channels, 3, padding=1)
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, drawn: Tensor) -> Tensor:
        out: Tensor = self.second(silu(self.first(drawn)))
        return out


class ClarityEmbedding(nn.Module):
    """A score ``[B]`` to what is added to the embedding of time, ``[B, D]``; nothing at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(1, dim), nn.Linear(dim, dim)
        for parameter in self.second.parameters():
            nn.init.zeros_(parameter)

    def forward(self, score: Tensor) -> Tensor:
        out: Tensor = self.second(silu(self.first(score[:, None])))
        return out


def local_loss(
    error: Tensor, within: Tensor, seen: Sequence[Mapping[str, RegionSeen]], masks: Mapping[str, Tensor],
    heat: Mapping[str, Tensor], counted: Tensor, *, local: bool = True,
) -> Tensor:  # fmt: skip
    """The loss of a step, a scalar.

    Args:
        error: squared error of every number that is predicted, ``[B, C, T, H, W]``.
        within: 1 in the regions, ``[B, T, H, W]``.
        seen: what each inserted block predicted.
        masks: what its masks should be, 0 or 1, by the region's name, ``[B, T, h, w]``.
        heat: what its heat maps should be, ``[B, T, K, h, w]``.
        counted: 1 for samples whose heat maps count, ``[B]``.
        local: whether regions weigh twice and heat maps count; masks are learned either way.
    """
    total = (error * (1 + within[:, None])).mean() if local else error.mean()
    for stage in seen:
        for name, region in stage.items():
            if region.mask is not None:
                total = total + MASK_WEIGHT * binary_cross_entropy_with_logits(region.mask.float(), masks[name])
            if region.heat is not None and local:
                each = (region.heat.float() - heat[name]).square().flatten(1).mean(1)
                total = total + (each * counted).mean()
    return total
