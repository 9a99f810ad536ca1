# SPDX-License-Identifier: Apache-2.0
"""AMP: scores are those of the formula, the ratio is the paper's, groups stay equal, a refit makes up for a cut."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads import UserError, parse
from manyheads.calls.calibration import gram
from manyheads.conversion import Assign, Prune, SurgeryPlan, nearest_heads
from manyheads.convert._pruning import _refitted
from manyheads.integrations.anatomy import ModelAnatomy
from manyheads.integrations.calibrate import calibrate, nats
from manyheads.integrations.surgery import converted
from manyheads.integrations.surgery_files import save
from oracles.conversions import DIM, FAMILIES, HEADS, KV, LAYERS, NEURONS, tiny
from tolerance import CLOSE, assert_close, is_far

IDS = [(torch.arange(40).view(2, 20) * 7 + i) % 61 for i in range(2)]
RIVALS = ("minitron", *(f"structured_pruning:score={s}" for s in ("random", "magnitude", "taylor", "wanda")))


def plan_of(model, spec, ids=IDS):
    strategy, anatomy = parse(spec), ModelAnatomy(model)
    return strategy.plan(anatomy, calibrate(model, ids, strategy.wants(anatomy)))


def kept(plan, axis, layer):
    return next(
        (step.keep for step in plan.steps if isinstance(step, Prune) and (step.axis, step.layer) == (axis, layer)), None
    )


@pytest.fixture(scope="module")
def model():
    return tiny("llama").float()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_scores_are_those_of_the_formula(kind):
    """Of a GPT-2, whose weights lie the other way round, too."""
    model = tiny(kind).float()
    anatomy = ModelAnatomy(model)
    stats = calibrate(model, IDS, parse("amp").wants(anatomy))
    read = {}
    handles = [
        anatomy.linear(part, 1).register_forward_pre_hook(
            lambda _, args, part=part: read.setdefault(part, []).append(args[0])
        )
        for part in ("o", "down")
    ]
    with torch.inference_mode():
        for ids in IDS:
            model(ids)
    for handle in handles:
        handle.remove()
    h, a = (torch.cat(read[part]).double().flatten(0, 1) for part in ("o", "down"))
    o = anatomy.weight("o", 1).double()
    dim = anatomy.layers[1].head_dim
    added = torch.stack(
        [h[:, j * dim : (j + 1) * dim] @ o[:, j * dim : (j + 1) * dim].mT for j in range(HEADS)]
    )  # [H, N, D]
    assert_close(stats.values["heads.projected"][1], added.abs().sum(-1).mean(1), CLOSE)
    assert_close(stats.values["neurons.absolute"][1], a.abs().mean(0), CLOSE)
    assert is_far(stats.values["heads.projected"][1], added.sum(1).abs().sum(-1) / len(h), CLOSE)  # signs cancel


def test_a_factor_between_values_and_output_moves_no_score(model):
    """The score is of what is written, and not of either weight."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for layer in moved.model.layers:
            layer.self_attn.v_proj.weight *= 4
            layer.self_attn.o_proj.weight /= 4
    found = [calibrate(m, IDS, parse("amp").wants(ModelAnatomy(m))) for m in (model, moved)]
    assert_close(found[0].values["heads.projected"][0], found[1].values["heads.projected"][0], CLOSE)


def test_dead_heads_and_neurons_go_first_and_nothing_is_lost():
    model = tiny("llama").float()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, 2 * DIM : 4 * DIM] = 0  # the second group
            layer.mlp.up_proj.weight[::5] = 0
    plan = plan_of(model, "amp:keep=0.8")
    cut = converted(model, plan)
    for i in range(LAYERS):
        assert kept(plan, "heads", i) == (0, 1, 4, 5)
        assert len(kept(plan, "neurons", i)) == 32 and all(n % 5 for n in kept(plan, "neurons", i))
    with torch.inference_mode():
        assert_close(cut(IDS[0]).logits, model(IDS[0]).logits, 1e-5)
    control = plan_of(model, "amp:keep=0.8,order=highest")
    assert set(range(0, NEURONS, 5)) <= set(kept(control, "neurons", 0)) and {2, 3} <= set(kept(control, "heads", 0))


