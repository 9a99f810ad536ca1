# SPDX-License-Identifier: Apache-2.0
"""Surgery: the cut model is the masked one, files give it again, and what cannot be cut is refused."""

import copy
import dataclasses
import json

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from manyheads.conversion import (
    Assign,
    Configure,
    Drop,
    Factorise,
    Prune,
    Replace,
    Share,
    SurgeryPlan,
    choose_heads,
    largest,
)
from manyheads.errors import UserError
from manyheads.integrations import surgery_parts
from manyheads.integrations.anatomy import ModelAnatomy
from manyheads.integrations.precision import cast
from manyheads.integrations.surgery import converted
from manyheads.integrations.surgery_files import FILE, load, load_if_converted, outputs, plain, save
from manyheads.integrations.surgery_parts import LowRankLinear
from oracles.conversions import FAMILIES, HEADS, NEURONS, WIDTH, masked, tiny
from tolerance import MODEL, assert_close, is_far, within

SAME = within(torch.float64, 4 * MODEL)  # another order of summation, through a model whose norms divide small numbers
PLAIN = {  # what a stock config can say
    "llama": {"neurons", "heads", "width", "layers"}, "qwen2": {"neurons", "heads", "width", "layers"},
    "qwen3": {"neurons", "heads", "width", "layers"}, "gemma": {"neurons", "heads", "width", "layers"},
    "gemma3": {"neurons", "heads", "width", "layers"},
    "gpt2": {"neurons", "layers"}, "bert": {"neurons", "layers"}, "vit": {"neurons", "heads", "width", "layers"},
    "dinov2": {"heads"},
}  # fmt: skip
PLANS = {
    "neurons": (Prune(axis="neurons", keep=tuple(range(0, NEURONS, 2))),),
    "heads": (Prune(axis="heads", keep=(0, 1, 4, 5)),),
    "width": (Prune(axis="width", keep=tuple(range(6, WIDTH))),),
    "layers": (Drop(part="block", layers=(1,)),),
    "attention": (Drop(part="attention", layers=(1,)),),
    "mlp": (Drop(part="mlp", layers=(2,)),),
    "ragged": (Prune(axis="neurons", keep=(1, 5, 8), layer=1), Prune(axis="heads", keep=(2, 5), layer=2)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def norms_of_float64(monkeypatch):
    """Norms that transformers computes in float32 whatever they are given."""

    def forward(norm, x):
        gain = 1 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight
        eps = getattr(norm, "variance_epsilon", None) or norm.eps
        return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain

    for norm in (LlamaRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, GemmaRMSNorm, Gemma3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)


@pytest.fixture(scope="module")
def models():
    return {kind: tiny(kind) for kind in FAMILIES}


def run(model):
    with torch.inference_mode():
        return outputs(model)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_cut_model_is_the_masked_one_and_its_file_too(models, kind, name, tmp_path):
    model, plan = models[kind], SurgeryPlan(PLANS[name])
    before = run(model)
    cut = converted(model, plan)
    got = run(cut)
    with masked(model, plan) as reference:
        want = run(reference)
    if name == "width" and len(want) != len(got):  # of states, the channels that stay
        keep = torch.tensor(plan.steps[0].keep)
        want = want.view(-1, WIDTH)[:, keep].flatten()
    assert_close(got, want, SAME)
    assert is_far(got[: len(before)], before[: len(got)], SAME)
    assert torch.equal(before, run(model))  # the model that was cut stays as it was
    assert sum(p.numel() for p in cut.parameters()) == ModelAnatomy(model).parameters(plan)

    stock = save(cut, tmp_path, plan, model.config, {"spec": "x"})
    assert stock == (name in PLAIN[kind])
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64) if stock else load(tmp_path)
    assert_close(run(again), got, 1e-6)  # rotary frequencies of a plain one are of float32
    assert (tmp_path / FILE).is_file() != stock and (tmp_path / "model.safetensors").is_file() == stock


@pytest.mark.parametrize("name", ["neurons", "ragged"])
def test_rotary_frequencies_are_not_rounded_to_the_dtype_of_weights(name, tmp_path):
    """In bfloat16 they would turn a token at position 200 by up to 0.4 radians too far or too little."""
    tiny("llama", max_position_embeddings=512).float().save_pretrained(tmp_path / "whole")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    plan, out = SurgeryPlan(PLANS[name]), tmp_path / "cut"
    cut = converted(model, plan)
    stock = save(cut, out, plan, model.config, {})
    assert stock == (name == "neurons")
    again = LlamaForCausalLM.from_pretrained(out, dtype=torch.bfloat16) if stock else load(out)
    ids = torch.arange(400)[None] % 61
    with torch.inference_mode():
        want = cut(ids).logits
        assert torch.equal(again(ids).logits, want)
        assert not torch.equal(again.bfloat16()(ids).logits, want)  # which rounds them
    assert again.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_oracle_tells_norms_over_all_channels_apart(models, kind):
    """Over all of them, zeros included, the root mean square is another."""
    plan = SurgeryPlan(PLANS["width"])
    got = run(converted(models[kind], plan))
    with masked(models[kind], plan, over_all=True) as wrong:
        want = run(wrong)
    if len(want) != len(got):
        want = want.view(-1, WIDTH)[:, list(plan.steps[0].keep)].flatten()
    assert is_far(got, want, SAME)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_order_of_heads_and_neurons_is_no_matter_to_a_full_prune(models, kind):
    whole = (Prune(axis="heads", keep=tuple(range(HEADS))), Prune(axis="width", keep=tuple(range(WIDTH))))
    cut = converted(models[kind], SurgeryPlan(whole))
    assert torch.equal(run(cut), run(models[kind]))
    assert cut.get_input_embeddings().weight is models[kind].get_input_embeddings().weight  # nothing was copied


def test_tied_embeddings_stay_tied(tmp_path):
    model = tiny("llama", tie_word_embeddings=True)
    plan = SurgeryPlan(PLANS["width"])
    cut = converted(model, plan)
    assert cut.lm_head.weight is cut.model.embed_tokens.weight
    assert save(cut, tmp_path, plan, model.config, {})
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert_close(run(again), run(cut), 1e-6)


@pytest.mark.parametrize("kind", ["gemma", "gemma3"])
def test_gemma_tied_embeddings_are_rescaled_with_the_width(kind, tmp_path):
    model = tiny(kind, tie_word_embeddings=True)
    plan = SurgeryPlan(PLANS["width"])
    cut = converted(model, plan)
    with masked(model, plan):
        want = run(model)
    assert_close(run(cut), want, 1e-6)  # the scale of a plain one is of float32
    assert save(cut, tmp_path, plan, model.config, {})


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_factors_of_full_rank_and_as_many_atoms_as_layers_change_nothing(models, kind, tmp_path):
    model = models[kind]
    anatomy = ModelAnatomy(model)
    u, s, vh = torch.linalg.svd(anatomy.weight("o", 0), full_matrices=False)
    atoms = torch.stack([anatomy.weight("up", i) for i in (1, 2)])
    steps = (
        Factorise(part="o", layer=0, rank=len(s), tensors={"left": u * s, "right": vh}),
        Share(part="up", layers=(1, 2), atoms=2, tensors={"atoms": atoms, "coefficients": torch.eye(2)}),
        Assign(part="down", layer=1, tensors={"weight": anatomy.weight("down", 1)}),
    )
    plan = SurgeryPlan(steps)
    cut = converted(model, plan)
    assert_close(run(cut), run(model), SAME)
    assert sum(p.numel() for p in cut.parameters()) == anatomy.parameters(plan)
    assert not save(cut, tmp_path, plan, model.config, {})
    assert torch.equal(run(load(tmp_path)), run(cut))
    low = Factorise(part="o", layer=0, rank=2, tensors={"left": (u * s)[:, :2], "right": vh[:2]})
    assert is_far(run(converted(model, SurgeryPlan((low,)))), run(model), SAME)
    assert anatomy.parameters(SurgeryPlan((low,))) == anatomy.parameters() - u.numel() + 2 * sum(u.shape)


def test_plans_are_json(models):
    steps = (*PLANS["ragged"], Drop(part="mlp", layers=(0,)), Share(part="o", layers=(0, 1), atoms=1))
    plan = SurgeryPlan((*steps, Replace(part="mlp", layer=1, module="manyheads.x:Y", config={"a": 1})))
    assert SurgeryPlan.of(json.loads(json.dumps(plan.plain()))) == plan
    with pytest.raises(UserError, match="of this version"):
        SurgeryPlan.of({"format": 0, "steps": []})
    with pytest.raises(UserError, match="of this version"):
        SurgeryPlan.of({"format": 1, "steps": [{"step": "melt"}]})


def test_generation_with_a_cache_after_dropping_equals_one_forward():
    for kind in ("llama", "gpt2", "gemma3"):
        model = tiny(kind)
        plan = SurgeryPlan((Drop(part="attention", layers=(1,)), Drop(part="block", layers=(2,))))
        cut = converted(model, plan)
        ids = torch.arange(9)[None] + 2
        with torch.inference_mode():
            whole = cut(ids).logits[:, -1]
            first = cut(ids[:, :5], use_cache=True)
            rest = cut(ids[:, 5:], past_key_values=first.past_key_values).logits[:, -1]
        assert_close(rest, whole, SAME)
        held = [layer for layer in first.past_key_values.layers if layer.is_initialized]
        assert len(held) == 1


def test_another_module_stands_in_the_place_of_one(models, tmp_path):
    """It comes back with its weights, and is counted."""
    model, anatomy = models["llama"], ModelAnatomy(models["llama"])
    step = Replace(part="mlp", layer=1, module="manyheads.integrations.surgery_parts:LowRankLinear", config={})
    made = LowRankLinear(torch.randn(WIDTH, 3), torch.randn(3, WIDTH), None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgery_parts, "LowRankLinear", lambda: copy.deepcopy(made))
        plan = SurgeryPlan((dataclasses.replace(step, tensors=made.state_dict()), Drop(part="block", layers=(0,))))
        cut = converted(model, plan)
        assert sum(p.numel() for p in cut.parameters()) == anatomy.parameters(plan)
        assert not save(cut, tmp_path, plan, model.config, {})
        assert torch.equal(run(load(tmp_path)), run(cut))


def test_settings_reach_the_attention_modules(models):
    free = converted(models["llama"], SurgeryPlan((Configure(fields={"is_causal": False}),)))
    assert not free.model.layers[0].self_attn.is_causal and models["llama"].model.layers[0].self_attn.is_causal


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ((Prune(axis="heads", keep=(0, 1, 2)),), "as\\s+many of each"),
        ((Prune(axis="neurons", keep=(NEURONS,)),), "cannot be kept"),
        ((Prune(axis="neurons", keep=(1,)), Prune(axis="neurons", keep=(2,), layer=1)), "twice"),
        ((Drop(part="block", layers=(0, 1, 2)),), "one layer"),
        ((Drop(part="block", layers=(7,)),), "none of number 7"),
        ((Factorise(part="qkv", layer=0, rank=1),), "no layer qkv"),
        ((Replace(part="mlp", layer=0, module="os:system"),), "no module of this package"),
        ((Assign(part="o", layer=0, tensors={"bias": torch.zeros(3)}),), "no bias"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(models, plan, said):
    with pytest.raises(UserError, match=said):
        converted(models["llama"], SurgeryPlan(plan))


def test_unknown_models_are_refused():
    model = torch.nn.Linear(2, 2)
    model.config = type("C", (), {"model_type": "mamba"})()
    with pytest.raises(UserError, match="known are"):
        ModelAnatomy(model)
    model = tiny("llama")
    model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"extra\.weight"):
        ModelAnatomy(model)


def test_files_that_are_damaged_are_refused(models, tmp_path):
    plan = SurgeryPlan(PLANS["ragged"])
    save(converted(models["llama"], plan), tmp_path, plan, models["llama"].config, {})
    with pytest.raises(OSError, match=r"model\.safetensors"):  # stock transformers does not take it for its own
        type(models["llama"]).from_pretrained(tmp_path)
    written = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(written | {"plan": {"format": 1, "steps": []}}))
    with pytest.raises((UserError, RuntimeError)):
        load(tmp_path)
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UserError, match="convert it again"):
        load(tmp_path)


