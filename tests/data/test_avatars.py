# SPDX-License-Identifier: Apache-2.0
"""Avatars: where their parts are, what covers what, and what the signal moves."""

import torch
from tests.tolerance import CLOSE, assert_close, is_far, nearly

from manyheads.data.avatars import (
    LAYERS,
    Pose,
    boxes,
    chest,
    covered,
    cut,
    draw,
    keypoints,
    layers,
    painted,
    regions,
    skeleton,
)  # fmt: skip

HANDS = LAYERS.index("hands")


def pose(sway=0.0, mouth=0.5, raised=(0.5, 0.5), spread=(0.5, 0.5)):
    return Pose(torch.tensor(sway), torch.tensor(mouth), torch.tensor(raised), torch.tensor(spread))


FINGER = torch.tensor(2.0)


def test_every_pixel_is_covered_once():
    clip = draw(8, 3, 16, torch.Generator().manual_seed(0))
    cover = layers(clip.pose, clip.avatar.finger[:, None].expand(8, 3), 16)
    assert cover.shape == (8, 3, 5, 16, 16) and float(cover.min()) >= 0
    assert_close(cover.sum(2), torch.ones(8, 3, 16, 16), CLOSE)
    assert_close(painted(torch.eye(5).reshape(5, 5, 1, 1), clip.avatar.colours[:1])[..., 0, 0], clip.avatar.colours[0])


def test_keypoints_lie_on_hands_and_nothing_else_does():
    """At four times the size every keypoint's pixel is of a hand; control: the same points of another pose."""
    clip = draw(16, 2, 64, torch.Generator().manual_seed(1), sharp=True)
    finger = clip.avatar.finger[:, None].expand(16, 2)
    hands = layers(clip.pose, finger, 64)[:, :, HANDS].flatten(0, 1)
    points = keypoints(clip.pose, finger, 64).flatten(0, 1)

    def at(points):
        x, y = points.floor().clamp(0, 63).long().unbind(-1)
        return hands[torch.arange(32)[:, None], y, x]

    assert at(points).min() > 0.4 and at(points.roll(1, 0)).min() == 0


def test_the_left_hand_is_the_right_one_mirrored():
    cover = layers(pose(0.7, 0.2, (0.9, 0.1), (0.2, 0.8)), FINGER, 32)
    other = layers(pose(-0.7, 0.2, (0.1, 0.9), (0.8, 0.2)), FINGER, 32)
    assert_close(cover.flip(-1), other, 1e-5)
    assert is_far(cover, other, 1e-5)


def test_a_pose_by_hand():
    """An arm at the height of the shoulder points sideways: 2.2 of the torso, 2.4 of the arm, then a finger."""
    level = 5 / 11  # of the way from 50 degrees below to 60 above
    found = keypoints(pose(raised=(level, level), spread=(0.0, 0.0)), FINGER, 16)
    assert found[0].tolist() == nearly([8 + 2.2 + 2.4, 8.5], torch.float32)
    assert found[3].tolist() == nearly([8 - 2.2 - 2.4, 8.5], torch.float32)
    tip = torch.tensor([10.0]).deg2rad()
    assert (found[2] - found[0]).tolist() == nearly([2 * float(tip.cos()), 2 * float(tip.sin())], torch.float32, 64)
    assert_close(keypoints(pose(raised=(level, level), spread=(0.0, 0.0)), FINGER, 32), 2 * found, CLOSE)
    assert_close(chest(pose(sway=1.0), 16), torch.tensor([[6.8, 8], [11.2, 8], [6.8, 15], [11.2, 15]]), CLOSE)


def test_the_signal_moves_all_parts():
    clip = draw(6, 5, 16, torch.Generator().manual_seed(2))
    first, second = clip.signal.unbind(-1)
    assert torch.equal(clip.pose.mouth, first) and torch.equal(clip.pose.raised, clip.signal)
    assert torch.equal(clip.pose.spread, torch.stack([second, first], -1))
    share = clip.pose.sway / (2 * first - 1)
    assert_close(share, share[:, :1].expand(-1, 5), 1e-4)
    assert float(share.min()) >= 0 and float(share.max()) <= 1.001
    assert clip.signal.min() >= 0 and clip.signal.max() <= 1
    assert torch.equal(clip.reference_pose.sway, torch.zeros(6))


def test_hands_alone_are_blurred_and_can_be_told_from_the_backdrop():
    generator = torch.Generator().manual_seed(3)
    plain = draw(32, 2, 16, generator)
    sharp = draw(32, 2, 16, torch.Generator().manual_seed(3), sharp=True)
    assert torch.equal(plain.signal, sharp.signal) and torch.equal(plain.reference, sharp.reference)
    changed = (plain.video != sharp.video).flatten(1).any(1)
    assert 8 <= int(changed.sum()) <= 24
    finger = sharp.avatar.finger[:, None].expand(32, 2)
    far = ~covered(boxes(keypoints(sharp.pose, finger, 16).unflatten(-2, (2, 3)), 4.0), 16, 16)
    assert torch.equal((plain.video * far[:, :, None]), (sharp.video * far[:, :, None]))
    assert (sharp.avatar.colours[:, 0, 0] - sharp.avatar.colours[:, HANDS, 0]).abs().min() >= 0.5
    again = draw(32, 2, 16, generator)
    assert not torch.equal(again.signal, plain.signal)


def test_regions_and_cells():
    found = regions(pose(), FINGER, 16)
    assert found["face"].shape == (1, 4) and found["hand"].shape == (2, 4)
    assert found["face"][0].tolist() == nearly([8 - 2.7, 4 - 2.7, 8 + 2.7, 4 + 2.7], torch.float32)
    points = keypoints(pose(), FINGER, 16).unflatten(-2, (2, 3))
    assert_close(found["hand"], torch.cat([points.amin(1) - 1, points.amax(1) + 1], -1), CLOSE)
    cells = covered(torch.tensor([[3.0, 5.0, 4.5, 8.0]]), 16, 8)  # x from 3 to 4.5, y from 5 to 8
    want = torch.zeros(8, 8, dtype=torch.bool)
    want[2:4, 1:3] = True
    assert torch.equal(cells, want)


def test_a_crop_of_whole_pixels_is_those_pixels():
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    box = torch.tensor([[2.0, 4, 10, 12], [0.0, 0, 8, 8]])
    got = cut(image, box, 8)
    assert_close(got[0], image[0, :, 4:12, 2:10], 1e-5)
    assert_close(got[1], image[1, :, :8, :8], 1e-5)
    assert is_far(got[0], image[0, :, 2:10, 4:12], 1e-5)


def test_a_skeleton_is_drawn_along_arms_and_fingers():
    drawn = skeleton(pose(), FINGER, 64)
    assert drawn.shape == (1, 64, 64) and drawn.min() >= 0 and drawn.max() <= 1
    for x, y in (keypoints(pose(), FINGER, 64) - 0.5).round().long().tolist():
        assert drawn[0, y - 1 : y + 2, x - 1 : x + 2].max() > 0.3
    assert drawn[0, :, 30:34].sum() == 0
