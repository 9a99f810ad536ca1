# SPDX-License-Identifier: Apache-2.0
"""How near videos of avatars are to the one that is right: pixels by region, and keypoints of the hands.

Keypoints of an output are those of the pose whose frame is nearest to it, among frames of the same avatar with the arm
raised, the fingers spread and the body moved by steps of a grid (:data:`GRID`). One hand is looked for at a time, in
its half of the frame without the head; the left one as a right one in the mirrored frame. The right video itself is off
by what the grid leaves.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...data.avatars import Clip, Pose, covered, keypoints, layers, painted, regions

__all__ = ["GRID", "Candidates", "candidates", "found_keypoints", "judge", "true_keypoints"]

GRID = (13, 7, 5)  # places of the arm (0..1), of the fingers (0..1), and of the body (-1..1 pixel of 16)


def judge(
    video: Tensor, mask: Tensor | None, clip: Clip, known: "Candidates | None" = None
) -> Iterator[dict[str, float]]:
    """Figures of outputs, a clip after the other.

    Args:
        video: ``[N, T, 3, S, S]`` in -1..1.
        mask: share of the hands' masks, ``[N, T, s, s]``; None for none.
        clip: what is right.
        known: candidates of the clip, where they are at hand.
    """
    side, finger = video.shape[-1], clip.avatar.finger[:, None].expand(video.shape[:2])
    box = regions(clip.pose, finger, side)
    hand, face = (covered(box[name], side, side) for name in ("hand", "face"))
    wrong = (video - clip.video).square().mean(2) / 4  # intensities of 0..1
    of = {"hand": hand, "face": face & ~hand, "rest": ~(hand | face)}
    rmse = {name: ((wrong * at).sum((1, 2, 3)) / at.sum((1, 2, 3))).sqrt() for name, at in of.items()}
    off = (found_keypoints(video, known or candidates(clip)) - true_keypoints(clip, side)).norm(dim=-1).flatten(1).mean(
        1
    ) * (16 / side)
    iou = None
    if mask is not None:
        said, right = mask > 0.5, covered(box["hand"], side, mask.shape[-1])
        iou = (said & right).sum((1, 2, 3)) / (said | right).sum((1, 2, 3))
    for i in range(len(video)):
        made = {f"{name}_rmse": float(each[i]) for name, each in rmse.items()} | {"hand_keypoints": float(off[i])}
        yield made if iou is None else {**made, "mask_iou": float(iou[i])}


def true_keypoints(clip: Clip, side: int) -> Tensor:
    """Of the right hand, and of the left in the mirrored frame, ``[N, T, 2, 3, 2]``, in pixels."""
    finger = clip.avatar.finger[:, None].expand(clip.video.shape[:2])
    points = keypoints(clip.pose, finger, side).unflatten(-2, (2, 3))
    left = points[..., 1, :, :]
    return torch.stack([points[..., 0, :, :], torch.stack([side - left[..., 0], left[..., 1]], -1)], -3)


class Candidates(NamedTuple):
    """Frames that outputs are compared with, of each clip's avatar.

    Attributes:
        frames: what is read of them, ``[N, G, P]``.
        points: palm and finger tips of the right hand, ``[N, G, 3, 2]``.
        read: pixels that are read, ``[S, S]``.
    """

    frames: Tensor
    points: Tensor
    read: Tensor


def candidates(clip: Clip) -> Candidates:
    """All places of the grid."""
    side, device = clip.video.shape[-1], clip.video.device
    ends = ((0, 1), (0, 1), (-1, 1))
    lines = [torch.linspace(*end, count, device=device) for end, count in zip(ends, GRID, strict=True)]
    raised, spread, sway = (x.flatten() for x in torch.meshgrid(*lines, indexing="ij"))
    pose = Pose(sway, torch.full_like(sway, 0.5), *(x[:, None].expand(-1, 2) for x in (raised, spread)))
    read = torch.ones(side, side, dtype=torch.bool, device=device)
    read[:, : side // 2] = False
    read[: 7 * side // 16, : 11 * side // 16] = False  # the head
    frames, points = [], []
    for colours, length in zip(*clip.avatar, strict=True):
        finger = length.expand_as(sway)
        frames.append(painted(layers(pose, finger, side)[..., read][..., None], colours).flatten(1))
        points.append(keypoints(pose, finger, side)[:, :3])
    return Candidates(torch.stack(frames), torch.stack(points), read)


def found_keypoints(video: Tensor, known: Candidates) -> Tensor:
    """As :func:`true_keypoints`, read off ``video [N, T, 3, S, S]``."""
    both = torch.stack([video, video.flip(-1)], 2)[..., known.read].flatten(3)  # [N, T, 2, P]
    best = torch.cdist(both.flatten(1, 2).float(), known.frames).argmin(-1)  # [N, 2 T]
    points: Tensor = known.points.gather(1, best[..., None, None].expand(-1, -1, 3, 2)).unflatten(1, (-1, 2))
    return points
