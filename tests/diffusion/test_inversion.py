# SPDX-License-Identifier: Apache-2.0
"""Inversion: steps taken backwards lead to the noise that an image comes from again; the noise of none does not."""

import numpy as np
import pytest
import torch
from PIL import Image

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from manyheads.diffusion.masactrl import invert  # noqa: E402
from manyheads.errors import UserError  # noqa: E402
from manyheads.models.scenes import load_scenes  # noqa: E402
from oracles import diffusion as tiny  # noqa: E402
from tolerance import error  # noqa: E402

STEPS = 12


def sampled_from(scheduler, x, predict):
    scheduler.set_timesteps(STEPS)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
def test_steps_backwards_undo_steps(kind):
    """With a denoiser that says the same everywhere they do so exactly, whatever it predicts."""
    if kind == "flow":
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    else:
        scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type=kind, set_alpha_to_one=False)
    source = torch.Generator().manual_seed(0)
    out, x = torch.randn(1, 3, 4, 4, generator=source), torch.randn(1, 3, 4, 4, generator=source)

    def predict(x, t):
        return out * float(t) / 1000

    scheduler.set_timesteps(STEPS)
    noise = invert(scheduler, x, predict, iterations=1)
    assert error(sampled_from(scheduler, noise, predict), x) < 1e-5
    assert error(sampled_from(scheduler, noise, lambda x, t: 1.1 * predict(x, t)), x) > 1e-3
    assert error(sampled_from(scheduler, 0.9 * noise, predict), x) > 1e-3


def test_iterations_come_to_the_solution_of_a_unet():
    model, text = tiny.tiny("unet"), torch.randn(1, 6, 12, generator=torch.Generator().manual_seed(2))
    scheduler = diffusers.DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", steps_offset=1)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def predict(x, t):
        with torch.no_grad():
            return 0.3 * model(x, t, encoder_hidden_states=text).sample

    off = []
    for iterations in (1, 3, 20):
        scheduler.set_timesteps(STEPS)
        noise = invert(scheduler, x, predict, iterations)
        off.append(error(sampled_from(scheduler, noise, predict), x))
    assert off[2] < 0.1 * off[1] and off[1] < 0.5 * off[0] and off[2] < 1e-3


@pytest.fixture(scope="module")
def picture():
    """An image that the pipeline did not make: two colours beside each other, blurred by scaling."""
    small = Image.new("RGB", (2, 2), (200, 60, 40))
    small.putpixel((1, 1), (30, 90, 220))
    return small.resize((32, 32), Image.Resampling.BICUBIC)


def test_an_image_comes_back_from_its_noise(picture):
    """Mean square error of the shipped model's reconstruction; the control starts from noise of no image."""
    pipe = load_scenes("scenes")
    want = torch.from_numpy(np.array(picture)).movedim(-1, 0)[None] / 255

    def off(noise):
        made = pipe("", num_inference_steps=STEPS, latents=noise, output_type="pt").images
        return float((made - want).square().mean())

    once, often = (off(pipe.invert(picture, STEPS, iterations)) for iterations in (1, 8))
    none = off(pipe.noise(1, torch.Generator().manual_seed(0)))
    assert often < 0.1 * once < 0.1 * none and often < 1e-3
    assert off(pipe.invert(picture, 2 * STEPS, 8)) > 10 * often  # another number of steps is another way back


def test_refusals(picture):
    x = torch.zeros(1, 3, 4, 4)
    for scheduler in (diffusers.DDIMScheduler(), diffusers.EulerDiscreteScheduler()):
        scheduler.set_timesteps(4)
        with pytest.raises(UserError, match="cannot be taken backwards"):
            invert(scheduler, x, lambda x, t: x)
    forgetting = diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample")
    forgetting.set_timesteps(4)
    with pytest.raises(UserError, match="nothing leads back"):
        invert(forgetting, x, lambda x, t: x)
    with pytest.raises(UserError, match="set_timesteps first"):
        invert(diffusers.DDIMScheduler(clip_sample=False), x, lambda x, t: x)
    with pytest.raises(UserError, match="at least one evaluation"):
        invert(diffusers.FlowMatchEulerDiscreteScheduler(), x, lambda x, t: x, 0)
    with pytest.raises(UserError, match="makes videos"):
        load_scenes("moving").invert(picture)
