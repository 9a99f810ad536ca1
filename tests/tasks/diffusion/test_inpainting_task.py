# SPDX-License-Identifier: Apache-2.0
"""Figures of inpainting, recomputed by numpy; styles, colours in Lab, and what an arm is given."""

import colorsys
import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from manyheads.claims.harmonpaint import ARMS, OFF
from manyheads.data import scenes
from manyheads.experiment import Arm, Pipeline, RunContext
from manyheads.models.scenes import load_scenes
from manyheads.tasks.diffusion import inpainting
from manyheads.tasks.diffusion.inpainting import Inpaint, colour, corner, seam, structure, styled, to_lab
from oracles.tasks import rows, values
from tolerance import FORMULA, assert_close, error, is_far, nearly

needs_data = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")


def images(count=4):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_lab_of_known_colours():
    """White, black, and the primaries of sRGB, as tables of CIE have them."""
    known = {
        (1, 1, 1): (100, 0, 0), (0, 0, 0): (0, 0, 0), (1, 0, 0): (53.24, 80.09, 67.20),
        (0, 1, 0): (87.73, -86.18, 83.18), (0, 0, 1): (32.30, 79.19, -107.86), (0.5, 0.5, 0.5): (53.39, 0, 0),
    }  # fmt: skip
    for rgb, lab in known.items():
        found = to_lab(torch.tensor(rgb, dtype=torch.float64).reshape(1, 3, 1, 1)).flatten().tolist()
        assert found == pytest.approx(lab, abs=0.02), rgb


def test_styles_turn_hues_about_grey():
    given = images(64) * 0.2 + 0.4  # near grey, so that nothing is clipped
    made = styled(given, torch.Generator().manual_seed(0))
    random = torch.rand(3, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i in range(0, 64, 9):
        angle, high = float(random[0, i]) * 4 / 3 + 1 / 3, float(random[1, i]) >= 0.5
        gamma = 1.4 + 0.8 * float(random[2, i]) if high else 0.45 + 0.25 * float(random[2, i])
        turned = made[i].double() ** (1 / gamma)
        assert_close(turned.mean(0), given[i].double().mean(0), 1e-6)  # grey stays
        a, b = (x.double() - x.double().mean(0) for x in (given[i], turned))
        cos = (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))
        assert_close(cos, math.cos(angle * math.pi), 1e-4, 1.0)
        sign = torch.linalg.cross(a, b, dim=0).sum(0)
        assert (torch.sign(sign) == (1 if angle < 1 else -1)).double().mean() > 0.99
    grey = torch.full((1, 3, 2, 2), 0.5)
    assert error(styled(grey, torch.Generator().manual_seed(0)), grey) > 0.1  # by its gamma
    hues = {round(colorsys.rgb_to_hsv(*x.tolist())[0], 2) for x in styled(
        torch.tensor([0.6, 0.4, 0.4]).reshape(1, 3, 1, 1).expand(32, -1, -1, -1), torch.Generator().manual_seed(1)
    ).flatten(1)}  # fmt: skip
    assert len(hues) > 20 and all(0.15 < hue < 0.85 for hue in hues)  # none keeps its red


