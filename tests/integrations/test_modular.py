# SPDX-License-Identifier: Apache-2.0
"""Modular pipelines: strategies act in them as in classic ones, through ``use`` and through a guider of ours."""

from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from diffusers.guiders.adaptive_projected_guidance import AdaptiveProjectedGuidance  # noqa: E402
from diffusers.guiders.auto_guidance import AutoGuidance  # noqa: E402
from diffusers.guiders.classifier_free_guidance import ClassifierFreeGuidance  # noqa: E402
from diffusers.guiders.perturbed_attention_guidance import PerturbedAttentionGuidance  # noqa: E402
from diffusers.guiders.skip_layer_guidance import SkipLayerGuidance  # noqa: E402
from diffusers.guiders.smoothed_energy_guidance import SmoothedEnergyGuidance  # noqa: E402
from diffusers.hooks import LayerSkipConfig  # noqa: E402

import manyheads  # noqa: E402
from manyheads.diffusion._prediction import add_guidance  # noqa: E402
from manyheads.diffusion.pab import PAB  # noqa: E402
from manyheads.errors import UserError  # noqa: E402
from manyheads.integrations.diffusers import DiffusersPort  # noqa: E402
from manyheads.integrations.guider import Guider, around  # noqa: E402
from manyheads.integrations.pipeline_state import PipelineObserver  # noqa: E402
from manyheads.strategy import AttentionWatch  # noqa: E402
from oracles import diffusion as tiny  # noqa: E402
from oracles import fingerprint, modular  # noqa: E402
from oracles.modular import PAIRS, SCALE  # noqa: E402
from tolerance import MODEL, SAME, error, within  # noqa: E402

LIMITS = {
    "wan": 0.0,
    "wan22": 0.0,
    "sd3": SAME,
    "sdxl": within(torch.float64, 4 * MODEL),
}  # SD3's scheduler rounds to float32
HUNTER = "headhunter:heads=0.0+1.1,strength=1"
OFF = (["pab:spatial=1,cross=1"], ["pab:upper=0.2,lower=0.1"], ["headhunter:heads=0.0,scale=0"], ["sag:scale=0"],
       ["masactrl:start_step=99,start_layer=0"])  # fmt: skip
ON = (["pab:upper=990,lower=-1"], [HUNTER], ["sag:scale=2"], ["masactrl:start_step=1,start_layer=0"],
      ["sag:scale=2", HUNTER, "masactrl:start_step=1,start_layer=0"])  # fmt: skip


class Note(AttentionWatch):
    def watch(self, call, out):
        call.state.setdefault("seen", []).append(call.diffusion)


class Fail(AttentionWatch):
    def watch(self, call, out):
        if call.diffusion.index == 1:
            raise KeyError("stop")


def used(name, *specs):
    pipe = PAIRS[name].modular()
    with manyheads.use(pipe, *specs):
        return PAIRS[name].run_modular(pipe)


@pytest.mark.parametrize("name", PAIRS)
def test_off_is_bit_exact(name):
    pair = PAIRS[name]
    pipe = pair.modular()
    plain = pair.run_modular(pipe)
    for specs in ([], *OFF):
        with manyheads.use(pipe, *specs):
            assert torch.equal(pair.run_modular(pipe), plain), specs
        if name != "wan22":
            made = pair.modular(Guider(specs, guidance_scale=SCALE))
            made.guider.act(specs, made.scheduler)
            assert torch.equal(pair.run_modular(made), plain), specs


@pytest.mark.parametrize("specs", ON, ids=lambda specs: specs[-1].split(":")[0] + str(len(specs)))
@pytest.mark.parametrize("name", PAIRS)
def test_as_in_the_classic_pipeline(name, specs):
    pair = PAIRS[name]
    pipe, old = pair.modular(), pair.classic()
    plain = pair.run_modular(pipe)
    assert error(plain, pair.run_classic(old)) <= LIMITS[name]
    with manyheads.use(pipe, *specs):
        made = [pair.run_modular(pipe) for _ in range(2)]
    with manyheads.use(old, *specs):
        want = pair.run_classic(old)
    assert torch.equal(*made) and torch.equal(pair.run_modular(pipe), plain)
    assert error(made[0], plain) > 1e-6 and error(made[0], want) <= LIMITS[name]
    if name != "wan22":
        guided = pair.modular(Guider(guidance_scale=SCALE))
        guided.update_components(guider=Guider(specs, guided.scheduler, guidance_scale=SCALE))
        assert torch.equal(pair.run_modular(guided), made[0]) and torch.equal(pair.run_modular(guided), made[0])
        guided.update_components(guider=ClassifierFreeGuidance(guidance_scale=SCALE))
        assert torch.equal(pair.run_modular(guided), plain)


