# SPDX-License-Identifier: Apache-2.0
"""skip_attn: the layers are those of the rule, a part left out adds nothing, and no keys are kept of it."""

import math

import pytest
import torch

from manyheads import UserError, parse
from manyheads.conversion import Drop
from manyheads.integrations.anatomy import ModelAnatomy
from manyheads.integrations.calibrate import calibrate
from manyheads.integrations.surgery import converted
from manyheads.integrations.surgery_files import load, outputs, save
from oracles.conversions import tiny
from tolerance import MODEL, assert_close, is_far, within

LAYERS = 6
IDS = [(torch.arange(24).view(2, 12) * 7 + i) % 61 for i in range(2)]
SAME = within(torch.float32, 4 * MODEL)
KINDS = {  # of which the first has one kind of layer, the last two
    "llama": {}, "gpt2": {}, "gemma3": {"layer_types": ["sliding_attention", "full_attention"] * 3},
}  # fmt: skip


def deep(kind):
    count = "n_layer" if kind == "gpt2" else "num_hidden_layers"
    return tiny(kind, **{count: LAYERS}, **KINDS[kind]).float()


def plan_of(model, spec):
    strategy, anatomy = parse(spec), ModelAnatomy(model)
    return strategy.plan(anatomy, calibrate(model, IDS, strategy.wants(anatomy)))


def gone(model, spec):
    steps = plan_of(model, spec).steps
    assert len(steps) <= 1
    return steps[0].layers if steps else ()


