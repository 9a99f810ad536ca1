# SPDX-License-Identifier: Apache-2.0
"""Inpainting by the prediction alone: the blend of every step, resampling, and pixels that come back as they were."""

from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import manyheads
from manyheads.denoising import DenoiserCall, DiffusionStep
from manyheads.diffusion._inpainting import Canvas
from manyheads.diffusion._prediction import Prediction
from manyheads.diffusion.harmonpaint import HarmonPaint
from manyheads.errors import UserError
from manyheads.models.scenes import build
from oracles import pipelines
from tolerance import assert_close, error, is_far, within

STEPS, G = 5, 3.0
CHAIN = within(torch.float32)  # schedulers have their noise levels in float32, and a flow its samples


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hole_of(side=8):
    hole = torch.zeros(1, 1, side, side)
    hole[..., : side // 2, : side // 2 + 1] = 1
    return hole


def net(x, t):
    """A denoiser that looks across the whole image."""
    return torch.tanh(x.roll(1, -1) + x.roll(2, -2) * 0.7 + float(t) / 1000)


def scheduler_of(kind):
    if kind == "flow":
        made = diffusers.FlowMatchEulerDiscreteScheduler()
    else:
        made = diffusers.DDIMScheduler(clip_sample=False, prediction_type=kind, set_alpha_to_one=True)
    made.set_timesteps(STEPS)
    if kind == "flow":
        made.sigmas, made.timesteps = made.sigmas.double(), made.timesteps.double()
    return made


def both(here, t, guided, branch="", sample=None):
    """The net's unconditional prediction is half of its conditional one."""
    out = net(here if sample is None else sample, t)
    return torch.cat([out.chunk(2)[0] * 0.5, out.chunk(2)[1]]) if guided else out


def sampled(kind, strategy, x, guided=True):
    """A pipeline's loop, every prediction by the strategy."""
    scheduler, state = scheduler_of(kind), {}
    for i, t in enumerate(scheduler.timesteps):
        names = ("uncond", "cond") if guided else ("all",)
        step = DiffusionStep(1, i, STEPS, float(t), names, None, run_state=state)
        given = {"sample": torch.cat([x, x]) if guided else x}
        run = partial(both, given["sample"], t, guided)
        call = DenoiserCall(step, given, scheduler, G if guided else None, run, encode=lambda image, h, w: image)
        out = strategy.denoise(call)
        if guided:
            uncond, cond = out.chunk(2)
            out = uncond + G * (cond - uncond)
        x = scheduler.step(out, t, x, return_dict=False)[0]
    return x


def predicted(x, t, guided):
    return net(x, t) * (0.5 + G * (1 - 0.5) if guided else 1)


def levels(kind, scheduler, i):
    """Alpha and sigma before and after step i, read off the schedulers themselves."""
    if kind == "flow":
        return [(1 - float(s), float(s)) for s in scheduler.sigmas[i : i + 2]]
    total = scheduler.alphas_cumprod.double()
    stride = scheduler.config.num_train_timesteps // STEPS
    here = int(scheduler.timesteps[i])
    after = total[here - stride] if here >= stride else torch.tensor(1.0)
    return [(float(a) ** 0.5, (1 - float(a)) ** 0.5) for a in (total[here], after)]


KINDS = ("flow", "epsilon", "sample", "v_prediction")


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_the_blend(kind, guided):
    """Against a loop that puts noised known latents, of the run's own noise, in place after every step."""
    z, hole, noise = drawn(2, 3, 8, 8).clamp(-1, 1), hole_of() > 0, drawn(2, 3, 8, 8, seed=1)
    made = sampled(kind, HarmonPaint(canvas=Canvas(hole_of(), z)), noise, guided)
    scheduler, x = scheduler_of(kind), noise
    (a, s), _ = levels(kind, scheduler, 0)
    eps = (noise - a * z) / s
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(predicted(x, t, guided), t, x, return_dict=False)[0]
        _, (a, s) = levels(kind, scheduler, i)
        x = torch.where(hole, x, a * z + s * eps)
    assert_close(made, x, CHAIN)
    inside = hole.expand_as(z)
    assert_close(made[~inside], z[~inside], CHAIN)
    free = sampled(kind, HarmonPaint(canvas=Canvas(hole_of())), noise, guided)  # nothing is known: a control
    assert is_far(free[~inside], z[~inside], CHAIN) and is_far(free[inside], made[inside], CHAIN)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_resampling_goes_back_and_forth(kind, guided):
    z, hole, noise = drawn(2, 3, 8, 8).clamp(-1, 1), hole_of() > 0, drawn(2, 3, 8, 8, seed=1)
    made = sampled(kind, HarmonPaint(canvas=Canvas(hole_of(), z), resamples=3), noise, guided)
    scheduler, x, source = scheduler_of(kind), noise, torch.Generator().manual_seed(0)
    for i, t in enumerate(scheduler.timesteps):
        (a, s), (a_next, s_next) = levels(kind, scheduler, i)
        start = x
        for turn in range(3):
            here = torch.where(hole, predicted(x, t, guided), _says(kind, z, (x - a * z) / s))
            x0, eps = Prediction(a, s, kind).to_x0_eps(x, here)
            y = a_next * x0 + s_next * eps
            if turn < 2:
                spread = (s**2 - (a / a_next * s_next) ** 2) ** 0.5
                x = a / a_next * y + spread * torch.randn(x.shape, generator=source, dtype=x.dtype)
        assert start.shape == y.shape
        x = y
    assert_close(made, x, CHAIN)
    once = sampled(kind, HarmonPaint(canvas=Canvas(hole_of(), z)), noise, guided)
    inside = hole.expand_as(z)
    assert is_far(made[inside], once[inside], CHAIN) and error(made[~inside], once[~inside]) < CHAIN


def _says(kind, x0, eps):
    return eps if kind == "epsilon" else eps - x0


def test_a_prediction_says_what_it_is_made_of():
    x0, eps = drawn(2, 4), drawn(2, 4, seed=1)
    for kind in KINDS:
        rule = Prediction(0.8, 0.6 if kind != "flow" else 0.2, kind)
        again = rule.to_x0_eps(rule.add_noise(x0, eps), rule.output(x0, eps))
        assert_close(torch.stack(again), torch.stack([x0, eps]), within(torch.float64, 64))
        assert is_far(torch.stack(again), torch.stack([eps, x0]), within(torch.float64, 64))


@pytest.fixture(scope="module")
def scenes():
    torch.manual_seed(0)
    pipe = build("scenes")
    for weight in pipe.denoiser.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.06)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def files(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    hole = np.zeros((32, 32), np.uint8)
    hole[:20, :18] = 255
    for name, array in (("photo.png", image), ("hole.png", hole)):
        Image.fromarray(array).save(tmp_path / name)
    return str(tmp_path / "hole.png"), str(tmp_path / "photo.png"), image, hole > 127


@pytest.mark.parametrize("output", ["pil", "np", "pt"])
def test_kept_pixels_are_the_images_own(scenes, files, output):
    mask, photo, image, hole = files
    spec = f"harmonpaint:mask={mask},source={photo}"
    given = {"num_inference_steps": 3, "output_type": output, "generator": torch.Generator().manual_seed(0)}
    with manyheads.use(scenes, spec):
        made = scenes("apple top left ship", **given).images
    if output == "pil":
        got = np.asarray(made[0])
        assert np.array_equal(got[~hole], image[~hole]) and not np.array_equal(got[hole], image[hole])
    else:
        got = made[0].movedim(0, -1).numpy() if output == "pt" else made[0]
        assert np.array_equal(got[~hole], image[~hole].astype(np.float32) / 255)
    given["generator"] = torch.Generator().manual_seed(0)
    plain = scenes("apple top left ship", **given).images
    plain = np.asarray(plain[0]) if output == "pil" else plain[0]
    plain = plain.movedim(0, -1).numpy() if output == "pt" else plain
    assert not np.array_equal(plain[~hole], got[~hole])  # the control


def test_files_and_tensors_say_the_same(scenes, files):
    mask, photo, image, hole = files
    given = {
        "num_inference_steps": 3,
        "output_type": "pt",
        "latents": scenes.noise(1, torch.Generator().manual_seed(1)),
    }
    canvas = Canvas(torch.from_numpy(hole)[None, None], torch.from_numpy(image).movedim(-1, 0)[None] / 255)
    made = []
    for strategy in (HarmonPaint(mask=mask, source=photo), HarmonPaint(canvas=canvas)):
        with manyheads.use(scenes, strategy):
            made.append(scenes("apple top left ship", **given).images)
    assert torch.equal(*made)
    with manyheads.use(scenes, HarmonPaint(canvas=Canvas(~canvas.hole, canvas.image))):
        assert not torch.equal(scenes("apple top left ship", **given).images, made[0])


def solved(name):
    return pipelines.sd(scheduler=getattr(diffusers, name)(**({"clip_sample": False} if "DDIM" in name else {})))


SOLVERS = ("DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler")


@pytest.mark.parametrize("make", [*(partial(solved, name) for name in SOLVERS), pipelines.sd3])
def test_in_a_pipeline_with_an_autoencoder(make):
    """Latents that the hole does not touch are the image's at the end, and pixels outside of it are its pixels."""
    pipe = make()
    if make is pipelines.sd3:
        pipe.vae.register_to_config(shift_factor=0.1)
    given = pipelines.conditions(1, pooled=make is pipelines.sd3)
    image, hole = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(2)), hole_of()
    size = {"height": 8, "width": 8, "num_inference_steps": 3, "guidance_scale": 4.0}
    scale = 8 // given["latents"].shape[-1]
    assert scale == pipe.vae_scale_factor
    with manyheads.use(pipe, HarmonPaint(canvas=Canvas(hole, image), layers=(0, 1))):
        latents = pipe(**given, **size, output_type="latent").images
        pixels = pipe(**given, **size, output_type="pt", return_dict=False)[0]
    z = pipe.vae.encode(image * 2 - 1).latent_dist.mode() - (pipe.vae.config.shift_factor or 0)
    outside = (hole == 0).expand(1, 4, -1, -1)
    assert error(latents[outside], (z * pipe.vae.config.scaling_factor)[outside]) < within(torch.float32, 4096)
    assert is_far(latents[~outside], (z * pipe.vae.config.scaling_factor)[~outside], 1e-2)
    kept = (hole < 0.5).expand(1, 3, -1, -1)
    assert torch.equal(pixels[kept], image[kept]) and not torch.equal(pixels[~kept], image[~kept])