@pytest.mark.parametrize("first", ["layers", "attention"])
def test_a_folder_holds_what_was_written_last(models, first, tmp_path):
    """What an earlier conversion left there, plain or with its plan, is not loaded in its place."""
    model = models["llama"]
    names = {"layers": "model.safetensors", "attention": FILE}
    for name in (first, *(names.keys() - {first})):
        plan = SurgeryPlan(PLANS[name])
        cut = converted(model, plan)
        cut.generation_config.eos_token_id = [1, 5]
        assert save(cut, tmp_path, plan, model.config, {}) == (name == "layers")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name in names.values()) == [names[name]]
    again = load_if_converted(tmp_path, torch.device("cpu"), torch.float64)
    assert (again is None) == (name == "layers")
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64) if again is None else again
    assert_close(run(again), run(cut), 1e-6)
    assert again.generation_config.eos_token_id == [1, 5]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_plain_one_is_tried_with_the_attention_that_the_model_has(attention):
    """In bfloat16 two ways to compute it differ by more than a cut model and its stock class may."""
    model = tiny("llama").float()
    model.set_attn_implementation(attention)
    cut = cast(converted(model, SurgeryPlan(PLANS["layers"])), torch.bfloat16)
    stock = plain(cut)
    assert stock is not None and stock.config._attn_implementation == attention


def test_heads_are_chosen_in_equal_groups():
    scores = torch.tensor([[9.0, 1, 1, 8, 7, 1, 0, 0, 0]])  # three groups of three
    assert choose_heads(scores, 3, 2) == [(0, 3)]  # 9 + 8 of two groups, one each
    assert choose_heads(scores, 3, 6) == [(0, 1, 2, 3, 4, 5)]
    assert choose_heads(scores, 3, 9) == [tuple(range(9))]
    with pytest.raises(UserError, match=r"keep 6 \(0\.67\)"):
        choose_heads(scores, 3, 7)
    assert [len(kept) for kept in choose_heads(torch.rand(2, 4), 4, 3)] == [3, 3]


def test_the_largest_that_fits():
    assert [largest(1, 9, lambda n, most=most: n <= most) for most in (1, 5, 9, 20)] == [1, 5, 9, 9]
    with pytest.raises(UserError, match="keep more"):
        largest(2, 9, lambda n: n <= 1)
