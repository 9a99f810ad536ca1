# SPDX-License-Identifier: Apache-2.0
"""Noise levels by scheduler, rows of a call, and where guidance is added so that it arrives as it is meant."""

import math
from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from manyheads.call import DenoiserCall, DiffusionStep  # noqa: E402
from manyheads.diffusion._maps import check_words, merged, scaled  # noqa: E402
from manyheads.diffusion._prediction import Prediction, add_guidance, is_flow, select_batch  # noqa: E402
from manyheads.errors import UserError  # noqa: E402
from tolerance import CLOSE, FORMULA, assert_close, is_close, nearly  # noqa: E402


def call(branches=("all",), guidance=None, rescales=False, index=3, scheduler=None, given=None):
    step = DiffusionStep(1, index, 10, 400.0, branches, None)
    given = given or {"sample": torch.zeros(4, 3)}
    return DenoiserCall(step, given, scheduler, guidance, lambda *_, **__: None, rescales)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_levels_of_a_diffusion_are_its_cumulative_alphas(kind):
    scheduler = diffusers.DDIMScheduler(prediction_type=kind)
    alpha = float(torch.cumprod(1 - scheduler.betas, 0)[400])
    for found in (Prediction.of(call(scheduler=scheduler)), Prediction.at(scheduler, 399.6)):
        assert found.kind == kind and found.alpha == nearly(math.sqrt(alpha))
        assert found.sigma == nearly(math.sqrt(1 - alpha)) and found.alpha**2 + found.sigma**2 == nearly(1)