def test_refusals(scenes, files, tmp_path):
    mask, photo, *_ = files
    with pytest.raises(UserError, match="is no file; name an image"):
        HarmonPaint(mask=str(tmp_path / "none.png"))
    with pytest.raises(UserError, match="given in Python"):
        manyheads.parse(f"harmonpaint:canvas={mask}")
    with pytest.raises(UserError, match="at least once, not 0"):
        HarmonPaint(resamples=0)
    with pytest.raises(UserError, match=r"a hole \[B, 1, H, W\]"):
        Canvas(torch.zeros(8, 8))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UserError, match=r"text\.png is no image"):
        HarmonPaint(mask=str(tmp_path / "text.png")).opened()
    two = Canvas(torch.zeros(2, 1, 32, 32), torch.zeros(2, 3, 32, 32))
    with pytest.raises(UserError, match="2 images or holes for 3 rows"), manyheads.use(scenes, HarmonPaint(canvas=two)):
        scenes(["apple", "ghost", "tree"], num_inference_steps=2, guidance_scale=1.0)
    clips = solved("DPMSolverMultistepScheduler")
    strategy = HarmonPaint(canvas=Canvas(hole_of(), torch.zeros(1, 3, 8, 8)), resamples=2)
    with pytest.raises(UserError, match="give resamples=1, which any scheduler does"), manyheads.use(clips, strategy):
        pipelines.run_sd(clips)
    film = build("moving")
    film.set_progress_bar_config(disable=True)
    with (
        pytest.raises(UserError, match=r"latents are \[B, C, H, W\]"),
        manyheads.use(film, HarmonPaint(mask=mask, source=photo)),
    ):
        film("apple down ship", num_inference_steps=2)
