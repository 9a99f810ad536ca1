# SPDX-License-Identifier: Apache-2.0
"""Edits of known sources: what counts as untouched, what each arm makes, and how many rows it costs."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from manyheads.data import scenes
from manyheads.experiment import Arm, Pipeline, RunContext
from manyheads.models.scenes import load_scenes
from manyheads.tasks.diffusion.prompt_edit import PromptEdit, _psnr, outside
from oracles.tasks import rows, values
from tolerance import assert_close

needs_data = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")


def test_all_but_the_rectangle_of_the_object_counts():
    alpha = torch.zeros(2, 1, 6, 7)
    alpha[0, 0, 2, 3] = alpha[0, 0, 3, 4] = 0.5
    alpha[1, 0, 0, 0] = 1.0
    want = torch.ones(2, 1, 6, 7)
    want[0, 0, 1:5, 2:6] = 0
    want[1, 0, :2, :2] = 0
    assert torch.equal(outside(alpha), want)
    film = torch.stack([alpha[:1], alpha[1:]], 2)  # each frame has its own
    assert torch.equal(outside(film), torch.stack([want[:1], want[1:]], 2))
    assert torch.equal(outside(0 * alpha), torch.ones_like(alpha))


def test_psnr_is_of_what_counts():
    images, where = torch.rand(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
    where[:, :, :2] = 0
    other = images + torch.where(where > 0, 0.1, 0.7)
    assert_close(_psnr(other, images, where), torch.full((2,), 20.0), 1e-5)
    assert (_psnr(images, images, where) == 100).all()


@needs_data
def test_arms():
    ours = "video_p2p:source=unguided"
    arms = (
        Arm("plain"), Arm("ours", ours), Arm("nowhere", f"{ours},threshold=2,blend_from=0"),
        Arm("copy", options={"copy": True}), Arm("light", options={"renoise": 0.5}),
        Arm("best", options={"renoise": 0.5, "draws": 3}),
    )  # fmt: skip
    run = RunContext(Pipeline("scenes", load_scenes("scenes")), arms, seeds=(0,))
    found = rows(PromptEdit(samples=2, steps=4, batch=2), run)
    cost = {"plain": 36, "ours": 36, "nowhere": 36, "copy": 0, "light": 4, "best": 12}  # 36: 5 x 4, and 4 of 4 rows
    for name, count in cost.items():
        assert values(found, "evaluations", name).tolist() == [count] * 2
    assert (values(found, "kept", "copy") == 100).all() and not values(found, "object", "copy").any()
    assert (values(found, "source", "ours") > values(found, "source", "plain")).all()  # guidance is decoupled
    assert values(found, "source", "nowhere") == pytest.approx(values(found, "source", "ours"), abs=1e-3)
    assert values(found, "object", "ours").all() and not values(found, "object", "nowhere").any()  # it is the source
    assert {row.metric for row in found if row.arm == "light"} == {"object", "kept", "evaluations"}