def regions(place):
    """Rows and columns of the background in the hole and around it, counted from the corner."""
    ends = [(lambda x: 31 - x) if far else (lambda x: x) for far in (place // 2, place % 2)]
    square = [(r, c, max(ends[0](r), ends[1](c))) for r in range(32) for c in range(32)]
    return [(r, c) for r, c, far in square if 16 <= far < 20], [(r, c) for r, c, far in square if 20 <= far < 24]


def test_colours_of_the_background_are_compared():
    given, places = images(), torch.arange(4)
    lab = to_lab(given).numpy()
    found = colour(given, places)
    for i in range(4):
        a, b = (np.array([lab[i, :, r, c] for r, c in part]) for part in regions(i))
        one, two = np.cov(a.T), np.cov(b.T)
        cross = sqrtm(one @ two).real
        want = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(one + two - 2 * cross)
        assert float(found[i]) == pytest.approx(math.sqrt(want), rel=1e-6)
        quarter = given.clone()
        quarter[i] = torch.where(corner(places, 16)[i] > 0.5, 0.0, quarter[i])
        assert error(colour(quarter, places)[i], found[i]) < FORMULA  # the object's place does not count
        other = given.clone()
        for r, c in regions(i)[0]:
            other[i, :, r, c] *= 0.5
        assert is_far(colour(other, places)[i], found[i], 1e-2)


def test_a_seam_is_a_step_at_the_edge():
    given, places = images() * 0.1 + 0.4, torch.arange(4)
    for i, x in enumerate(given.double().numpy()):
        turned = x[:, :: -1 if i // 2 else 1, :: -1 if i % 2 else 1]
        pairs = [[y[:, at, :20] - y[:, at - 1, :20] for y in (turned, turned.swapaxes(1, 2))] for at in (20, 21, 22)]
        steps = [np.abs(pair).mean() for pair in pairs]
        want = math.log((steps[0] + 1 / 255) / ((steps[1] + steps[2]) / 2 + 1 / 255))
        assert float(seam(given, places)[i]) == pytest.approx(want, rel=1e-9)
    lifted = given + 0.3 * corner(places, 20)
    assert (seam(lifted, places) > seam(given, places) + 0.5).all()
    assert seam(given + 0.3 * corner(places, 16), places).tolist() == nearly(seam(given, places).tolist())


@needs_data
def test_structure_is_that_of_the_object():
    sample = scenes.draw("scenes", 16, torch.Generator().manual_seed(3), "test")
    given = sample.images / 2 + 0.5
    found = structure(given, sample.labels)
    assert (found > 0.999).all()  # a hundredth of what is behind may shine through
    assert_close(structure(given * 0.5 + 0.2, sample.labels), found, 1e-6)  # light and contrast do not count
    weight, size = scenes.sprites(14)[:, 3] > 0.99, 14
    for i, (kind, place, _) in enumerate(sample.labels.tolist()):
        best = -1.0
        for r in range(3):
            for c in range(3):
                top, left = place // 2 * 16 + r, place % 2 * 16 + c
                x = (given[i, :, top : top + size, left : left + size].double().numpy().T @ [0.2126, 0.7152, 0.0722]).T
                y = (scenes.sprites(14)[kind, :3].double().numpy().T @ [0.2126, 0.7152, 0.0722]).T
                inside = weight[kind].numpy()
                best = max(best, np.corrcoef(x[inside], y[inside])[0, 1])
        assert float(found[i]) == pytest.approx(best, rel=1e-6)
    other = sample.labels.clone()
    other[:, 0] = (other[:, 0] + 1) % 8
    assert (structure(given, other) < found).all() and float(structure(given, other).mean()) < 0.6


@needs_data
def test_every_arm_fills_the_same_holes(monkeypatch):
    plain, truth, other = (
        Arm("plain", OFF),
        Arm("true", options={"truth": True}),
        Arm("other", OFF, options={"steps": 7}),
    )
    run = RunContext(Pipeline("scenes", load_scenes("scenes")), (plain, other, truth), seeds=(0,))
    seen, made = [], {}

    def fake(self, run, arm, seed, first, last, *, acting, labels):
        seen.append((arm.key, self.steps, first, last, acting, labels))
        canvas = acting[0].canvas
        made[arm.key, first] = torch.where(canvas.hole > 0.5, 0.25, canvas.image)
        return made[arm.key, first] + (0.5 if arm.key == "other" else 0.0)

    monkeypatch.setattr(Inpaint, "images", fake)
    found = rows(Inpaint(samples=5, batch=4, steps=3), run)
    assert {(key, steps) for key, steps, *_ in seen} == {("plain", 3), ("other", 7)}
    for _, _, first, last, acting, labels in seen:
        canvas = acting[0].canvas
        assert len(canvas.image) == len(labels) == last - first
        assert torch.equal(canvas.hole, corner(labels[:, 1], 20))
        assert (canvas.image[(canvas.hole > 0.5).expand_as(canvas.image)] == 0.5).all()  # nothing is given away
    assert values(found, "changed", "plain").tolist() == values(found, "changed", "true").tolist() == [0.0] * 5
    share = 1 - 20**2 / 32**2
    assert values(found, "changed", "other").tolist() == nearly([share] * 5, torch.float32)
    assert values(found, "object", "true").mean() > values(found, "object", "plain").mean()
    assert len(values(found, "seconds", "plain")) == 2 and not [
        r for r in found if (r.metric, r.arm) == ("seconds", "true")
    ]
    assert values(found, "colour", "true").mean() < values(found, "colour", "plain").mean()
    assert len({row.sample for row in found if row.metric == "colour"}) == 5
    assert inpainting.HOLE == 20 and ARMS[-1].name == "true scene"
