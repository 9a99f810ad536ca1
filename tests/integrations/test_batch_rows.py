# SPDX-License-Identifier: Apache-2.0
"""Which rows of a batch are conditional: as the pipeline says it, never by their number."""

import importlib

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads  # noqa: E402
from manyheads.call import DenoiserCall, DiffusionStep  # noqa: E402
from manyheads.diffusion._prediction import add_guidance  # noqa: E402
from manyheads.errors import UserError  # noqa: E402
from manyheads.integrations import pipeline_state  # noqa: E402
from manyheads.integrations.batch_rows import PromptRows, _stated, rescales, rows_of  # noqa: E402
from manyheads.strategy import AttentionWatch  # noqa: E402
from oracles.pipelines import conditions, row_of, run_sd, sd, sd3  # noqa: E402
from tolerance import CLOSE, MODEL, error, within  # noqa: E402

PICTURES = within(torch.float32, 4 * MODEL)  # a few steps of a sampler

GUIDES = ("sag:scale=0.75", "headhunter:heads=0.0,strength=1")
PAB = "pab:spatial=2,cross=2,upper=1000,lower=-1"
SKIP = {"skip_guidance_layers": [0], "skip_layer_guidance_start": -1, "skip_layer_guidance_stop": 2}


class Note(AttentionWatch):
    """The branches, and the rows of the queries, of every call."""

    def watch(self, call, out):
        call.state.setdefault("seen", []).append((call.diffusion.branches, call.q.shape[0]))


def together_and_alone(pipe, given, spec, **more):
    """Rows made in one batch, the same made one by one, and without a strategy."""

    def made(rows):
        with manyheads.use(pipe, spec):
            return run_sd(pipe, rows, **more)

    alone = torch.cat([made(row_of(given, i)) for i in range(len(given["latents"]))])
    return made(given), alone, run_sd(pipe, given, **more)


def guessed(pipe, name, given, guided, prompts):
    """What rows would be if their number told."""
    rows = len(next(iter(given.values())))
    return ("uncond", "cond") if guided and rows % 2 == 0 else ("all",)


@pytest.mark.parametrize(
    "spec", [GUIDES[0], "headhunter:heads=1.0,strength=1", PAB], ids=lambda spec: spec.split(":")[0]
)
def test_a_call_of_another_guidance(spec, monkeypatch):
    """SD3 makes a call with the conditional rows and some layers left out; of two prompts it has an even number."""
    pipe, given = sd3(), conditions(2, pooled=True)
    both, alone, plain = together_and_alone(pipe, given, spec, **SKIP)
    assert error(both, alone) < PICTURES and error(both, plain) > 1e-4
    monkeypatch.setattr(pipeline_state, "rows_of", guessed)
    both, alone, _ = together_and_alone(pipe, given, spec, **SKIP)
    assert (error(both, alone) > 1e-3) == (spec != PAB)  # which has to tell calls apart, not rows


@pytest.mark.parametrize("guidance", [4.0, 1.0])
def test_perturbed_attention_guidance(guidance):
    pipe, given = sd("StableDiffusionPAGPipeline", pag_applied_layers=["down"]), conditions(2)
    note, more = Note(), {"guidance_scale": guidance, "pag_scale": 2.0}
    with manyheads.use(pipe, note) as port:
        run_sd(pipe, given, **more)
    branches = ("uncond", "cond", "perturbed") if guidance > 1 else ("cond", "perturbed")
    whole, part = (branches, 2 * len(branches)), (branches[:-1], 2 * len(branches) - 2)
    for site, kept in port.state(note).items():
        seen = {each for state in kept.values() for each in state["seen"]}
        perturbs = site.startswith("down") and "attn1" in site
        assert seen == {part if perturbs else whole}, site
    both, alone, plain = together_and_alone(pipe, given, PAB, **more)
    assert error(both, alone) < PICTURES and error(both, plain) > 1e-4
    with manyheads.use(pipe, "masactrl:start_step=1,start_layer=0"):
        assert error(run_sd(pipe, given, **more), plain) > 1e-4
    for spec in GUIDES:
        with pytest.raises(UserError, match="give pag_scale=0"), manyheads.use(pipe, spec):
            run_sd(pipe, given, **more)
        assert torch.equal(run_sd(pipe, given, **more), plain)
        off = {**more, "pag_scale": 0.0}
        with manyheads.use(pipe, spec):
            made = run_sd(pipe, given, **off)
        with manyheads.use(usual := sd(), spec):
            assert torch.equal(made, run_sd(usual, given, guidance_scale=guidance))