@pytest.mark.parametrize("specs", [ON[0], ON[1], ON[2]], ids=["pab", "headhunter", "sag"])
def test_a_port_deaf_to_guiders_is_caught(specs, monkeypatch):
    pair = PAIRS["wan"]
    pipe, old = pair.modular(), pair.classic()
    with manyheads.use(old, *specs):
        want = pair.run_classic(old)
    monkeypatch.setattr(PipelineObserver, "_observe_batches", lambda self, guider, name: lambda: None)
    with manyheads.use(pipe, *specs):
        off = error(pair.run_modular(pipe), want)
    assert off > 1e-6 if specs is not ON[0] else off == 0  # calls of one evaluation are kept apart, named or not


def test_a_guider_put_in_its_place_meanwhile():
    pair = PAIRS["wan"]
    pipe = pair.modular()
    with manyheads.use(pipe, HUNTER):
        want = pair.run_modular(pipe)
        pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=SCALE))
        assert torch.equal(pair.run_modular(pipe), want)
    assert not any("prepare_inputs" in vars(part) for part in pipe.components.values() if hasattr(part, "__dict__"))


def test_what_is_told():
    """Step and branch are the guider's; in steps without guidance there is the conditional prediction only."""
    guider, note = ClassifierFreeGuidance(guidance_scale=SCALE, start=0.5), Note()
    pipe = modular.sdxl(guider)
    with manyheads.use(pipe, note) as port:
        modular.run_sdxl(pipe)
        modular.run_sdxl(pipe)
    for kept in port.state(note).values():
        assert set(kept) == {"cond", "uncond"}
        for branch, steps in (("cond", [0, 1, 2, 3]), ("uncond", [2, 3])):
            seen = kept[branch]["seen"]
            assert [step.index for step in seen] == steps * 2 and {step.total for step in seen} == {4}
            assert [step.run for step in seen] == [1] * len(steps) + [2] * len(steps)
            assert {step.timestep for step in seen} <= set(pipe.scheduler.timesteps.tolist())
    alone = modular.sdxl(Guider(note, guidance_scale=SCALE))  # knows no scheduler, and the same
    modular.run_sdxl(alone)
    modular.run_sdxl(alone)
    (port,) = alone.guider.ports
    for kept in port.state(note).values():
        seen = kept["uncond"]["seen"]
        assert [step.index for step in seen] == [0, 1, 2, 3] * 2 and {step.total for step in seen} == {4}
        assert [step.run for step in seen] == [1] * 4 + [2] * 4


def test_two_denoisers_and_two_guiders():
    pipe, note = modular.wan22(), Note()
    with manyheads.use(pipe, note) as port:
        modular.run_wan(pipe)
    for site, kept in port.state(note).items():
        steps = [2, 3] if site.startswith("transformer_2.") else [0, 1]
        assert {branch: [step.index for step in state["seen"]] for branch, state in kept.items()} == {
            "cond": steps, "uncond": steps,
        }  # fmt: skip


@pytest.mark.parametrize("way", ["use", "guider"])
def test_an_exception_leaves_nothing(way):
    pair = PAIRS["wan"]
    guider = Guider([Fail(), HUNTER, "pab"], guidance_scale=SCALE) if way == "guider" else None
    pipe = pair.modular(guider)
    before, kind = fingerprint.of_model(pipe.transformer), type(pipe)
    with pytest.raises(KeyError, match="stop"):
        if way == "guider":
            pair.run_modular(pipe)
        else:
            with manyheads.use(pipe, Fail(), HUNTER, "pab"):
                pair.run_modular(pipe)
    fingerprint.assert_same(fingerprint.of_model(pipe.transformer), before)
    assert type(pipe) is kind and not {"prepare_inputs", "prepare_inputs_from_block_state"} & set(vars(pipe.guider))
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=SCALE))
    assert torch.equal(pair.run_modular(pipe), pair.run_modular(pair.modular()))