def test_levels_of_a_flow_are_the_sigmas_of_its_timesteps():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    for t, sigma in zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False):
        for near in (t, t + 0.4, t - 0.4):  # given in half precision, a timestep is not met to the bit
            found = Prediction.at(scheduler, near)
            assert (found.kind, found.sigma, found.alpha) == ("flow", nearly(sigma), nearly(1 - sigma))
    assert is_flow(scheduler) and not is_flow(diffusers.DDIMScheduler())
    assert is_flow(diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"))
    assert not is_flow(diffusers.UniPCMultistepScheduler())


def test_what_tells_no_level_is_refused():
    with pytest.raises(UserError, match="open the pipeline"):
        Prediction.of(call())
    with pytest.raises(UserError, match="open the pipeline"):
        Prediction.of(call(index=None, scheduler=diffusers.DDIMScheduler()))
    odd = SimpleNamespace(config=SimpleNamespace(prediction_type="score"), alphas_cumprod=torch.ones(9))
    with pytest.raises(UserError, match="'score'; known are"):
        Prediction.at(odd, 3)
    bare = SimpleNamespace(config=SimpleNamespace())
    with pytest.raises(UserError, match="no alphas_cumprod"):
        Prediction.at(bare, 3)
    plain = SimpleNamespace(config=SimpleNamespace(), alphas_cumprod=torch.linspace(1, 0, 9))
    assert Prediction.at(plain, 2).kind == "epsilon"


def test_rows_of_everything_that_has_the_batch():
    x = torch.arange(12.0).view(4, 3)
    given = {
        "sample": x, "same": x[:3], "scalar": torch.tensor(5.0), "text": "x", "pair": (x, "y"), "listed": [x[:, 0]],
        "deep": {"a": x, "b": {"c": (x,)}}, "none": None,
    }  # fmt: skip
    made = select_batch(call(given=given), slice(1, 3))
    assert torch.equal(made["sample"], x[1:3]) and torch.equal(made["same"], x[:3]) and made["scalar"].ndim == 0
    assert isinstance(made["pair"], tuple) and torch.equal(made["pair"][0], x[1:3]) and made["pair"][1] == "y"
    assert isinstance(made["listed"], list) and torch.equal(made["listed"][0], x[1:3, 0])
    assert torch.equal(made["deep"]["b"]["c"][0], x[1:3]) and torch.equal(made["deep"]["a"], x[1:3])
    assert made["text"] == "x" and made["none"] is None


def guided(plain, g):
    """Classifier-free guidance of ``[uncond, cond]``."""
    uncond, cond = plain.chunk(2)
    return uncond + g * (cond - uncond)


@pytest.mark.parametrize("g", [0.0, 1.0, 5.0])
def test_after_guidance_a_prediction_is_moved_by_what_was_meant(g):
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(4, 3, 2, 2, generator=generator).double()
    push = torch.randn(2, 3, 2, 2, generator=generator).double()
    before = plain.clone()
    both = add_guidance(call(("uncond", "cond"), g), plain, push)
    assert_close(guided(both, g) - guided(plain, g), push, FORMULA)
    assert_close(both - plain, torch.cat([push, push]), FORMULA)
    if g != 1:
        kept = add_guidance(call(("uncond", "cond"), g, rescales=True), plain, push)
        assert_close(guided(kept, g) - guided(plain, g), push, FORMULA)
        assert torch.equal(kept[2:], plain[2:])  # the conditional one is what the others are measured by
        swapped = add_guidance(call(("cond", "uncond"), g, rescales=True), plain, push)
        assert torch.equal(swapped[:2], plain[:2]) and not torch.equal(swapped[2:], plain[2:])
    uncond, cond = plain.chunk(2)
    for branch, own, weight in (("cond", cond, g), ("uncond", uncond, 1 - g)):
        if weight:
            moved = add_guidance(call((branch,), g), own, push)
            assert_close((moved - own) * weight, push, FORMULA)
        else:
            with pytest.raises(UserError, match=f"the {branch} prediction counts nothing"):
                add_guidance(call((branch,), g), own, push)
    assert torch.equal(plain, before)


def test_guidance_without_a_scale():
    plain, push = torch.zeros(4, 3).double(), torch.ones(4, 3).double()
    for branches in (("all",), ("cond",), ("uncond", "cond")):
        assert torch.equal(add_guidance(call(branches), plain, push), plain + 1)
        assert torch.equal(add_guidance(call(branches, rescales=True), plain, push), plain + 1)  # nothing is guided
    with pytest.raises(UserError, match="does not say how strongly"):
        add_guidance(call(("uncond",)), plain, push)
    for branches, g in ((("cond",), 5.0), (("uncond", "cond"), 1.0), (("all",), 2.0)):
        with pytest.raises(UserError, match="guidance_rescale=0"):
            add_guidance(call(branches, g, rescales=True), plain, push)


def test_a_learned_variance_is_left_alone():
    plain, push = torch.zeros(4, 6, 2, 2), torch.ones(2, 3, 2, 2)
    for rescales in (False, True):
        made = add_guidance(call(("uncond", "cond"), 3.0, rescales), plain, push)
        assert bool((made[:2, :3] != 0).all()) and not made[:, 3:].any()


def test_maps_of_unlike_grids():
    """Cells of a coarse map are repeated on the grid of the finest, or on the one that is asked for."""
    fine, coarse = torch.arange(24.0).view(1, 2, 4, 3), torch.tensor([[[[1.0], [2.0]], [[3.0], [4.0]]]])
    want = torch.empty(1, 2, 4, 3)
    for c in range(2):
        for i in range(4):
            for j in range(3):
                want[0, c, i, j] = (fine[0, c, i, j] + coarse[0, c, i // 2, 0]) / 2
    assert torch.equal(merged([coarse, fine]), want) and torch.equal(merged([fine, coarse]), want)
    assert merged([fine], (8, 6)).shape == (1, 2, 8, 6)
    assert torch.equal(merged([fine], (8, 6))[..., ::2, ::2], fine)
    wide, tall = torch.ones(1, 1, 2, 9), torch.ones(1, 1, 5, 3)  # 18 cells beside 15
    assert merged([tall, wide]).shape == (1, 1, 2, 9)
    rows = torch.tensor([[[1.0, 3.0], [5.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]], [[-4.0, 4.0], [0.0, 0.0]]])
    assert is_close(scaled(rows), torch.tensor([[[0, 0.5], [1, 0.25]], [[0, 0], [0, 0]], [[0, 1], [0.5, 0.5]]]), CLOSE)


def test_places_that_a_prompt_has():
    for fine in ((0,), (4,), (0, 4, 2)):
        check_words(fine, 5, "x")
    for wrong, named in (((5,), 5), ((-1, 2), -1), ((1, 9, 7), 9), ((2, -3), -3)):
        with pytest.raises(UserError, match=f"x: the prompt has tokens 0 to 4, not {named}$"):
            check_words(wrong, 5, "x")
