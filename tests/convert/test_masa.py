# SPDX-License-Identifier: Apache-2.0
"""MASA: sums of shared matrices are those of the formula, budgets are kept, files give the model again."""

from itertools import pairwise

import pytest
import torch

from manyheads import UserError, parse
from manyheads.conversion import Factorise, Share, SurgeryPlan
from manyheads.convert._low_rank import factors, whitener
from manyheads.convert.masa import cut_groups, dictionary
from manyheads.integrations.anatomy import ModelAnatomy
from manyheads.integrations.calibrate import calibrate
from manyheads.integrations.surgery import converted
from manyheads.integrations.surgery_files import load, outputs, save
from oracles.conversions import LAYERS, tiny
from tolerance import assert_close, is_far

ROUND = 1e-10  # float64 through decompositions
IDS = [(torch.arange(80).view(2, 40) * 7 + i) % 61 for i in range(2)]
SPECS = ("masa:groups=1", "masa:groups=2,keep=0.9", "masa:groups=1,refine=false,keep=0.7", "low_rank",
         "low_rank:method=svd,parts=vo", "low_rank:method=basis,group=3")  # fmt: skip


def run(model):
    with torch.inference_mode():
        return outputs(model)


def planned(model, spec):
    anatomy, strategy = ModelAnatomy(model), parse(spec)
    batches = [torch.randn(2, 3, 16, 16, dtype=torch.float64)] if anatomy.family == "vit" else IDS
    stats = calibrate(model, batches, strategy.wants(anatomy))
    return strategy.plan(anatomy, stats), stats


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.mark.parametrize("normalise", [True, False])
def test_a_dictionary_is_the_truncated_svd_of_the_stacked_weights(normalise):
    weights = torch.randn(5, 6, 4, dtype=torch.float64) * torch.tensor([9.0, 1, 1, 2, 1]).double()[:, None, None]
    sizes = weights.flatten(1).norm(dim=1)[:, None] if normalise else 1.0
    u, s, vh = torch.linalg.svd(weights.flatten(1) / sizes, full_matrices=False)
    errors = []
    for atoms in range(1, 6):
        found, coefficients = dictionary(weights, atoms, normalise)
        got = torch.einsum("ls,soi->loi", coefficients, found)
        assert_close(got.flatten(1), sizes * (u[:, :atoms] * s[:atoms] @ vh[:atoms]), ROUND)
        errors.append(float((got - weights).norm() / weights.norm()))
        assert_close(found.flatten(1).norm(dim=1), weights.flatten(1).norm(dim=1).mean().expand(atoms), ROUND)
    assert errors == sorted(errors, reverse=True) and errors[-1] < ROUND
    other, numbers = dictionary(weights, 2, not normalise)
    assert is_far(torch.einsum("ls,soi->loi", numbers, other), sum_of(weights, 2, normalise), 1e-3)


def sum_of(weights, atoms, normalise):
    found, coefficients = dictionary(weights, atoms, normalise)
    return torch.einsum("ls,soi->loi", coefficients, found)


def test_whitened_factors_lose_what_the_formula_says_and_less_than_others():
    weight, x = torch.randn(6, 9, dtype=torch.float64), torch.randn(50, 9, dtype=torch.float64)
    x = x @ torch.diag(torch.linspace(0.1, 3, 9).double())
    root = whitener(x.mT @ x / len(x))
    assert_close(root @ root.mT, x.mT @ x / len(x), 1e-5)
    for rank in (1, 3, 6, 8):
        left, right = factors(weight, rank, root)
        plain = factors(weight, rank)
        assert left.shape == (6, rank) and right.shape == (rank, 9)
        lost = (x @ (weight - left @ right).mT).square().sum(1).mean()
        want = torch.linalg.svdvals(weight @ root)[rank:].square().sum()
        assert float(lost) == pytest.approx(float(want), rel=1e-4, abs=1e-8)
        if rank < 6:
            assert lost < (x @ (weight - plain[0] @ plain[1]).mT).square().sum(1).mean()
    assert_close(left @ right, weight, ROUND)


def test_a_channel_that_is_never_used_does_no_harm():
    moment = torch.diag(torch.tensor([1.0, 0, 2]))
    left, right = factors(torch.ones(2, 3), 1, whitener(moment))
    assert torch.isfinite(left @ right).all()


def test_groups_are_cut_where_predictions_change_most(model):
    assert cut_groups([0.1, 5, 0.2, 3], 3) == [range(2), range(2, 4), range(4, 5)]
    assert cut_groups([1.0, 1, 1], 2) == [range(1), range(1, 4)]
    anatomy, strategy = ModelAnatomy(model), parse("masa:groups=2")
    stats = calibrate(model, IDS, strategy.wants(anatomy))
    states = []
    handles = [b.register_forward_hook(lambda _, args, out: states.append(out)) for b in model.model.layers]
    with torch.inference_mode():
        for ids in IDS:
            model(ids)
        means = [torch.cat(states[i::LAYERS]).flatten(0, 1).mean(0) for i in range(LAYERS)]
        said = [model.lm_head(model.model.norm(m.double())).softmax(-1) for m in means]
    for handle in handles:
        handle.remove()
    want = [torch.nn.functional.kl_div(b.log(), a, reduction="sum") for a, b in pairwise(said)]
    assert_close(torch.tensor(strategy._distances(anatomy, stats)), torch.stack(want), 1e-5)
    cut = max(range(LAYERS - 1), key=lambda i: want[i]) + 1
    groups = (tuple(range(cut)), tuple(range(cut, LAYERS)))
    shared = {step.layers for step in planned(model, "masa:groups=2,keep=0.9")[0].steps}
    assert shared == {group for group in groups if len(group) > 1}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "bert", "vit"])