@torch.no_grad()
def test_nothing_is_open_between_calls_of_the_denoiser():
    pipe = modular.wan(Guider([HUNTER, "pab"], guidance_scale=SCALE))
    before, seen, step = fingerprint.of_model(pipe.transformer), [], pipe.scheduler.step

    def looking(*args, **kwargs):
        fingerprint.assert_same(fingerprint.of_model(pipe.transformer), before)
        seen.append(True)
        return step(*args, **kwargs)

    pipe.scheduler.step = looking
    modular.run_wan(pipe)
    assert len(seen) == 4
    pipe.guider.prepare_models(pipe.transformer)  # and if the call never comes
    pipe.guider.cleanup_models(pipe.transformer)
    fingerprint.assert_same(fingerprint.of_model(pipe.transformer), before)


def one_step(guider, *strategies, branch=None):
    """A guider's prediction in the middle of a run; the plain one of one branch where there is no guider."""
    model = tiny.tiny("pixart")
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(10)
    given = [tiny.inputs("pixart", seed=seed) for seed in (0, 1)]
    parts = {"transformer": model, **({} if guider is None else {"guider": guider})}
    pipe = type("Pipe", (SimpleNamespace,), {"__call__": lambda self: None})(components=parts, scheduler=scheduler)

    def predict(which):
        text = {"encoder_hidden_states": given[which]["encoder_hidden_states"]}
        return model(**{**given[0], **text, "timestep": scheduler.timesteps[5].expand(2)}, return_dict=False)[0]

    with torch.no_grad(), DiffusersPort(pipe, tuple(manyheads.parse(s) for s in strategies)):
        if guider is None:
            return predict(branch)
        guider.set_state(5, 10, scheduler.timesteps[5])
        batches = guider.prepare_inputs({"branch": (0, 1)})
        for batch in batches:
            guider.prepare_models(model)
            batch.noise_pred = predict(batch.branch)
            guider.cleanup_models(model)
        return guider(batches).pred


AFFINE = {
    "cfg": lambda: ClassifierFreeGuidance(guidance_scale=4.0),
    "original": lambda: ClassifierFreeGuidance(guidance_scale=4.0, use_original_formulation=True),
    "stopped": lambda: ClassifierFreeGuidance(guidance_scale=4.0, stop=0.3),
    "off": lambda: ClassifierFreeGuidance(guidance_scale=1.0),
    "auto": lambda: AutoGuidance(
        guidance_scale=3.0, auto_guidance_config=LayerSkipConfig(indices=[1], fqn="transformer_blocks")
    ),
    "pag": lambda: PerturbedAttentionGuidance(
        guidance_scale=4.0, perturbed_guidance_layers=[0], perturbed_guidance_stop=1.0
    ),
    "slg": lambda: SkipLayerGuidance(
        guidance_scale=4.0,
        skip_layer_config=LayerSkipConfig(indices=[0], fqn="transformer_blocks"),
        skip_layer_guidance_stop=1.0,
    ),
    "seg": lambda: SmoothedEnergyGuidance(guidance_scale=4.0, seg_guidance_layers=[0], seg_guidance_stop=1.0),
}


@pytest.mark.parametrize("name", AFFINE)
def test_the_push_is_the_same_whatever_guides(name):
    """Guidance by strategies counts on top of the guided prediction, however that is made of its predictions."""
    for spec, branch in ((HUNTER, 0), ("sag:scale=2", 0 if name in ("stopped", "off") else 1)):
        if (name, branch) == ("auto", 1):
            continue  # its unconditional prediction is another model's
        want = one_step(None, spec, branch=branch) - one_step(None, branch=branch)
        got = one_step(AFFINE[name](), spec) - one_step(AFFINE[name]())
        assert want.abs().max() > 1e-3
        assert error(got, want) < SAME, spec


def test_a_guider_without_a_scale():
    for guider in (
        AdaptiveProjectedGuidance(guidance_scale=4.0), ClassifierFreeGuidance(guidance_scale=4.0, guidance_rescale=0.5),
    ):  # fmt: skip
        for spec in (HUNTER, "sag"):
            with pytest.raises(UserError, match="by which scale predictions are combined"):
                one_step(guider, spec)
        for spec in ("pab", "masactrl:start_step=1,start_layer=0"):
            assert one_step(guider, spec).isfinite().all()


