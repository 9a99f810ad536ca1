# SPDX-License-Identifier: Apache-2.0
"""Guidance in one batch equals guidance by two calls, with every strategy, over denoisers of ten classes.

A small loop of denoising with classifier-free guidance is run three ways: conditional and unconditional rows in one
batch, as two calls in named contexts, and as two batches of a guider. What comes out has to be the same.
"""

from dataclasses import fields, replace

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance  # noqa: E402

import manyheads  # noqa: E402
from manyheads.diffusion.harmonpaint import Canvas, HarmonPaint  # noqa: E402
from manyheads.diffusion.headhunter import HeadHunter  # noqa: E402
from manyheads.diffusion.masactrl import MasaCtrl  # noqa: E402
from manyheads.diffusion.pab import PAB  # noqa: E402
from manyheads.errors import UserError  # noqa: E402
from manyheads.integrations.diffusers import DiffusersPort  # noqa: E402
from oracles import diffusion as tiny  # noqa: E402
from tolerance import MODEL, error, within  # noqa: E402

PICTURES = within(torch.float64, 4 * MODEL)  # a few steps of a sampler

FLOWS = ("sd3", "flux", "wan", "ltx", "hunyuan")
SHARED = ("txt_ids", "img_ids", "num_frames", "height", "width")  # arguments without rows
SCALE, STEPS = 3.0, 4
HOLE = torch.zeros(1, 1, 8, 8)
HOLE[..., :5, :4] = 1
OFF = ("pab:spatial=1,temporal=1,cross=1", "pab:upper=0.2,lower=0.1", "headhunter:heads=0.0,scale=0",
       "headhunter:heads=0.0,strength=0", "sag:scale=0", "masactrl:start_step=99,start_layer=0",
       HarmonPaint(canvas=Canvas(HOLE), alpha=0, shift=0))  # fmt: skip
ON = ("pab:spatial=2,temporal=3,cross=4,upper=999,lower=0.5", "headhunter:heads=0.0+1.1,strength=1", "sag:scale=2",
      "masactrl:start_step=1,start_layer=0", "masactrl:start_step=1,start_layer=0,union=True",
      HarmonPaint(canvas=Canvas(HOLE.double()), where="all"))  # fmt: skip
_models = {}

# Cross attention, joint attention, videos of both kinds; pipelines that are like them are slow.
KINDS = ("unet", "flux", "latte", "hunyuan", "pixart")
each = pytest.mark.parametrize("name", [n if n in KINDS else pytest.param(n, marks=pytest.mark.slow) for n in tiny.ALL])


class Loop:
    """As much of a pipeline as the port looks at. Two rows of each branch, a source and its target."""

    order = (1, 0)  # unconditional rows first; 0 is conditional

    def __init__(self, name: str, way: str, guider=None):
        if name not in _models:
            _models[name] = tiny.build(name).double()
        self.name, self.way, self.model = name, way, _models[name]
        kind = diffusers.FlowMatchEulerDiscreteScheduler if name in FLOWS else diffusers.DDIMScheduler
        self.scheduler = kind() if name in FLOWS else kind(clip_sample=False)
        self.components = {"unet" if name == "unet" else "transformer": self.model}
        if way == "guider":
            self.components["guider"] = guider or ClassifierFreeGuidance(guidance_scale=SCALE)
        self.given = [
            {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in made.items()}
            for made in (tiny.inputs(name), tiny.inputs(name, seed=1))
        ]
        if name == "dit":
            self.given[1]["class_labels"] = torch.tensor([7, 8])

    def predict(self, branch: int | None, x, t):
        """The denoiser's prediction for one branch (0 is conditional), for both in one batch if None."""
        rows = self.order if branch is None else (branch,)
        given = {
            key: value if key in SHARED else torch.cat([self.given[row][key] for row in rows])
            for key, value in self.given[0].items()
        }
        given[next(iter(given))] = torch.cat([x] * len(rows))
        time = t / 1000 if self.name == "flux" else t
        given["timestep"] = time.expand(len(rows) * len(x))
        return self.model(**given, return_dict=False)[0]

    def guided(self, i, x, t):
        if self.way == "guider":
            guider = self.components["guider"]
            guider.set_state(i, len(self.scheduler.timesteps), t)
            batches = guider.prepare_inputs({"branch": (0, 1)})
            for batch in batches:
                guider.prepare_models(self.model)
                batch.noise_pred = self.predict(batch.branch, x, t)
                guider.cleanup_models(self.model)
            return guider(batches).pred
        if self.way == "batch":
            made = self.predict(None, x, t).chunk(2)
            cond, uncond = (made[self.order.index(branch)] for branch in (0, 1))
        else:
            with self.model.cache_context("cond"):
                cond = self.predict(0, x, t)
            with self.model.cache_context("uncond"):
                uncond = self.predict(1, x, t)
        return uncond + SCALE * (cond - uncond)

    def conditions(self):
        """Of the conditional and of the unconditional branch, by which rows are known."""
        name = "class_labels" if self.name == "dit" else "encoder_hidden_states"
        return {"condition": self.given[0][name], "negative_condition": self.given[1][name]}

    @torch.no_grad()
    def __call__(self, guidance_scale: float = SCALE, condition=None, negative_condition=None):
        self.scheduler.set_timesteps(STEPS)
        x = next(iter(self.given[0].values()))
        for i, t in enumerate(self.scheduler.timesteps):
            pred = self.guided(i, x, t)
            if self.name in FLOWS:  # diffusers' own step rounds to float32
                x = x + (self.scheduler.sigmas[i + 1] - self.scheduler.sigmas[i]) * pred
            else:
                x = self.scheduler.step(pred, t, x).prev_sample
        return x


