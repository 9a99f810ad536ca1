# SPDX-License-Identifier: Apache-2.0
"""Cameras and filmed scenes: poses by hand, a pixel's ray by hand, a reprojection that gives the exact view."""

import math

import pytest
import torch
from tests.tolerance import CLOSE, DRAWN, FORMULA, SAME, assert_close, is_far, mean_error, nearly, spread_error

from manyheads.data import filmed_scenes as scenes_of
from manyheads.data.cameras import centres, orbit, rays, render, rotation_error, shrunk
from manyheads.data.filmed_scenes import AWAY, PITCH, PIVOT, YAW, depths, draw, film, path
from manyheads.errors import UserError

SIDE, FRAMES, TIMES = 8, 3, 2


@pytest.fixture(scope="module")
def drawn():
    return draw(8, SIDE, FRAMES, TIMES, torch.Generator().manual_seed(1))


def degrees(*values):
    return torch.tensor(values, dtype=torch.float64)


def still(count):
    return torch.eye(3, 4).expand(count, FRAMES, 3, 4)


def test_an_orbit_looks_at_its_point_from_where_it_says():
    """Left is -x, up is -y; the point stays in the middle at the distance that is asked for."""
    pitch, yaw, away = degrees(0, 25, 10), degrees(30, 0, -20), degrees(1, 1, 0.8)
    poses = orbit(pitch, yaw, away, 3.0)
    point = poses[..., :3] @ degrees(0, 0, 3) + poses[..., 3]
    assert_close(point, torch.stack([0 * away, 0 * away, 3 * away], -1), FORMULA)
    at, (a, b) = centres(poses), (math.radians(30), math.radians(25))
    assert_close(at[0], degrees(-3 * math.sin(a), 0, 3 - 3 * math.cos(a)), 2 * FORMULA)
    assert_close(at[1], degrees(0, -3 * math.sin(b), 3 - 3 * math.cos(b)), 2 * FORMULA)
    assert_close((at - degrees(0, 0, 3)).norm(dim=-1), 3 * away, FORMULA)
    turn = poses[..., :3]
    assert_close(turn @ turn.mT, torch.eye(3, dtype=torch.float64).expand(3, 3, 3), FORMULA)
    assert_close(torch.linalg.det(turn), degrees(1, 1, 1), FORMULA)
    start = orbit(degrees(0), degrees(0), degrees(1), 3.0)
    assert_close(start[0], torch.eye(3, 4, dtype=torch.float64), FORMULA)
    assert_close(rotation_error(poses[:2], start.expand(2, 3, 4)), degrees(30, 25), 2 * FORMULA)
    assert rotation_error(poses, poses).tolist() == [0, 0, 0]


def by_hand(scenes, i, pose, side, row, column, time):
    """Colour and depth of one ray through the middle of a pixel."""
    turn, move = pose[:, :3], pose[:, 3]
    centre = -turn.T @ move
    toward = turn.T @ torch.tensor([(column + 0.5 - side / 2) / side, (row + 0.5 - side / 2) / side, 1.0]).double()
    along = float((scenes.wall[i] - centre[2]) / toward[2])
    at = centre + along * toward
    phases = [[float(scenes.waves[i, w] @ at[:2].float() + scenes.phases[i, c, w]) for w in (0, 1)] for c in range(3)]
    colour = [0.6 * math.sin(one) + 0.3 * math.sin(two) for one, two in phases]
    colour = [x * math.exp(-0.3 * (float(scenes.wall[i]) - 1.7)) for x in colour]
    for k in range(2):
        depth = float(scenes.depth[i, k])
        reach = float((depth - centre[2]) / toward[2])
        middle = scenes.place[i, k] + scenes.speed[i, k] * time
        if 0 < reach < along and math.dist((centre + reach * toward)[:2].tolist(), middle.tolist()) < 0.55:
            along, colour = reach, [float(x) * math.exp(-0.3 * (depth - 1.7)) for x in scenes.colour[i, k]]
    return colour, along


def test_a_pixel_is_what_its_ray_meets(drawn):
    """Every frame's discs where they are then; control: the camera of the frame before."""
    scenes, shots = drawn
    video, depth = film(scenes, shots.cameras, SIDE, samples=1), depths(scenes, shots.cameras, SIDE)
    got, want, far, other = [], [], [], []
    for i in range(3):
        for f in range(FRAMES):
            for row, column in ((0, 0), (3, 4), (4, 3), (6, 2), (7, 7)):
                pose = shots.cameras[i].double()
                colour, along = by_hand(scenes, i, pose[f], SIDE, row, column, f / (FRAMES - 1))
                got.append([*video[i, :, f, row, column].tolist(), float(depth[i, f, row, column])])
                want.append([*colour, along])
                other.append(by_hand(scenes, i, pose[f - 1], SIDE, row, column, f / (FRAMES - 1))[0])
    assert_close(torch.tensor(got), torch.tensor(want), SAME)
    far = [x[:3] for x in got]
    assert is_far(torch.tensor(far), torch.tensor(other), SAME)
    assert len({round(x[3], 1) for x in want}) > 5  # walls and discs


def test_a_pixel_is_the_mean_of_its_rays(drawn):
    scenes, shots = drawn
    one, fine = (film(scenes, shots.cameras, side, samples=1) for side in (SIDE, 2 * SIDE))
    got = film(scenes, shots.cameras, SIDE, samples=2)
    mean = torch.nn.functional.avg_pool3d(fine, (1, 2, 2))
    assert_close(got, mean, CLOSE)
    assert is_far(got, one, CLOSE)