@pytest.fixture(scope="module")
def model():
    return deep("llama")


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ("skip=0.33", (4, 5)), ("skip=0.5", (3, 4, 5)), ("skip=0.33,keep_last=true", (3, 4)), ("skip=0", ()),
        ("skip=0.33,choose=first", (1, 2)), ("skip=0.8", (1, 2, 3, 4, 5)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("part", ["attention", "mlp", "block"])
def test_layers_are_those_of_the_rule(model, fields, layers, part):
    assert gone(model, f"skip_attn:part={part},{fields}") == layers


@pytest.mark.parametrize("part", ["attention", "mlp"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_left_out_is_one_that_writes_nothing(kind, part, tmp_path):
    """Its output weights are zero then; with its bias, where it has one, and the norm behind it in Gemma."""
    model, zeroed = deep(kind), deep(kind)
    zeroed.load_state_dict(model.state_dict())
    spec = f"skip_attn:skip=0.33,part={part}"
    plan, anatomy = plan_of(model, spec), ModelAnatomy(zeroed)
    with torch.no_grad():
        for layer in gone(model, spec):
            out = "o" if part == "attention" else "down"
            anatomy.weight(out, layer).zero_()
            if anatomy.bias(out, layer) is not None:
                anatomy.bias(out, layer).zero_()
    cut = converted(model, plan)
    with torch.inference_mode():
        want = outputs(zeroed)
        assert_close(outputs(cut), want, SAME)
        assert is_far(outputs(model), want, SAME)
    assert not save(cut, tmp_path, plan, model.config, {})
    assert torch.equal(outputs(load(tmp_path)), outputs(cut))
    before, after = (sum(p.nbytes for p in m.parameters()) for m in (model, cut))
    kept = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert after <= kept < after + 40_000 and after < before


@pytest.mark.parametrize("kind", KINDS)
def test_no_keys_are_kept_of_it_and_writing_goes_on_from_the_cache(kind):
    cut = converted(deep(kind), plan_of(deep(kind), "skip_attn:skip=0.5"))
    with torch.inference_mode():
        first = cut(IDS[0][:, :7], use_cache=True)
        rest = cut(IDS[0][:, 7:], past_key_values=first.past_key_values).logits
        assert_close(rest, cut(IDS[0]).logits[:, 7:], SAME)
    assert sum(layer.is_initialized for layer in first.past_key_values.layers) == LAYERS // 2
    assert cut.generate(IDS[0], max_new_tokens=3, do_sample=False).shape[1] == IDS[0].shape[1] + 3


@pytest.mark.parametrize("part", ["attention", "mlp", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cosine_is_of_the_stream_before_and_after_the_part(kind, part):
    model = deep(kind)
    anatomy = ModelAnatomy(model)
    stats = calibrate(model, IDS, parse(f"skip_attn:part={part},choose=cosine").wants(anatomy))
    block, seen = anatomy.blocks[2], {}
    norm = {"llama": "post_attention_layernorm", "gpt2": "ln_2", "gemma3": "pre_feedforward_layernorm"}[kind]

    def keep(name, value):
        seen.setdefault(name, []).append(value.double())

    handles = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs: keep("before", args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        ),
        block.get_submodule(norm).register_forward_pre_hook(lambda _, args: keep("middle", args[0])),
        block.register_forward_hook(lambda _, args, out: keep("after", out[0] if isinstance(out, tuple) else out)),
    ]
    with torch.inference_mode():
        for ids in IDS:
            model(ids)
    for handle in handles:
        handle.remove()
    x, y = {"attention": ("before", "middle"), "mlp": ("middle", "after"), "block": ("before", "after")}[part]
    want = (1 - torch.cosine_similarity(torch.cat(seen[x]), torch.cat(seen[y]), dim=-1)).mean()
    assert_close(stats.values[f"{part}.cosine"][2], want, 1e-5)


def test_a_part_that_writes_nothing_turns_nothing_and_takes_no_loss_along():
    silent = deep("llama")
    with torch.no_grad():
        silent.model.layers[3].self_attn.o_proj.weight.zero_()
    assert gone(silent, "skip_attn:skip=0.17,choose=cosine") == (3,)
    anatomy = ModelAnatomy(silent)
    stats = calibrate(silent, IDS, ())
    losses = {i: stats.loss(parse("skip_attn")._without([i])) for i in range(1, LAYERS)}
    assert gone(silent, "skip_attn:skip=0.33,choose=loss") == tuple(sorted(sorted(losses, key=losses.get)[:2]))
    assert math.isclose(losses[3], stats.loss(parse("skip_attn:skip=0").plan(anatomy, stats)), rel_tol=1e-6)


def test_greedy_looks_at_what_is_left(model):
    """The second is chosen without the first, so that together they lose no more than any pair with it."""
    stats = calibrate(model, IDS, ())
    first = gone(model, "skip_attn:skip=0.17,choose=greedy")
    pair = set(gone(model, "skip_attn:skip=0.33,choose=greedy"))
    assert set(first) < pair
    found = stats.loss(parse("skip_attn")._without(sorted(pair)))
    others = [sorted({*first, i}) for i in range(1, LAYERS) if i not in first]
    assert found == pytest.approx(min(stats.loss(parse("skip_attn")._without(each)) for each in others), rel=1e-6)


def test_random_layers_are_of_the_seed_and_the_first_stays(model):
    drawn = [gone(model, f"skip_attn:skip=0.5,choose=random,seed={seed}") for seed in range(12)]
    assert len(set(drawn)) > 3 and drawn[0] == gone(model, "skip_attn:skip=0.5,choose=random,seed=0")
    assert all(len(layers) == 3 and 0 not in layers for layers in drawn)
    assert {layer for layers in drawn for layer in layers} == set(range(1, LAYERS))


def test_what_a_model_does_not_allow_is_refused(model):
    with pytest.raises(UserError, match="5 can lose their attention, not 6"):
        plan_of(model, "skip_attn:skip=0.95")
    with pytest.raises(UserError, match="score whole blocks"):
        plan_of(tiny("bert"), "skip_attn:choose=cosine")
    with pytest.raises(UserError, match=r"skip=0\.167 for one"):  # a share that rounds to none is no silent no-op
        plan_of(model, "skip_attn:skip=0.08")
    assert gone(model, "skip_attn:skip=0.167") == (5,)
    assert plan_of(tiny("bert"), "skip_attn:skip=0.33").steps == (Drop(part="attention", layers=(2,)),)
    for fields, said in (("skip=1", "below 1"), ("part=heads", "attention, mlp or block"), ("choose=x", "choose one")):
        with pytest.raises(UserError, match=said):
            parse(f"skip_attn:{fields}")
