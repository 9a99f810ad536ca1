# SPDX-License-Identifier: Apache-2.0
"""Runs and evaluations are counted from where they begin: solvers of second order, parts of a schedule, own loops."""

import gc
import weakref

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads  # noqa: E402
from manyheads.integrations.step_count import StepCounter  # noqa: E402
from manyheads.strategy import AttentionWatch  # noqa: E402
from oracles.pipelines import conditions, run_sd, sd  # noqa: E402
from tolerance import error  # noqa: E402


class Note(AttentionWatch):
    """Run, index and total of every call at the first site."""

    def selects(self, site):
        return site.index == 0

    def watch(self, call, out):
        step = call.diffusion
        call.state.setdefault("seen", []).append((step.run, step.index, step.total))


def noted(pipe, go):
    note = Note()
    with manyheads.use(pipe, note) as port:
        go()
    (branches,) = port.state(note).values()
    return [each for kept in branches.values() for each in kept["seen"]]


@pytest.mark.parametrize(
    "name",
    ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "PNDMScheduler",
     "UniPCMultistepScheduler", "DPMSolverSinglestepScheduler", "EulerDiscreteScheduler", "LCMScheduler"],
)  # fmt: skip
def test_every_evaluation_counts(name):
    """Also those of a solver that evaluates a timestep twice; every call of the pipeline is a run."""
    pipe = sd(scheduler=getattr(diffusers, name)())
    calls = []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    seen = noted(pipe, lambda: (run_sd(pipe, steps=4), run_sd(pipe, steps=4)))
    count = len(calls) // 2
    assert seen == [(run, index, count) for run in (1, 2) for index in range(count)]
    assert (count > 4) == (name in ("HeunDiscreteScheduler", "PNDMScheduler") or "KDPM2" in name)


def test_a_module_is_run_at_every_nth_evaluation():
    """With the place of a timestep among the scheduler's, both evaluations of a pair would be at one step."""
    pipe = sd(scheduler=diffusers.HeunDiscreteScheduler())
    pab = manyheads.parse("pab:spatial=2,cross=3,upper=1000,lower=-1")
    with manyheads.use(pipe, pab) as port:
        run_sd(pipe, steps=8)
    for site, branches in port.state(pab).items():
        (kept,) = branches.values()
        assert kept["counts"]["computed"] == (5 if "attn2" in site else 8), site
        assert kept["counts"]["computed"] + kept["counts"]["reused"] == 15
    places = [int((pipe.scheduler.timesteps == t).nonzero()[0]) for t in pipe.scheduler.timesteps]
    assert sum(place % 2 == 0 for place in places) == 1  # what the derived step would have run


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler"])
def test_a_part_of_the_schedule_is_counted_from_its_beginning(name):
    given = {key: x for key, x in conditions(1).items() if key != "latents"}
    pipe = sd("StableDiffusionImg2ImgPipeline", getattr(diffusers, name)())
    image = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))

    def go():
        pipe(**given, image=image, strength=0.5, num_inference_steps=8, guidance_scale=4.0, output_type="latent")

    count = 4 if name == "DDIMScheduler" else 7
    assert noted(pipe, go) == [(1, index, count) for index in range(count)]


def loop(pipe, timesteps, apart=False, seed=0):
    """Denoising as one writes it by hand."""
    given, x = conditions(1), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
    text = [given["negative_prompt_embeds"], given["prompt_embeds"]]
    with torch.no_grad():
        for t in timesteps:
            if apart:
                uncond, cond = (pipe.unet(x, t, encoder_hidden_states=each).sample for each in text)
            else:
                both = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat(text)).sample
                uncond, cond = both.chunk(2)
            x = pipe.scheduler.step(uncond + 4 * (cond - uncond), t, x).prev_sample
    return x


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("renewed", [False, True])
@pytest.mark.parametrize("part", [slice(None), slice(1, None), slice(None, None, -1)], ids=["all", "part", "backwards"])
def test_a_loop_of_ones_own(part, renewed, apart):
    """A pass over the timesteps, or over some, or from the last to the first, is a run, and so is the next."""
    pipe = sd()
    pipe.scheduler.set_timesteps(4)

    def go():
        for seed in range(2):
            if renewed:
                pipe.scheduler.set_timesteps(4)
            timesteps = pipe.scheduler.timesteps.flip(0) if part.step else pipe.scheduler.timesteps[part]
            loop(pipe, timesteps, apart, seed)

    count = len(range(4)[part])
    total = 3 if part.start else 1 if part.step else 4
    got = sorted(noted(pipe, go))
    want = [(run, index, max(total, index + 1)) for run in (1, 2) for index in range(count)]
    assert got == sorted(want * (2 if apart else 1))


def test_two_calls_of_a_loop_keep_what_is_theirs():
    """Outputs used again are those of the same condition, though nothing names the calls."""
    pipe = sd()
    pipe.scheduler.set_timesteps(6)
    spec = "pab:spatial=2,cross=2,upper=1000,lower=-1"
    with manyheads.use(pipe, spec):
        want, made = loop(pipe, pipe.scheduler.timesteps), loop(pipe, pipe.scheduler.timesteps, apart=True)
    assert error(made, want) < 1e-5
    assert error(made, loop(pipe, pipe.scheduler.timesteps)) > 1e-3


def test_two_evaluations_of_a_timestep_in_a_loop_are_one_run():
    counter, x = StepCounter(), torch.randn(5, 2, 4)

    class Schedule:
        timesteps = torch.tensor([900.0, 500.0, 100.0])

    def see(t, latents, **text):
        counter.see(t, [latents, *text.values()], "model", Schedule, None, False)
        return counter.run, counter.index

    by_hand = [see(t, x[i]) for i, t in enumerate((900.0, 500.0, 500.0, 100.0, 100.0))]
    assert by_hand == [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert see(900.0, x[0]) == (2, 0)  # left, and back
    cond, uncond = torch.zeros(2, 3), torch.ones(2, 3)
    assert see(500.0, x[1], text=cond) == see(500.0, x[1].clone(), text=uncond) == (2, 1)
    assert see(500.0, x[1], text=cond) == (3, 0)  # the very same call
    Schedule.timesteps = torch.tensor([999.0])
    assert [see(999.0, x[i]) for i in range(3)] == [(4, 0), (5, 0), (6, 0)]


def test_nothing_is_held_when_the_port_is_closed():
    """Neither latents nor embeddings; and while it is open, nothing as large as a ControlNet's residuals."""
    pipe, given, note = sd(), conditions(), Note()
    kept = weakref.ref(given["prompt_embeds"])
    with manyheads.use(pipe, note) as port:
        run_sd(pipe, given)
        assert kept() is not None
        del given
        assert kept() is not None  # by its rows, the next call's are known
    gc.collect()
    assert kept() is None and port.kept(note)
    counter, large = StepCounter(), torch.zeros(33, 8)
    held = weakref.ref(large)
    counter.see(500.0, [torch.zeros(1, 8), large], "model", None, None, True)
    del large
    assert held() is None