def ways(name):
    return ("batch", "context", "guider") if hasattr(type(Loop(name, "batch").model), "cache_context") else (
        "batch", "guider")  # fmt: skip


class Backwards(Loop):
    """Conditional rows first."""

    order = (0, 1)


def run(name, way, *strategies, times=1, kind=Loop):
    loop = kind(name, way)
    with DiffusersPort(loop, tuple(manyheads.parse(s) for s in strategies)) as port:
        made = [loop(**loop.conditions()) for _ in range(times)]
    return (made[0] if times == 1 else made), port


def split(name, *strategies):
    """The largest difference between the ways."""
    made = [run(name, way, *strategies)[0] for way in ways(name)]
    return max(error(each, made[0]) for each in made[1:])


def only(strategy, site):
    """The strategy at one site, as it showed itself when it ran."""
    kind = type(strategy)

    class One(kind):
        def selects(self, other):
            return other.name == site.name and super().selects(other)

    return One(**{f.name: getattr(strategy, f.name) for f in fields(strategy)})


@each
def test_off_is_bit_exact(name):
    for way in ("batch", "guider"):
        plain = Loop(name, way)()
        for spec in OFF:
            assert torch.equal(run(name, way, spec)[0], plain), (way, spec)


@each
def test_all_ways_are_one(name):
    assert split(name) < PICTURES
    plain = Loop(name, "batch")()
    for spec in (*ON, "headhunter:heads=0.1,perturbation=seg"):
        *made, (last, again) = [run(name, way, spec, times=1 + (way == "guider"))[0] for way in ways(name)]
        assert torch.equal(last, again), spec  # the second run is the first
        assert error(last, plain) > 1e-6, spec
        assert all(error(each, last) < PICTURES for each in made), spec


@each
def test_rows_are_known_in_any_order(name):
    for spec in ON:
        assert error(run(name, "batch", spec, kind=Backwards)[0], run(name, "batch", spec)[0]) < PICTURES


def test_rows_that_nothing_tells_are_refused():
    class Mute(Loop):
        """Neither its call nor its code says what is conditional."""

        def conditions(self):
            return {}

    for spec in ON[1:4]:
        with pytest.raises(UserError, match="which rows"):
            run("pixart", "batch", spec, kind=Mute)
    want = run("pixart", "batch", ON[0])[0]
    assert error(run("pixart", "batch", ON[0], kind=Mute)[0], want) < PICTURES  # modules have no rows


@pytest.mark.parametrize("name", ["pixart", "latte", "unet"])
def test_masks_are_those_of_the_conditional_rows(name):
    spec = "masactrl:start_step=1,start_layer=0,tokens=1+2,threshold=0.4"
    assert split(name, spec) < PICTURES
    assert error(run(name, "batch", spec)[0], run(name, "batch", ON[3])[0]) > 1e-9


@each
def test_several_at_once(name):
    sag, hunter, pab = "sag:scale=2", "headhunter:heads=0.0+1.1,strength=1", ON[0]
    assert split(name, hunter, pab) < PICTURES and split(name, sag, hunter) < PICTURES
    both, one = run(name, "batch", sag, hunter)[0], run(name, "batch", sag)[0]
    assert error(both, one) > 1e-6
    assert error(both, run(name, "batch", hunter, sag)[0]) < PICTURES  # what guides adds up, in any order


@each
def test_every_selected_site_counts(name):
    """Each site alone makes a difference, and the same one in every way of running."""
    plain = Loop(name, "batch")()
    for spec in (ON[0], ON[3]):
        strategy = manyheads.parse(spec)
        _, port = run(name, "batch", strategy)
        sites = [site for site, _ in port.kept(strategy) if strategy.selects(site)]
        assert sites
        for site in sites:
            made = run(name, "batch", only(strategy, site))[0]
            text = "refiner" in site.name  # of the prompt alone: nothing is used again or exchanged there
            assert torch.equal(made, plain) if text else error(made, plain) > 1e-9, site.name
    for layer in {site.layer for site, _ in port.kept(strategy) if site.kind != "cross"}:
        assert error(run(name, "batch", f"headhunter:heads={layer}.0,strength=1")[0], plain) > 1e-9


class Confused(PAB):
    """Branches share what is kept."""

    def around_module(self, site, step, state, compute):
        return super().around_module(site, step, step.run_state.setdefault(f"confused {site.name}", {}), compute)


class Unweighted(HeadHunter):
    """Pushes each branch as if it counted once."""

    def denoise(self, call):
        return super().denoise(replace(call, guidance_scale=1.0))


class Unpaired(MasaCtrl):
    """Takes the rows of a batch for one branch."""

    def attend(self, call):
        return super().attend(call.replace(diffusion=replace(call.diffusion, branches=("all",))))


@pytest.mark.parametrize("wrong", [
    Confused(upper=999.0, lower=0.5), Unweighted(heads=("0.0",)), Unpaired(start_step=1, start_layer=0),
])  # fmt: skip
def test_confused_branches_are_caught(wrong):
    right = next(kind for kind in type(wrong).__mro__ if kind.__module__.startswith("manyheads"))
    assert split("wan", right(**{f.name: getattr(wrong, f.name) for f in fields(wrong)})) < PICTURES
    assert split("wan", wrong) > 1e-6
