# SPDX-License-Identifier: Apache-2.0
"""Minitron: importances equal those of the formula, sizes are those asked for, and the order of keeping is by them."""

import re

import pytest
import torch

from manyheads import UserError, parse
from manyheads.conversion import Drop, Prune, SurgeryPlan, choose_heads
from manyheads.integrations.anatomy import ModelAnatomy
from manyheads.integrations.calibrate import calibrate, nats
from manyheads.integrations.surgery import converted
from oracles.conversions import HEADS, KV, LAYERS, NEURONS, tiny
from tolerance import CLOSE, assert_close, is_far

IDS = [(torch.arange(20).view(2, 10) * 7 + i) % 61 for i in range(2)]


@pytest.fixture(scope="module")
def model():
    return tiny("llama").float()


@pytest.fixture(scope="module")
def stats(model):
    anatomy = ModelAnatomy(model)
    wanted = [*parse("minitron").wants(anatomy), *parse("structured_pruning").wants(anatomy)]
    return calibrate(model, IDS, wanted)


def recorded(model, module, of=0):
    """What a module read, ``[N, T, C]`` of all batches; its output where ``of`` is None."""
    found = []
    handle = module.register_forward_hook(lambda _, args, out: found.append(out if of is None else args[of]))
    with torch.inference_mode():
        for ids in IDS:
            model(ids)
    handle.remove()
    return torch.cat(found).double()


def named(stats, name):
    return stats.values[name]


def test_importances_are_those_of_the_formula(model, stats):
    layer = model.model.layers[1]
    neurons = recorded(model, layer.mlp.down_proj).abs().mean(1).square().sum(0).sqrt()
    heads = recorded(model, layer.self_attn.o_proj).unflatten(-1, (HEADS, -1)).norm(dim=-1).mean(1)
    assert_close(named(stats, "neurons.sequence_norm")[1], neurons, CLOSE)
    assert_close(named(stats, "heads.sequence_norm")[1], heads.square().sum(0).sqrt(), CLOSE)
    assert is_far(
        named(stats, "neurons.sequence_norm")[1], recorded(model, layer.mlp.down_proj).abs().sum((0, 1)), CLOSE
    )
    norms = [m for n, m in model.named_modules() if n.endswith("norm")]
    assert len(named(stats, "norms.sequence_norm")) == len(norms) == 2 * LAYERS + 1
    last = recorded(model, model.model.norm, None).abs().mean(1).square().sum(0).sqrt()
    assert_close(named(stats, "norms.sequence_norm")[-1], last, CLOSE)
    before, after = recorded(model, layer), recorded(model, layer, None)
    assert_close(named(stats, "block.cosine")[1], (1 - torch.cosine_similarity(before, after, dim=-1)).mean(), 1e-5)
    rms = recorded(model, layer.mlp.gate_proj).square().mean((0, 1)).sqrt()
    assert_close(named(stats, "mlp.rms")[1], rms, CLOSE)


def test_a_trial_is_the_loss_of_the_cut_model(model, stats):
    plan = SurgeryPlan((Drop(part="block", layers=(1,)),))
    with torch.inference_mode():
        want = torch.cat([nats(converted(model, plan), ids) for ids in IDS]).mean()
    assert stats.loss(plan) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("axis", ["neurons", "width", "both", "layers"])
def test_sizes_are_those_asked_for_and_do_not_depend_on_scores(model, stats, axis):
    anatomy = ModelAnatomy(model)
    counts = {}
    for spec in ("minitron", *(f"structured_pruning:score={s}" for s in ("random", "magnitude", "wanda"))):
        plan = parse(f"{spec}{',' if ':' in spec else ':'}keep=0.8,axis={axis}").plan(anatomy, stats)
        counts[spec] = anatomy.parameters(plan)
        assert sum(p.numel() for p in converted(model, plan).parameters()) == counts[spec]
    assert len(set(counts.values())) == 1 and counts["minitron"] <= 0.8 * anatomy.parameters()


def test_what_is_kept_scores_highest(model, stats):
    plan = parse("minitron:keep=0.7,axis=neurons,heads=0.67").plan(ModelAnatomy(model), stats)
    prunes = {(step.axis, step.layer): step.keep for step in plan.steps if isinstance(step, Prune)}
    keep = prunes["neurons", 0]
    scores = named(stats, "neurons.sequence_norm")[0]
    out = sorted(set(range(NEURONS)) - set(keep))
    assert len(keep) % 8 == 0 and scores[list(keep)].min() >= scores[out].max()
    heads = named(stats, "heads.sequence_norm")
    assert [prunes["heads", i] for i in range(LAYERS)] == choose_heads(torch.stack(list(heads)), KV, 4)
    assert parse("minitron:keep=1").plan(ModelAnatomy(model), stats).steps == ()