@pytest.mark.parametrize("spec", GUIDES, ids=lambda spec: spec.split(":")[0])
def test_guidance_that_is_rescaled(spec, monkeypatch):
    """To the deviation of the conditional prediction, which a guide beside it must not change."""
    module = importlib.import_module("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    caught, rescale = [], module.rescale_noise_cfg

    def spy(noise_cfg, noise_pred_text, guidance_rescale=0.0):
        caught.append((noise_cfg, noise_pred_text))
        return rescale(noise_cfg, noise_pred_text, guidance_rescale=guidance_rescale)

    monkeypatch.setattr(module, "rescale_noise_cfg", spy)
    pipe, more = sd(), {"steps": 1, "guidance_rescale": 0.7}
    run_sd(pipe, **more)
    with manyheads.use(pipe, spec):
        run_sd(pipe, **more)
    (plain_guided, plain_text), (guided, text) = caught
    assert torch.equal(text, plain_text) and error(guided, plain_guided) > 1e-3
    monkeypatch.setattr(pipeline_state, "rescales", lambda pipe, asked: False)
    with manyheads.use(pipe, spec):
        run_sd(pipe, **more)
    assert error(caught[2][1], plain_text) > 1e-3
    assert error(caught[2][0], guided) < CLOSE  # what it is moved by is the same


def test_guidance_that_cannot_be_moved_is_refused():
    x = torch.ones(2, 3)

    def moved(branches, g=4.0, rescaled=True):
        step = DiffusionStep(1, 0, 4, 500.0, branches, None)
        return add_guidance(DenoiserCall(step, {}, None, g, lambda: x, rescaled), torch.zeros(len(x), 3), x)

    with pytest.raises(UserError, match="guidance_rescale=0"):
        moved(("cond",))
    assert torch.equal(moved(("uncond",)), x / (1 - 4.0)) and torch.equal(moved(("cond",), rescaled=False), x / 4.0)
    qwen, lumina = object.__new__(diffusers.QwenImagePipeline), object.__new__(diffusers.Lumina2Pipeline)
    assert rescales(qwen, {}) and rescales(lumina, {"cfg_normalization": True})
    assert not rescales(lumina, {"cfg_normalization": False}) and not rescales(sd(), {"guidance_rescale": 0.0})


@pytest.mark.parametrize("spec", [*GUIDES, PAB], ids=lambda spec: spec.split(":")[0])
def test_several_prompts_and_several_images(spec):
    pipe, given = sd(), conditions(2)
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    with manyheads.use(pipe, spec):
        made = run_sd(pipe, {**given, "latents": noise}, num_images_per_prompt=2)
        alone = torch.cat([
            run_sd(pipe, {**row_of(given, i // 2), "latents": noise[i : i + 1]}) for i in range(4)
        ])  # fmt: skip
    assert error(made, alone) < PICTURES


@pytest.mark.parametrize("same", ["both", "one"])
def test_prompts_that_are_the_negative_prompt(same):
    """Their rows cannot be told from the negative ones by value, and the order still can."""
    given, note = conditions(2), Note()
    given["prompt_embeds"][0] = given["negative_prompt_embeds"][0]
    given["negative_prompt_embeds"][1] = given["negative_prompt_embeds"][0]
    if same == "both":
        given["prompt_embeds"][1] = given["prompt_embeds"][0]
    pipe = sd()
    with manyheads.use(pipe, note) as port:
        run_sd(pipe, given)
    assert {key for kept in port.state(note).values() for key in kept} == {"uncond+cond"}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("StableDiffusionPipeline", ("uncond", "cond")), ("PixArtAlphaPipeline", ("uncond", "cond")),
        ("DiTPipeline", ("cond", "uncond")), ("LuminaPipeline", ("cond", "uncond")),
        ("StableCascadePriorPipeline", ("cond", "uncond")), ("StableCascadeDecoderPipeline", ("cond", "uncond")),
        ("StableDiffusionInstructPix2PixPipeline", ("cond", "image", "uncond")),
        ("StableDiffusionXLInstructPix2PixPipeline", ("cond", "image", "uncond")),
        ("StableVideoDiffusionPipeline", ("uncond", "cond")), ("FluxPipeline", None), ("WanPipeline", None),
    ],
)  # fmt: skip
def test_what_the_call_of_a_class_says(name, order):
    kind = getattr(diffusers, name)
    assert _stated(kind) == order == _stated(type("Own", (kind,), {}))
    pipe, sample = object.__new__(kind), torch.zeros(6, 2)
    got = rows_of(pipe, None, {"sample": sample}, True, PromptRows())
    assert got == (("unknown",) if order is None else order)
    if order is not None:
        assert rows_of(pipe, None, {"sample": sample[:5]}, True, PromptRows()) == ("unknown",)
    assert rows_of(pipe, None, {"sample": sample}, False, PromptRows()) == ("all",)


def test_embeddings_say_more_than_the_code():
    """A call with the conditional rows alone, under a class whose code takes batches apart."""
    pipe, prompts, given = sd(), PromptRows(), conditions(2)
    prompts.add(given)
    cond, uncond = given["prompt_embeds"], given["negative_prompt_embeds"]
    for rows, want in (
        ([uncond, cond], ("uncond", "cond")), ([cond, uncond], ("cond", "uncond")), ([cond], ("cond",)),
        ([uncond], ("uncond",)), ([cond, cond], ("cond",)), ([cond, torch.zeros_like(cond)], ("uncond", "cond")),
    ):  # fmt: skip
        text = {"sample": given["latents"], "added": [{"text": torch.cat(rows)}]}
        assert rows_of(pipe, None, text, True, prompts) == want
    assert rows_of(pipe, None, {"text": torch.cat([cond, uncond])}, None, prompts) == ("cond", "uncond")
    assert rows_of(pipe, None, {"text": torch.zeros_like(cond)}, None, prompts) == ("all",)


def by_hand(pipe, x, cond, uncond, apart=False):
    """Denoising in a loop of one's own, without guidance where there is no ``uncond``."""
    pipe.scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in pipe.scheduler.timesteps:
            texts = [text for text in (uncond, cond) if text is not None]
            if apart or len(texts) == 1:
                made = [pipe.unet(x, t, encoder_hidden_states=text).sample for text in texts]
            else:
                made = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat(texts)).sample.chunk(2)
            x = pipe.scheduler.step(made[0] + 4.0 * (made[-1] - made[0]), t, x).prev_sample
    return x


@pytest.mark.parametrize("spec", GUIDES, ids=lambda spec: spec.split(":")[0])
def test_rows_of_a_loop_of_ones_own(spec):
    """They are known from what the pipeline's ``encode_prompt`` returned in the block; else guides refuse."""
    pipe, given = sd(), conditions(2)
    x, *texts = (given[name] for name in ("latents", "prompt_embeds", "negative_prompt_embeds"))
    with manyheads.use(pipe, spec):
        want = run_sd(pipe, given)
        names = ("prompt_embeds", "negative_prompt_embeds")
        encoded = pipe.encode_prompt(None, "cpu", 1, True, **{name: given[name] for name in names})
        assert error(by_hand(pipe, x, *encoded), want) < 1e-5
    for apart in (False, True):
        with pytest.raises(UserError, match="call encode_prompt"), manyheads.use(pipe, spec):
            by_hand(pipe, x, *texts, apart=apart)
    with manyheads.use(pipe, spec):  # without guidance there is nothing to tell
        made = by_hand(pipe, x, texts[0], None)
        assert error(made, run_sd(pipe, given, guidance_scale=1.0)) < 1e-5
    assert error(made, by_hand(pipe, x, texts[0], None)) > 1e-4
