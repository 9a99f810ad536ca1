# SPDX-License-Identifier: Apache-2.0
"""Videos of small avatars that speak and wave by a signal, drawn from parameters, so that every part is exactly known.

An avatar is a torso, a head with a mouth, two arms, and two hands: a palm and two fingers of the avatar's own length.
Colours of backdrop, clothes, head and hands are drawn for each; that of the hands is seen on the hands alone, and its
red is on the other side of grey than the backdrop's, so that hands can be seen. The *signal* has two values in 0..1 for
each frame, smooth over time, and moves all:

    the mouth opens by the first
    the right hand is raised by the first, its fingers are spread by the second; the left the other way round
    the body sways to the side with the first, as far as a number of the clip's own says (0 to 1 pixel)

Lengths are in pixels of a frame of 16, and grow with it. Edges are soft by a pixel, so that a frame is a continuous
function of its parameters. In training clips hands are blurred by as much as the clip says: that many pixels of edge.
What is judged is sharp. Nothing is seen twice.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.functional import affine_grid, grid_sample

__all__ = [
    "LAYERS",
    "Avatar",
    "Clip",
    "Pose",
    "boxes",
    "chest",
    "cut",
    "draw",
    "covered",
    "keypoints",
    "layers",
    "painted",
    "regions",
    "skeleton",
]

LAYERS = ("backdrop", "clothes", "head", "mouth", "hands")  # what has a colour of its own
_UNIT = 16.0  # pixels of the frame that lengths are given for
_ARM, _PALM, _FINGER, _HEAD = 2.4, 1.0, 0.45, 2.2
_SHOULDER, _TORSO, _FACE = (2.2, 8.5), (2.2, 8.0, 15.0), 4.0
_BLUR = 3.0  # pixels of edge that a clip's hands have at most beyond one


class Pose(NamedTuple):
    """Where an avatar's parts are, each ``[...]``.

    Attributes:
        sway: of the body, in pixels of 16.
        mouth: 0 (shut) to 1.
        raised, spread: of both hands, ``[..., 2]``, right first, 0 to 1.
    """

    sway: Tensor
    mouth: Tensor
    raised: Tensor
    spread: Tensor


class Avatar(NamedTuple):
    """What an avatar looks like.

    Attributes:
        colours: of :data:`LAYERS`, ``[N, 5, 3]`` in -1..1.
        finger: length, in pixels of 16, ``[N]``.
    """

    colours: Tensor
    finger: Tensor


@dataclass(frozen=True, slots=True)
class Clip:
    """N clips of T frames, on one device.

    Attributes:
        video: ``[N, T, 3, S, S]`` in -1..1.
        signal: ``[N, T, 2]`` in 0..1.
        avatar: who it is.
        pose: in every frame, ``[N, T]``.
        reference: an image of the same avatar in another pose, sharp, ``[N, 3, S, S]``.
        reference_pose: ``[N]``.
    """

    video: Tensor
    signal: Tensor
    avatar: Avatar
    pose: Pose
    reference: Tensor
    reference_pose: Pose


def _points(pose: Pose, finger: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shoulders, palms and both finger tips of the two hands, ``[..., 2 hands, 2]``, in pixels of 16."""
    side = torch.tensor([1.0, -1.0], device=pose.sway.device)
    angle = (1 - pose.raised) * (5 / 18 * torch.pi) - pose.raised * (torch.pi / 3)  # 50 degrees down to 60 up
    shoulder = torch.stack([8 + pose.sway[..., None] + side * _SHOULDER[0], _SHOULDER[1] + 0 * angle], -1)

    def along(turned: Tensor) -> Tensor:
        return torch.stack([side * turned.cos(), turned.sin()], -1)

    palm = shoulder + _ARM * along(angle)
    opened = (1 / 18 + 5 / 18 * pose.spread) * torch.pi  # 10 to 60 degrees to either side
    first, second = (palm + finger[..., None, None] * along(angle + sign * opened) for sign in (-1, 1))
    return shoulder, palm, first, second