def test_channels_are_scored_by_all_norms(model, stats):
    (prune,) = parse("minitron:keep=0.7,axis=width").plan(ModelAnatomy(model), stats).steps
    norms = torch.stack(list(named(stats, "norms.sequence_norm")))
    best = [tuple(sorted(x.topk(len(prune.keep)).indices.tolist())) for x in (norms.sum(0), norms[-1])]
    assert prune.axis == "width" and prune.keep == best[0] != best[1]


def test_the_layers_that_go_turn_the_stream_least_or_cost_the_least_loss():
    deep = tiny("llama", num_hidden_layers=6).float()
    with torch.no_grad():  # layer 3 writes next to nothing
        for weight in (deep.model.layers[3].self_attn.o_proj.weight, deep.model.layers[3].mlp.down_proj.weight):
            weight.mul_(1e-3)
    anatomy, found = ModelAnatomy(deep), {}
    for depth in ("cosine", "loss"):
        strategy = parse(f"minitron:keep=0.9,axis=layers,depth={depth}")
        found[depth] = calibrate(deep, IDS, strategy.wants(anatomy))
        (drop,) = strategy.plan(anatomy, found[depth]).steps
        assert drop == Drop(part="block", layers=drop.layers) and len(drop.layers) == 1
        scores = [float(x) for x in named(found[depth], "block.cosine")]
        if depth == "loss":
            scores = [found[depth].loss(SurgeryPlan((Drop(part="block", layers=(i,)),))) for i in range(6)]
        assert drop.layers == (min(range(1, 5), key=lambda i: scores[i]),)
        assert depth == "loss" or drop.layers == (3,)


def test_the_teacher_is_corrected_first_but_not_an_encoder(model):
    assert parse("minitron").recovery(ModelAnatomy(model)).correct == 0.2
    assert parse("minitron").recovery(ModelAnatomy(tiny("bert"))).correct == 0


def test_layers_go_in_a_row_and_never_the_first_or_last():
    from manyheads.convert._pruning import least

    assert least([0.0, 5, 1, 1, 4, 0], 2) == (2, 3)
    assert least([0.0, 5, 1, 9, 1, 0], 2) == (1, 2)  # not 2 and 4, which are no row
    with pytest.raises(UserError, match="drop 1 at most"):
        least([1.0, 2, 3], 2)


def test_a_dead_neuron_goes_first_and_its_score_is_zero(model):
    dead = tiny("llama").float()
    with torch.no_grad():
        dead.model.layers[0].mlp.up_proj.weight[5] = 0
    anatomy = ModelAnatomy(dead)
    for spec in ("minitron:axis=neurons", "structured_pruning:axis=neurons"):
        strategy = parse(spec)
        found = calibrate(dead, IDS, strategy.wants(anatomy))
        steps = strategy.plan(anatomy, found).steps
        assert all(5 not in step.keep for step in steps if step.layer == 0)
        name = "neurons.sequence_norm" if "minitron" in spec else "neurons.rms"
        assert found.values[name][0][5] == 0 and found.values[name][0][4] > 0


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("minitron:keep=0", "shares"), ("minitron:axis=depth", "axis is"), ("minitron:depth=x", "cosine or loss"),
        ("minitron:correct=1", "below 1"), ("structured_pruning:score=x", "random, magnitude, taylor or wanda"),
    ],
)  # fmt: skip
def test_fields_that_mean_nothing_are_refused(spec, said):
    with pytest.raises(UserError, match=said):
        parse(spec)


@pytest.mark.parametrize("axis", ["neurons", "width", "both", "layers"])
def test_too_few_parameters_are_refused_with_how_few_there_can_be(model, stats, axis):
    anatomy = ModelAnatomy(model)
    with pytest.raises(UserError, match=r"keep=\d") as refused:
        parse(f"minitron:keep=0.01,axis={axis}").plan(anatomy, stats)
    said = re.search(r"keep=(0\.\d\d) can be had", str(refused.value))[1]
    plan = parse(f"minitron:keep={said},axis={axis}").plan(anatomy, stats)
    assert plan.steps and anatomy.parameters(plan) <= float(said) * anatomy.parameters()
    with pytest.raises(UserError):
        parse(f"minitron:keep={float(said) - 0.01:.2f},axis={axis}").plan(anatomy, stats)