def test_a_prediction_that_counts_nothing_and_one_that_is_no_tensor():
    call = SimpleNamespace(guidance_scale=1.0, step=SimpleNamespace(branches=("uncond",)), rescales=False)
    with pytest.raises(UserError, match="uncond prediction counts nothing"):
        add_guidance(call, torch.zeros(1, 1), torch.ones(1, 1))
    model = tiny.build("pixart")
    inner = model.forward
    model.forward = lambda *args, **kwargs: (list(inner(*args, **kwargs)[0]),)
    with pytest.raises(UserError, match="predicts no single tensor"), manyheads.use(model, HUNTER):
        model(**tiny.inputs("pixart"), return_dict=False)


def test_around_another_guider():
    pair, inner = PAIRS["wan"], AdaptiveProjectedGuidance(guidance_scale=SCALE)
    pipe = pair.modular(inner)
    with manyheads.use(pipe, *ON[0]):
        want = pair.run_modular(pipe)
    made = around(inner, ON[0])
    assert isinstance(made, AdaptiveProjectedGuidance) and made is not inner
    assert not hasattr(inner, "ports") and made.guidance_scale == SCALE
    assert torch.equal(pair.run_modular(pair.modular(made)), want)
    assert torch.equal(pair.run_modular(pair.modular(made.new())), want)
    (port,) = made.ports
    counts = [state["counts"] for kept in port.state(made.strategies[0]).values() for state in kept.values()]
    assert len(counts) == 8 and all(each["reused"] > 0 for each in counts)


def test_a_guider_is_its_config():
    guider = Guider(HUNTER, guidance_scale=3.0)
    assert guider.config["strategies"] == [manyheads.parse(HUNTER).spec] and guider.config["guidance_scale"] == 3.0
    for made in (Guider.from_config(guider.config), guider.new()):
        assert made.strategies == guider.strategies and made.guidance_scale == 3.0
    assert guider.new(guidance_scale=2.0).guidance_scale == 2.0
    assert "headhunter" in repr(guider)
    with pytest.raises(UserError, match="no field 'hats'"):
        Guider("headhunter:hats=1")
    with pytest.raises(UserError, match="a Guider is given it"):
        modular.run_wan(modular.wan(Guider("sag", guidance_scale=SCALE)))


def alone_as_in_company(begin, end):
    """How far unconditional predictions of a run are from the same calls made again without the conditional ones."""
    pipe, made = modular.wan(), []

    def note(_, args, kwargs, output):
        made.append((kwargs, output[0]))

    begin(pipe)
    handle = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    modular.run_wan(pipe)
    handle.remove()
    end(pipe)
    uncond = [(given, out) for given, out in made if torch.equal(given["encoder_hidden_states"], modular.TEXT[1])]
    assert len(uncond) == len(made) // 2 == 4
    begin(pipe)
    with torch.no_grad():
        worst = max(error(pipe.transformer(**given)[0], out) for given, out in uncond)
    end(pipe)
    return worst


def test_outputs_used_again_are_a_branchs_own():
    """Diffusers' own cache gives the unconditional prediction the other's outputs, for as long as it does."""
    from diffusers import PyramidAttentionBroadcastConfig

    port = {}

    def ours(pipe):
        port["open"] = manyheads.use(pipe, PAB(spatial=2, cross=2, upper=990.0, lower=0.0)).__enter__()

    assert alone_as_in_company(ours, lambda pipe: port["open"].__exit__(None, None, None)) == 0
    step = {}

    def theirs(pipe):
        step["hook"] = pipe.transformer.register_forward_pre_hook(
            lambda _, args, kwargs: step.update(t=float(kwargs["timestep"][0])), with_kwargs=True
        )
        pipe.transformer.enable_cache(
            PyramidAttentionBroadcastConfig(
                spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 990),
                cross_attention_block_skip_range=2, cross_attention_timestep_skip_range=(0, 990),
                current_timestep_callback=lambda: step["t"],
            )
        )  # fmt: skip

    def over(pipe):
        pipe.transformer.disable_cache()
        step["hook"].remove()

    if alone_as_in_company(theirs, over) < 1e-5:
        pytest.skip("this diffusers keeps branches apart")