def test_from_the_same_camera_a_rendering_is_the_video(drawn):
    shots = drawn[1]
    assert_close(render(shots.source, shots.depth, still(8), still(8), SIDE), shots.source, CLOSE)
    tilted = path(torch.tensor([[10.0, 20.0, 1.1]]), FRAMES).expand(8, FRAMES, 3, 4)
    moved = render(shots.source, shots.depth, tilted, tilted, SIDE)
    assert_close(moved, shots.source, 8 * SAME)  # from a world that is turned and back


def test_a_rendering_by_the_exact_depth_is_the_exact_view():
    """Of a wall across the view, a step to the right by one pixel; control: by half of its depth."""
    video = torch.rand(1, 3, 1, SIDE - 2, SIDE, generator=torch.Generator().manual_seed(2))
    depth = torch.full((1, 1, SIDE - 2, SIDE), 4.0)
    source, target = torch.eye(3, 4).expand(1, 1, 3, 4), torch.eye(3, 4).clone()
    target[0, 3] = -4.0 / SIDE  # a camera that stands that much to the right
    target = target.expand(1, 1, 3, 4)
    seen = render(video, depth, source, target, SIDE)
    assert_close(seen[..., :-1], video[..., 1:], SAME)
    assert torch.equal(seen[..., -1], torch.full_like(seen[..., -1], -1.0))  # nothing was seen there
    half = render(video, depth / 2, source, target, SIDE)
    assert_close(half[..., :-2], video[..., 2:], SAME)
    assert is_far(half[..., :-1], video[..., 1:], SAME)


def test_what_is_in_front_hides_what_is_behind():
    """Two pixels that fall on one place; behind the camera nothing is seen."""
    video = torch.zeros(1, 1, 1, SIDE, SIDE)
    depth = torch.full((1, 1, SIDE, SIDE), 4.0)
    video[0, 0, 0, 3, 5], depth[0, 0, 3, 5] = 1.0, 2.0
    source, target = torch.eye(3, 4).expand(1, 1, 3, 4), torch.eye(3, 4).clone()
    target[0, 3] = -4.0 / SIDE  # by one pixel at a depth of 4, two at 2
    seen = render(video, depth, source, target.expand(1, 1, 3, 4), SIDE)
    assert float(seen[0, 0, 0, 3, 3]) == nearly(1.0, torch.float32)
    behind = torch.eye(3, 4).clone()
    behind[2, 3] = -5.0
    assert torch.equal(
        render(video, depth, source, behind.expand(1, 1, 3, 4), SIDE), torch.full_like(video, -1.0)
    )  # fmt: skip


def test_down_sampling_takes_the_middle():
    video = torch.rand(2, 3, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    got = shrunk(video, 4)
    middle = video.unfold(3, 4, 4).unfold(4, 4, 4)[..., 1:3, 1:3].mean((-1, -2))
    assert_close(got, middle, CLOSE)
    assert is_far(got, torch.nn.functional.avg_pool3d(video, (1, 4, 4)), CLOSE)
    assert_close(rays(2, 4, 2.0)[0, 1], torch.tensor([-0.25, -0.25, 1.0]), CLOSE)


def test_shots_are_what_they_say(drawn):
    """Source and target of the same scenes, cameras a part of the way further each frame; the proxy is not exact."""
    scenes, shots = drawn
    assert shots.source.shape == shots.target.shape == (8, 3, FRAMES, SIDE, SIDE)
    assert shots.proxy.shape == (8, 3, FRAMES, SIDE // TIMES, SIDE // TIMES)
    assert torch.equal(film(scenes, still(8), SIDE), shots.source)
    assert torch.equal(film(scenes, shots.cameras, SIDE), shots.target)
    assert_close(shots.cameras[:, -1], orbit(*shots.ends.unbind(1), PIVOT), CLOSE)
    assert is_far(shots.cameras[:, 0], shots.cameras[:, -1], CLOSE)
    exact = shrunk(render(shots.source, shots.depth, still(8), shots.cameras, SIDE), TIMES)
    assert is_far(shots.proxy, exact, CLOSE)
    part = scenes.part(slice(2, 5))
    assert torch.equal(film(part, shots.cameras[2:5], SIDE), shots.target[2:5])
    with pytest.raises(UserError, match="a side that down-sampling parts"):
        draw(1, 8, 3, 3, torch.Generator())


def test_paths_and_depths_are_drawn_as_told():
    """Ends of paths uniform, and the estimated depth wrong by a factor of a video; control: twice the range."""
    shots = draw(400, SIDE, 1, TIMES, torch.Generator().manual_seed(4))[1]
    for values, most in zip((shots.ends - torch.tensor([0, 0, 1])).unbind(1), (PITCH, YAW, AWAY), strict=True):
        assert mean_error(values, 0.0, most / math.sqrt(3)) < DRAWN
        assert spread_error(float(values.std()), most / math.sqrt(3), 400, kurtosis=1.8) < DRAWN
        assert spread_error(float(values.std()), 2 * most / math.sqrt(3), 400, kurtosis=1.8) > 3
    assert len(scenes_of.scenes(3, torch.Generator()).wall) == 3
