# SPDX-License-Identifier: Apache-2.0
"""Camera paths, and a video reprojected along one by its depth.

A camera is a pinhole that looks along +z, x to the right and y down; pixel (0, 0) has its centre half a pixel from the
corner. Poses ``[..., 3, 4]`` are ``[R | t]`` from the world into the camera, ``p = R X + t``: the world of a path is
that of its first source camera, whose pose is ``[I | 0]``. ``focal`` is in pixels.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["centres", "orbit", "rays", "render", "rotation_error", "shrunk"]

_NEAR = 1e-3  # depth of what still lies before a camera
_LEAST = 1e-3  # share of a splatted pixel that counts: roundings of one in front would hide what is behind


def orbit(pitch: Tensor, yaw: Tensor, away: Tensor, pivot: float | Tensor) -> Tensor:
    """Poses ``[..., 3, 4]`` that look at a point before the first camera, from around it.

    Args:
        pitch: degrees up, any shape.
        yaw: degrees to the left.
        away: distance from the point, in those of the first camera: 1 for as far.
        pivot: depth of the point.
    """
    up, left = pitch * math.pi / 180, yaw * math.pi / 180
    zero, one = torch.zeros_like(up), torch.ones_like(up)
    about_y = torch.stack([left.cos(), zero, -left.sin(), zero, one, zero, left.sin(), zero, left.cos()], -1)
    about_x = torch.stack([one, zero, zero, zero, up.cos(), -up.sin(), zero, up.sin(), up.cos()], -1)
    turn = about_x.unflatten(-1, (3, 3)) @ about_y.unflatten(-1, (3, 3))
    point = torch.stack([zero, zero, one * pivot], -1)
    move = point * away[..., None] - (turn @ point[..., None])[..., 0]
    return torch.cat([turn, move[..., None]], -1)


def centres(poses: Tensor) -> Tensor:
    """Where cameras ``[..., 3, 4]`` stand, ``[..., 3]``."""
    at: Tensor = -(poses[..., :3].mT @ poses[..., 3:])[..., 0]
    return at


def rotation_error(poses: Tensor, others: Tensor) -> Tensor:
    """Angle between the rotations of two cameras in degrees, ``[...]``; exact for small ones too."""
    apart = (poses[..., :3] - others[..., :3]).flatten(-2).norm(dim=-1)
    angle: Tensor = 2 * (apart / math.sqrt(8)).clamp(max=1).asin() * 180 / math.pi
    return angle


def rays(
    height: int, width: int, focal: float, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Directions ``[height, width, 3]`` of pixels; the third number is 1."""
    y, x = (
        (torch.arange(size, device=device, dtype=dtype) + 0.5 - size / 2) / focal for size in (height, width)
    )  # fmt: skip
    y, x = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], -1)


def render(video: Tensor, depth: Tensor, source: Tensor, target: Tensor, focal: float, empty: float = -1.0) -> Tensor:
    """A video as it would be seen from other cameras: every pixel splatted on four, those in front before others.

    Args:
        video: ``[B, C, F, H, W]``.
        depth: along the cameras' axes, ``[B, F, H, W]``.
        source, target: poses ``[B, F, 3, 4]`` of the cameras it was and is to be filmed with.
        focal: in pixels, of both.
        empty: of pixels on which nothing falls.

    Returns:
        ``[B, C, F, H, W]``.
    """
    height, width = video.shape[-2:]
    points = rays(height, width, focal, video.device, video.dtype) * depth[..., None] - source[:, :, None, None, :, 3]
    points = points @ source[:, :, None, :, :3]  # row vectors: the inverse rotation
    points = points @ target[:, :, None, :, :3].mT + target[:, :, None, None, :, 3]
    near = points[..., 2]
    size = torch.tensor([width, height], device=video.device, dtype=video.dtype)
    place = points[..., :2] / near.clamp(min=_NEAR)[..., None] * focal + size / 2 + 0.5  # in a frame with a rim
    place = place.clamp(min=0).minimum(size + 0.999)
    front = (-50 * (near.clamp(min=0) + 1).log() / (near.amax((2, 3), keepdim=True).clamp(min=_NEAR) + 1).log()).exp()
    front = torch.where(near > _NEAR, front, 0)
    low, shape = place.floor(), (len(video), video.shape[2], (height + 2) * (width + 2))
    total, weights = video.new_zeros(shape[0], video.shape[1], *shape[1:]), video.new_zeros(shape)
    for across in (0, 1):
        for down in (0, 1):
            step = torch.tensor([across, down], device=video.device)
            share = (1 - (place - low - step).abs()).clamp(min=0).prod(-1)
            weight = torch.where(share > _LEAST, share * front, 0)
            index = (low + step).long()
            flat = (index[..., 1] * (width + 2) + index[..., 0]).flatten(2)
            weights.scatter_add_(2, flat, weight.flatten(2))
            each = (video * weight[:, None]).flatten(3)
            total.scatter_add_(3, flat[:, None].expand_as(each), each)
    seen = torch.where(weights[:, None] > 0, total / weights[:, None].clamp(min=1e-30), empty)
    framed: Tensor = seen.unflatten(3, (height + 2, width + 2))[..., 1:-1, 1:-1]
    return framed


def shrunk(video: Tensor, times: int) -> Tensor:
    """A video ``[B, C, F, H, W]`` down-sampled, bilinear: of every ``times`` pixels the middle ones."""
    frames = video.transpose(1, 2).flatten(0, 1)
    small = interpolate(frames, scale_factor=1 / times, mode="bilinear", align_corners=False)
    found: Tensor = small.unflatten(0, (len(video), -1)).transpose(1, 2)
    return found