def test_the_ratio_is_that_of_the_blocks_weights(model, tmp_path):
    """For a share of all parameters to go, more of the blocks has to; neurons make up for the rounding of heads."""
    anatomy = ModelAnatomy(model)
    for keep in (0.9, 0.8, 0.6):
        plan = plan_of(model, f"amp:keep={keep}")
        inside = sum(p.numel() for n, p in model.named_parameters() if "proj" in n)
        ratio = (1 - keep) * anatomy.parameters() / inside
        heads = len(kept(plan, "heads", 0) or range(HEADS))
        assert heads == min((n for n in (1, 2, 3, 4, 6)), key=lambda n: (abs(n - (1 - ratio) * HEADS), -n))
        cut = converted(model, plan)
        count = sum(p.numel() for p in cut.parameters())
        a_step = 8 * 3 * anatomy.width * LAYERS
        assert keep * anatomy.parameters() - a_step < count <= keep * anatomy.parameters()
    assert save(cut, tmp_path, plan, model.config, {})  # a stock config can say it


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_cut_alike_by_every_score(kind):
    """Rivals at axis=heads_neurons have as many heads, and parameters that differ by less than a step of neurons."""
    model = tiny(kind).float()
    anatomy = ModelAnatomy(model)
    images = [torch.randn(2, 3, model.config.image_size, model.config.image_size)] if kind in ("vit", "dinov2") else IDS
    counts, heads = [], set()
    for spec in ("amp:keep=0.7", *(f"{r}{',' if ':' in r else ':'}keep=0.7,axis=heads_neurons" for r in RIVALS)):
        if "taylor" in spec and not anatomy.causal:
            with pytest.raises(UserError, match="does not predict"):
                plan_of(model, spec, images)
            continue
        plan = plan_of(model, spec, images)
        counts.append(anatomy.parameters(plan))
        heads.add(len(kept(plan, "heads", 0)))
    assert len(heads) == 1 and max(counts) <= 0.7 * anatomy.parameters()
    assert max(counts) - min(counts) < 8 * 3 * anatomy.width * LAYERS