def test_budgets_are_kept_and_files_give_the_model_again(kind, spec, tmp_path):
    model = tiny(kind)
    anatomy, strategy = ModelAnatomy(model), parse(spec)
    plan, _ = planned(model, spec)
    made = converted(model, plan)
    count = sum(p.numel() for p in made.parameters())
    assert count == anatomy.parameters(plan)
    left = 1 - (anatomy.parameters() - count) / strategy.projections(anatomy)
    assert 0.85 * strategy.keep < left <= strategy.keep + 1e-3
    assert not save(made, tmp_path, plan, model.config, {})
    assert torch.equal(run(load(tmp_path)), run(made))
    assert is_far(run(made), run(model), 1e-6)
    tied = [p for step in plan.steps if isinstance(step, Share) for p in step.layers]
    assert ("masa" in spec) == bool(tied)


def test_weights_are_the_sums_and_what_is_left_of_them(model):
    plan, stats = planned(model, "masa:groups=1,keep=0.9,atoms=0.3")
    made, anatomy = converted(model, plan), ModelAnatomy(model)
    q, k, v, o = (next(step for step in plan.steps if step.part == part) for part in "qkvo")
    assert q.atoms == k.atoms == 1 and q.rank == o.rank == 2 * k.rank == 2 * v.rank > 0
    for part, step in (("q", q), ("k", k)):
        weights = torch.stack([anatomy.weight(part, i) for i in range(LAYERS)])
        rest = weights - sum_of(weights, 1, True)
        for i in range(LAYERS):
            root = whitener(stats.values["attention.gram"][i])
            u, s, vh = torch.linalg.svd(rest[i] @ root)
            low = (u[:, : step.rank] * s[: step.rank]) @ vh[: step.rank] @ torch.linalg.inv(root)
            module = made.model.layers[i].get_submodule(f"self_attn.{part}_proj")
            eye = torch.eye(48, dtype=torch.float64)
            assert_close(module(eye).mT.detach(), weights[i] - rest[i] + low, 1e-8)


def test_as_many_matrices_as_layers_change_nothing(model):
    whole = run(model)
    assert_close(run(converted(model, planned(model, "masa:groups=1,keep=1,refine=false")[0])), whole, ROUND)


@pytest.mark.parametrize("spec", ["masa", "low_rank", "low_rank:method=svd", "low_rank:method=basis,group=2"])
def test_what_keeps_all_is_the_model(model, spec):
    """Two thin matrices with as many parameters as a square one have half its rank."""
    kept = f"{spec}{',' if ':' in spec else ':'}keep=1"
    assert torch.equal(run(converted(model, planned(model, kept)[0])), run(model))


def test_a_basis_is_one_parameter_of_its_layers_and_asked_for_in_order(model):
    plan, stats = planned(model, "low_rank:method=basis,group=2")
    made = converted(model, plan)
    whole = torch.cat([ModelAnatomy(model).weight("q", i) for i in range(2)])
    root = whitener(torch.stack(list(stats.values["attention.gram"][:2])).mean(0))  # of both layers' inputs
    u, s, vh = torch.linalg.svd(whole @ root, full_matrices=False)
    rank = plan.steps[0].rank
    left = torch.cat([step.tensors["left"] for step in plan.steps[:2]])
    want = (u[:, :rank] * s[:rank]) @ vh[:rank] @ torch.linalg.inv(root)
    assert_close(left @ plan.steps[0].tensors["right"], want, 1e-8)
    layers = [layer.self_attn for layer in made.model.layers]
    assert layers[0].q_proj.right is layers[1].q_proj.right and layers[2].q_proj.right is not layers[0].q_proj.right
    assert layers[0].o_proj.right is not layers[1].o_proj.right
    alone = SurgeryPlan((Factorise(part="q", layer=1, rank=2, reads=0),))
    with pytest.raises(UserError, match="factorise it first"):
        converted(model, alone)


def test_what_cannot_be_is_refused(model):
    for spec, said in (
        ("masa:keep=0", "a share"), ("masa:atoms=0", "atoms is"), ("masa:parts=x", "parts are"),
        ("low_rank:method=x", "method is"), ("low_rank:method=basis,group=0", "one layer"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            parse(spec)
    with pytest.raises(UserError, match="3 layers"):
        planned(model, "masa:groups=4")
    with pytest.raises(UserError, match="less than one matrix"):
        planned(model, "masa:groups=2,keep=0.6,refine=false")
    with pytest.raises(UserError, match="keep more"):
        planned(model, "masa:groups=1,keep=0.2,atoms=1")
    with pytest.raises(UserError, match=r"more than 0\.01 of its parameters: keep 0\.042 or more"):
        planned(model, "low_rank:keep=0.01,parts=q")
    rank = planned(model, "low_rank:keep=0.042,parts=q")[0].steps[0].rank
    assert rank == 1
