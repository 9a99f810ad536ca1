# SPDX-License-Identifier: Apache-2.0
"""The pipeline of scenes: guidance, noise, words, saving; and the distance that its judge measures."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads  # noqa: E402
from manyheads.data import scenes as data  # noqa: E402
from manyheads.errors import UserError  # noqa: E402
from manyheads.models import judge, scenes  # noqa: E402
from tolerance import DRAWN, WRONG, assert_close, mean_error  # noqa: E402

SMALL = {
    "scenes": {"num_layers": 2}, "unet": {"block_out_channels": (8, 16)}, "moving": {"num_layers": 1},
    "moving3d": {"num_layers": 1},
}  # fmt: skip
PROMPT = {name: "fire, up, frog" if name.startswith("moving") else "fire, top left, frog" for name in SMALL}


def small(name):
    torch.manual_seed(0)
    pipe = scenes.build(name, **SMALL[name])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixels(pipe, prompt, **given):
    made = pipe(prompt, output_type="pt", generator=torch.Generator().manual_seed(0), num_inference_steps=3, **given)
    return made.frames if made.images is None else made.images


@pytest.mark.parametrize("name", scenes.NAMES)
def test_saved_and_loaded_it_is_the_same(name, tmp_path):
    pipe = small(name)
    want = pixels(pipe, PROMPT[name])
    pipe.save_pretrained(tmp_path)
    assert scenes.is_scene_pipeline(tmp_path) and list(tmp_path.rglob("*.safetensors"))
    assert torch.equal(pixels(scenes.load_scenes(tmp_path), PROMPT[name]), want)
    assert want.shape == ((1, 3, 8, 16, 16) if name.startswith("moving") else (1, 3, 32, 32))


@pytest.mark.parametrize("name", scenes.NAMES)
def test_guidance_is_that_of_two_calls_by_hand(name):
    """``u + g (c - u)`` with each branch predicted by itself; without captions there is nothing to guide."""
    pipe = small(name).to(torch.float64)
    noise = pipe.noise(1, torch.Generator().manual_seed(0))
    tokens = torch.tensor([data.read_caption(PROMPT[name], pipe.config.kind)])
    pipe.scheduler.set_timesteps(3)
    x = noise
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            without, within = (
                scenes.predict(pipe.denoiser, x, t, pipe.captions(row)) for row in (torch.zeros_like(tokens), tokens)
            )
            x = pipe.scheduler.step(without + 4 * (within - without), t, x, return_dict=False)[0]
    want = torch.nn.functional.pixel_shuffle(x, 2) if name == "unet" else x
    got = pixels(pipe, PROMPT[name], guidance_scale=4.0)
    assert_close(got, (want.float() / 2 + 0.5).clamp(0, 1))
    assert not torch.equal(got, pixels(pipe, PROMPT[name], guidance_scale=1.0))
    assert torch.equal(pixels(pipe, None, guidance_scale=4.0), pixels(pipe, "", guidance_scale=1.0))


def test_noise_is_that_of_the_generator_and_packs_pixels():
    pipe = small("unet")
    whole = pipe.noise(4, torch.Generator().manual_seed(0))
    source = torch.Generator().manual_seed(0)
    assert torch.equal(whole, torch.cat([pipe.noise(2, source), pipe.noise(2, source)]))
    assert torch.equal(pixels(pipe, "fire", latents=whole[:1]), pixels(pipe, "fire"))
    assert whole.shape == (4, 12, 16, 16)


def test_words_and_pictures():
    pipe = small("scenes")
    assert pipe.words("fire over a frog") == ["fire", "", "frog"] and set(pipe.vocabulary) == {
        "object", "place", "backdrop",
    }  # fmt: skip
    made = pipe(["fire", "ghost"], num_inference_steps=1, num_images_per_prompt=2)
    assert len(made.images) == 4 and made.images[0].size == (32, 32) and made.frames is None
    video = small("moving")("ghost", num_inference_steps=1)
    assert len(video.frames[0]) == data.FRAMES and video.images is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda p: p("dragon"), "not known"),
        (lambda p: p("fire", num_inference_steps=0), "at least 1"),
        (lambda p: p("fire", latents=torch.zeros(2, 3, 32, 32)), "2 latents for 1"),
        (lambda p: scenes.load_scenes("/nowhere"), "no model of scenes"),
    ],
)
def test_refusals_are_one_line(call, says):
    with pytest.raises(UserError, match=says) as raised:
        call(small("scenes"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", scenes.NAMES)
def test_strategies_act_on_it(name):
    pipe = small(name)
    plain = pixels(pipe, PROMPT[name])
    with manyheads.use(pipe, "sag:scale=0"):
        assert torch.equal(pixels(pipe, PROMPT[name]), plain)
    with manyheads.use(pipe, "sag:scale=2,mask=all" if name == "moving" else "sag:scale=2"):
        assert not torch.equal(pixels(pipe, PROMPT[name]), plain)
    assert torch.equal(pixels(pipe, PROMPT[name]), plain)


def test_frechet_distance():
    """Of Gaussians with diagonal covariance in closed form; zero of a set to itself; not blind to the covariance."""
    source = torch.Generator().manual_seed(0)
    z = torch.randn(4000, 3, generator=source, dtype=torch.float64)
    z = (z - z.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(z.T))).T  # exactly white
    a, b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([2.0, 1.0, 1.0]).double()
    shift = torch.tensor([0.3, -0.2, 1.0]).double()
    want = float((shift**2).sum() + ((a - b) ** 2).sum())
    assert judge.frechet(z * a, z * b + shift) == pytest.approx(want, rel=1e-9)
    assert judge.frechet(z, z) == pytest.approx(0, abs=1e-9)
    turned = torch.stack([z[:, 1], -z[:, 0], z[:, 2]], 1) * a  # same means, other covariance
    assert judge.frechet(z * a, turned @ torch.linalg.qr(torch.randn(3, 3, generator=source).double())[0]) > 0.1


def test_the_shipped_judge_sees_scenes():
    if not data.available():
        pytest.skip("CIFAR-10 and Noto Emoji are not on this machine")
    seer, results = judge.load_judge("scenes")
    sample = data.draw("scenes", 200, torch.Generator().manual_seed(5), "test")
    seen = seer.see(sample.images / 2 + 0.5)
    for kind, accuracy in results["accuracy"].items():
        right = seen.right(sample.labels, kind)
        assert mean_error(right, accuracy, (accuracy * (1 - accuracy)) ** 0.5) < DRAWN
        assert mean_error(right, accuracy - 0.1, ((accuracy - 0.1) * (1.1 - accuracy)) ** 0.5) > WRONG  # the control
    noise = seer.see(torch.rand(200, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert judge.frechet(noise.features, seen.features) > 20 * results["floor"]
    assert float(noise.right(sample.labels, "object").mean()) < 0.4