@given(kv=st.integers(1, 8), size=st.integers(1, 8), share=st.floats(-0.5, 1.2))
@settings(max_examples=100)
def test_nearest_heads_divide(kv, size, share):
    """Into groups of one size; one head is left at least, and without groups every number will do."""
    found = nearest_heads(kv * size, kv, share * kv * size)
    assert 1 <= found <= kv * size and any(found % g == 0 and found // g <= size for g in range(1, kv + 1))
    if size == 1:
        assert abs(found - min(max(share * kv, 1), kv)) <= 0.5


def test_neurons_projected_on_their_output_are_scored_by_what_they_write(model):
    moved = tiny("llama").float()
    with torch.no_grad():
        moved.model.layers[0].mlp.down_proj.weight[:, 7] = 0
    assert 7 not in kept(plan_of(moved, "amp:neurons=projected"), "neurons", 0)
    plain, projected = (kept(plan_of(model, f"amp:neurons={n}"), "neurons", 0) for n in ("activation", "projected"))
    assert plain != projected


def test_taylor_is_the_weight_times_the_gradient_of_the_loss(model):
    anatomy = ModelAnatomy(model)
    stats = calibrate(model, IDS, ())
    weight = model.model.layers[1].mlp.down_proj.weight
    loss = torch.cat(
        [torch.nn.functional.cross_entropy(model(ids[:, :-1]).logits.mT, ids[:, 1:], reduction="none") for ids in IDS]
    ).mean()
    (want,) = torch.autograd.grad(loss, weight)
    assert_close(stats.gradient("down", 1), want, 1e-5)
    assert weight.grad is None and ModelAnatomy(model).weight("down", 1).data_ptr() == weight.data_ptr()
    scores = parse("structured_pruning:score=taylor")._of_weights(anatomy, stats)
    parts = {p: (anatomy.weight(p, 0) * stats.gradient(p, 0)).abs().double() for p in "qkvo"}
    rows = parts["q"].sum(1) + parts["o"].sum(0)
    group = (parts["k"].sum(1) + parts["v"].sum(1)).view(KV, DIM).sum(1)
    want = [rows[j * DIM : (j + 1) * DIM].sum() + group[j // 2] / 2 for j in range(HEADS)]
    assert_close(scores.heads[0], torch.stack(want), 1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_refit_gives_back_what_copies_of_neurons_said(kind):
    model = tiny(kind).float()
    anatomy = ModelAnatomy(model)
    prunes = [Prune(axis="neurons", keep=tuple(range(20)), layer=i) for i in range(LAYERS)]
    with torch.no_grad():
        for part in ("gate", "up"):
            for i in range(LAYERS) if anatomy.has(part) else ():
                anatomy.weight(part, i)[20:] = anatomy.weight(part, i)[:20]
                if anatomy.bias(part, i) is not None:
                    anatomy.bias(part, i)[20:] = anatomy.bias(part, i)[:20]
    stats = calibrate(model, IDS, [gram("neurons")])
    refits = [_refitted(anatomy, step, stats) for step in prunes]
    with torch.inference_mode():
        want, bare, made = (
            converted(model, SurgeryPlan(tuple(steps)))(IDS[0])[0] for steps in ((), prunes, (*prunes, *refits))
        )
    assert (made - want).norm() < 0.1 * (bare - want).norm()


def test_a_refit_lowers_the_error_of_a_layer_and_takes_part_in_a_plan(model):
    strategy, anatomy = parse("amp:keep=0.7,refit=true"), ModelAnatomy(model)
    stats = calibrate(model, IDS, strategy.wants(anatomy))
    plan = strategy.plan(anatomy, stats)
    assign = {(s.part, s.layer): s.tensors["weight"] for s in plan.steps if isinstance(s, Assign)}
    assert set(assign) == {(part, i) for part in ("o", "down") for i in range(LAYERS)}
    keep = list(kept(plan, "neurons", 0))
    out = sorted(set(range(NEURONS)) - set(keep))
    g, w = stats.values["neurons.gram"][0], anatomy.weight("down", 0).double()

    def error(new):
        d = w.clone()
        d[:, keep] -= new
        return float(((d @ g) * d).sum())

    assert out and error(assign["down", 0]) < error(w[:, keep])
    cut = converted(model, plan)
    with torch.inference_mode():
        assert torch.cat([nats(cut, ids) for ids in IDS]).isfinite().all()


def test_recovery_is_by_adapters_on_the_text_and_rivals_can_have_the_same(model):
    anatomy, encoder = ModelAnatomy(model), ModelAnatomy(tiny("bert"))
    how = parse("amp").recovery(anatomy)
    assert (how.loss, how.lora) == ("nll", 8) and parse("amp").recovery(encoder).loss == "hidden"
    assert parse("structured_pruning:loss=nll,rank=8").recovery(anatomy) == how
    assert parse("minitron:loss=nll,rank=8,correct=0").recovery(anatomy) == how


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("amp:axis=width", "heads and neurons"), ("amp:heads=0.5", "leave heads at 1"), ("amp:order=x", "lowest"),
        ("amp:neurons=x", "projected"), ("amp:rank=-1", "rank 0"), ("minitron:refit=true", "axis=neurons"),
    ],
)  # fmt: skip
def test_fields_that_mean_nothing_are_refused(spec, said):
    with pytest.raises(UserError, match=said):
        parse(spec)