def keypoints(pose: Pose, finger: Tensor, side: int) -> Tensor:
    """Palm and two finger tips of the right hand, then of the left, ``[..., 6, 2]`` (x, y), in pixels of ``side``."""
    _, palm, *tips = _points(pose, finger)
    return torch.stack([palm, *tips], -2).flatten(-3, -2) * (side / _UNIT)


def chest(pose: Pose, side: int) -> Tensor:
    """Corners of the chest, ``[..., 4, 2]``, pixels of a frame of ``side``."""
    half, top, low = _TORSO
    corners = [(-half, top), (half, top), (-half, low), (half, low)]
    return torch.stack([torch.stack([8 + pose.sway + x, 0 * pose.sway + y], -1) for x, y in corners], -2) * (
        side / _UNIT
    )


def _segment(at: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Distance of ``at [P, 2]`` from segments ``[..., 2]``, ``[..., P]``."""
    line, to = (end - start)[..., None, :], at - start[..., None, :]
    share = ((to * line).sum(-1) / line.square().sum(-1).clamp(min=1e-9)).clamp(0, 1)
    away: Tensor = (to - share[..., None] * line).norm(dim=-1)
    return away


def layers(pose: Pose, finger: Tensor, side: int, blur: Tensor | None = None) -> Tensor:
    """How much of each pixel each of :data:`LAYERS` covers, ``[..., 5, side, side]``; they sum to 1.

    Args:
        pose: ``[...]``.
        finger: ``[...]``.
        side: pixels.
        blur: pixels of a hand's edge beyond one, ``[...]``; sharp without.
    """
    scale = side / _UNIT
    line = (torch.arange(side, device=pose.sway.device) + 0.5) / scale
    y, x = torch.meshgrid(line, line, indexing="ij")
    at = torch.stack([x, y], -1).flatten(0, 1)
    shoulder, palm, *tips = _points(pose, finger)
    edge = 1 if blur is None else 1 + blur[..., None]

    def cover(outside: Tensor, edge: Tensor | float = 1.0) -> Tensor:
        return (0.5 - outside * scale / edge).clamp(0, 1)

    moved = at[:, 0] - 8 - pose.sway[..., None]
    height = at[:, 1] + 0 * moved
    torso = torch.maximum(
        moved.abs() - _TORSO[0], (height - (_TORSO[1] + _TORSO[2]) / 2).abs() - (_TORSO[2] - _TORSO[1]) / 2
    )
    arm = _segment(at, shoulder, palm).amin(-2) - 0.6
    clothes = cover(torch.minimum(torso, arm))
    head = cover((moved.square() + (height - _FACE).square()).sqrt() - _HEAD)
    tall = (0.25 + 0.75 * pose.mouth)[..., None]
    mouth = cover(
        (((moved / 0.9).square() + ((height - _FACE - 0.9) / tall).square()).sqrt() - 1) * tall.clamp(max=0.9)
    )
    fingers = torch.stack([_segment(at, palm, tip) for tip in tips]).amin((0, -2)) - _FINGER
    middle = (at - palm[..., None, :]).norm(dim=-1).amin(-2) - _PALM
    hands = cover(torch.minimum(middle, fingers), edge)
    left, found = torch.ones_like(hands), []
    for alpha in (hands, mouth, head, clothes):  # what is in front first
        found.append(left * alpha)
        left = left * (1 - alpha)
    made: Tensor = torch.stack([left, *reversed(found)], -2).unflatten(-1, (side, side))
    return made


def painted(cover: Tensor, colours: Tensor) -> Tensor:
    """Images ``[..., 3, S, S]`` of covers ``[..., 5, S, S]`` in colours ``[..., 5, 3]``."""
    return torch.einsum("...lyx,...lc->...cyx", cover, colours)


def regions(pose: Pose, finger: Tensor, side: int) -> dict[str, Tensor]:
    """Boxes of the face ``[..., 1, 4]`` and of both hands ``[..., 2, 4]``, a pixel of 16 wider than their keypoints."""
    scale = side / _UNIT
    middle = torch.stack([8 + pose.sway, _FACE + 0 * pose.sway], -1)[..., None, None, :]
    reach = torch.tensor([[-1.0], [1.0]], device=finger.device) * (_HEAD - 0.5)
    face = boxes((middle + reach) * scale, scale)
    return {"face": face, "hand": boxes(keypoints(pose, finger, side).unflatten(-2, (2, 3)), scale)}


def covered(box: Tensor, side: int, grid: int) -> Tensor:
    """Cells of a grid that any of boxes ``[..., K, 4]`` in pixels of ``side`` touches, bool ``[..., grid, grid]``."""
    cell = side / grid
    at = (torch.arange(grid, device=box.device) + 0.5) * cell
    x, y = ((at + cell / 2 > box[..., i, None]) & (at - cell / 2 < box[..., i + 2, None]) for i in (0, 1))
    return (y[..., :, None] & x[..., None, :]).any(-3)


def boxes(points: Tensor, margin: float) -> Tensor:
    """Boxes ``[..., 4]`` (x0, y0, x1, y1) around keypoints ``[..., K, 2]``, ``margin`` pixels wider to each side."""
    return torch.cat([points.amin(-2) - margin, points.amax(-2) + margin], -1)


def cut(images: Tensor, box: Tensor, size: int) -> Tensor:
    """Crops ``[N, 3, size, size]`` of images ``[N, 3, S, S]`` by boxes ``[N, 4]`` in pixels; edges are repeated."""
    half = images.shape[-1] / 2
    middle, reach = (box[:, :2] + box[:, 2:]) / (2 * half) - 1, (box[:, 2:] - box[:, :2]) / (2 * half)
    theta = torch.zeros(len(box), 2, 3, device=images.device)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = reach[:, 0], reach[:, 1], middle
    grid = affine_grid(theta, [len(box), 3, size, size], align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)


def skeleton(pose: Pose, finger: Tensor, side: int) -> Tensor:
    """A drawing of arms and fingers as thin lines, ``[..., 1, side, side]`` in 0..1."""
    scale = side / _UNIT
    line = (torch.arange(side, device=pose.sway.device) + 0.5) / scale
    y, x = torch.meshgrid(line, line, indexing="ij")
    at = torch.stack([x, y], -1).flatten(0, 1)
    shoulder, palm, *tips = _points(pose, finger)
    ends = torch.stack([shoulder, *tips], -2)
    found = _segment(at, palm[..., None, :].expand_as(ends), ends).flatten(-3, -2).amin(-2)
    drawn: Tensor = (1 - found * scale).clamp(0, 1).unflatten(-1, (1, side, side))
    return drawn


def draw(
    count: int, frames: int, side: int, generator: Generator, *, sharp: bool = False, device: torch.device | str = "cpu"
) -> Clip:  # fmt: skip
    """Draw clips.

    Args:
        count, frames, side: N, T and S.
        generator: on the CPU.
        sharp: no clip has blurred hands.
        device: of the clips.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    colours, finger = uniform(count, len(LAYERS), 3) * 2 - 1, 1.6 + 0.8 * uniform(count)
    colours[:, LAYERS.index("mouth")] = -1
    colours[:, LAYERS.index("hands"), 0] = -colours[:, 0, 0].sign() * (0.5 + 0.5 * uniform(count))
    rate, phase = (0.15 + 0.35 * uniform(count, 1, 2, 2)), 2 * torch.pi * uniform(count, 1, 2, 2)
    at = torch.arange(frames, device=device)[None, :, None, None]
    signal = 0.5 + 0.25 * (2 * torch.pi * rate * at + phase).sin().sum(-1)  # two tones each
    far, blur = uniform(count), _BLUR * uniform(count) * (uniform(count) < 0.5)
    pose = _moved(signal, far[:, None])
    own = _moved(uniform(count, 2), torch.zeros(count, device=device))
    avatar = Avatar(colours, finger)
    edges = (0 * blur if sharp else blur)[:, None].expand(-1, frames)
    video = painted(layers(pose, finger[:, None].expand(-1, frames), side, edges), colours[:, None])
    reference = painted(layers(own, finger, side), colours)
    return Clip(video, signal, avatar, pose, reference, own)


def _moved(signal: Tensor, far: Tensor) -> Pose:
    """The pose that a signal ``[..., 2]`` asks for."""
    first = signal[..., 0]
    return Pose((2 * first - 1) * far, first, signal, signal.flip(-1))
