# SPDX-License-Identifier: Apache-2.0
"""COMCAT: products of a head are exact at full rank with their biases, else truncated as the formula has it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads import UserError, parse
from manyheads.conversion import Factorise, HeadDim, Prune, SurgeryPlan
from manyheads.convert._low_rank import product_factors, whitener
from manyheads.convert.comcat import COMCAT, HeadProducts
from manyheads.converter import calibrated
from manyheads.integrations.anatomy import ModelAnatomy
from manyheads.integrations.surgery import converted
from manyheads.integrations.surgery_files import load, outputs, save
from oracles.conversions import DIM, HEADS, LAYERS, WIDTH, tiny
from tolerance import assert_close, is_far

ROUND = 1e-10  # float64 through decompositions
IMAGES = {kind: [torch.randn(4, 3, side, side, dtype=torch.float64)] for kind, side in (("vit", 16), ("dinov2", 28))}


def run(model):
    with torch.inference_mode():
        return outputs(model)


def made(kind, spec, model=None):
    model = model or tiny(kind)
    return model, *calibrated(model, parse(spec), IMAGES[kind])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_products_are_those_of_the_svd(d, c, e, whiten, seed):
    source = torch.Generator().manual_seed(seed)
    a, b, x, y = (torch.randn(n, m, generator=source).double() for n, m in ((d, c), (d, e), (40, c), (40, e)))
    roots = (whitener(x.mT @ x / 40), whitener(y.mT @ y / 40)) if whiten else (None, None)
    left, right, values = product_factors(a, b, *roots)
    assert_close(left.mT @ right, a.mT @ b, ROUND)
    one, other = (torch.eye(n).double() if root is None else root for n, root in zip((c, e), roots, strict=True))
    u, s, vh = torch.linalg.svd(one @ a.mT @ b @ other)
    assert_close(values[: min(d, c, e)], s[: min(d, c, e)], ROUND)
    low = torch.linalg.inv(one) @ (u[:, :1] * s[:1] @ vh[:1]) @ torch.linalg.inv(other)
    assert_close(left[:1].mT @ right[:1], low, 1e-7)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_full_rank_changes_nothing_but_without_biases_it_does(kind):
    model, whole, plan = made(kind, "comcat:keep=1")
    assert_close(run(whole), run(model), ROUND)
    assert all(step.dim == DIM for step in plan.steps)
    assert is_far(run(made(kind, "comcat:keep=1,biases=false", model)[1]), run(model), 0.01)


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_a_layer_computes_the_truncated_products(kind):
    model, cut, _ = made(kind, "comcat:keep=0.5,ranks=uniform,whiten=false")
    anatomy, x = ModelAnatomy(model), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    ones = torch.cat([x, torch.ones(2, 7, 1)], -1).double()
    for i in range(LAYERS):
        q, k, v = (
            torch.cat([anatomy.weight(p, i), anatomy.bias(p, i)[:, None]], 1).unflatten(0, (HEADS, DIM)) for p in "qkv"
        )
        want = anatomy.bias("o", i).expand(2, 7, WIDTH).clone()
        for h in range(HEADS):
            low = []
            for product in (q[h].mT @ k[h], anatomy.weight("o", i).unflatten(1, (HEADS, DIM))[:, h] @ v[h]):
                u, s, vh = torch.linalg.svd(product)
                low.append(u[:, :4] * s[:4] @ vh[:4])
            weights = (ones @ low[0] @ ones.mT / DIM**0.5).softmax(-1)  # the old scale
            want += weights @ ones @ low[1].mT
        got = ModelAnatomy(cut).blocks[i].get_submodule("attention")(x)[0]
        assert_close(got.detach(), want, ROUND)


def test_whitened_products_lose_less_of_what_inputs_give():
    model, _, plain = made("vit", "comcat:keep=0.4,ranks=uniform,whiten=false")
    anatomy, strategy = ModelAnatomy(model), COMCAT(keep=0.4, ranks="uniform")
    inputs = []
    handle = anatomy.blocks[1].attention.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    whitened = calibrated(model, strategy, IMAGES["vit"])[1]
    handle.remove()
    x = torch.cat([inputs[0].flatten(0, 1), torch.ones(inputs[0].shape[0] * inputs[0].shape[1], 1)], 1).double()
    errors, given = [], []
    for plan in (whitened, plain):
        tensors = plan.steps[1].tensors
        v, whole_v = (
            torch.cat([w, b[:, None]], 1).unflatten(0, (HEADS, -1))
            for w, b in ((tensors["v"], tensors["v.bias"]), (anatomy.weight("v", 1), anatomy.bias("v", 1)))
        )
        o, whole_o = (w.unflatten(1, (HEADS, -1)).transpose(0, 1) for w in (tensors["o"], anatomy.weight("o", 1)))
        given.append(float(((o @ v - whole_o @ whole_v) @ x.mT).square().sum()))
        q, k = (torch.cat([tensors[p], tensors[f"{p}.bias"][:, None]], 1).unflatten(0, (HEADS, -1)) for p in "qk")
        whole_q, whole_k = (
            torch.cat([anatomy.weight(p, 1), anatomy.bias(p, 1)[:, None]], 1).unflatten(0, (HEADS, -1)) for p in "qk"
        )
        scale = (DIM / plan.steps[1].dim) ** 0.5
        change = x @ (scale * q.mT @ k - whole_q.mT @ whole_k) @ x.mT
        errors.append(float(change.square().sum()))
    assert errors[0] < errors[1] and given[0] < given[1]


def test_what_a_rank_loses_is_its_share_of_the_squares():
    model = tiny("vit")
    anatomy = ModelAnatomy(model)
    q, k, v = (
        torch.cat([anatomy.weight(p, 1), anatomy.bias(p, 1)[:, None]], 1).unflatten(0, (HEADS, DIM)) for p in "qkv"
    )
    o = anatomy.weight("o", 1).unflatten(1, (HEADS, DIM)).transpose(0, 1)
    squares = [torch.linalg.svdvals(product)[:, :DIM].square() for product in (q.mT @ k, o @ v)]
    want = sum((s / s.sum(-1, keepdim=True)).sum(0) for s in squares)
    assert_close(HeadProducts.of(model=anatomy, layer=1, moment=None).lost, want, ROUND)


def test_feed_forward_layers_are_whitened_products():
    model, _, plan = made("vit", "comcat:keep=1,mlp=0.6")
    anatomy, read = ModelAnatomy(model), []
    handle = anatomy.blocks[1].mlp.fc2.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.inference_mode():
        model(IMAGES["vit"][0])
    handle.remove()
    x = read[0].flatten(0, 1)
    root, weight = whitener(x.mT @ x / len(x)), anatomy.weight("down", 1)
    (step,) = (s for s in plan.steps if isinstance(s, Factorise) and (s.part, s.layer) == ("down", 1))
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    want = (u[:, : step.rank] * s[: step.rank]) @ vh[: step.rank] @ torch.linalg.inv(root)
    assert_close(step.tensors["left"] @ step.tensors["right"], want, 1e-4)  # a Gram matrix of float32
    assert is_far(want, weight, 0.01)


@pytest.mark.parametrize(("spec", "plain"), [
    ("comcat:ranks=uniform", True), ("comcat", False), ("comcat:keep=0.6,mlp=0.5", False),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_sizes_and_files(kind, spec, plain, tmp_path):
    uneven = tiny(kind)
    with torch.no_grad():  # a layer whose heads are of rank 2, so that spectra differ
        few = torch.tensor([1, 1, *[0.01] * 6]).double().repeat(HEADS)
        for part in "qkvo":
            ModelAnatomy(uneven).weight(part, 1).mul_(few if part == "o" else few[:, None])
    model, cut, plan = made(kind, spec, uneven)
    anatomy, count = ModelAnatomy(model), sum(p.numel() for p in cut.parameters())
    assert count == anatomy.parameters(plan)
    dims = [step.dim for step in plan.steps if isinstance(step, HeadDim)]
    assert sum(dims) == int(parse(spec).keep * LAYERS * DIM) and (len(set(dims)) == 1) == ("uniform" in spec)
    assert save(cut, tmp_path, plan, model.config, {}) == plain
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64) if plain else load(tmp_path)
    assert_close(run(again), run(cut), ROUND)


def test_ranks_go_where_the_most_is_lost():
    def products(*lost):
        return HeadProducts((torch.empty(0),) * 2, (torch.empty(0),) * 2, torch.tensor(lost))

    found = [products(1.0, 0.5, 0.4, 0.3), products(1.0, 0.2, 0.1, 0.0), products(1.0, 0.45, 0.05, 0.0)]
    assert COMCAT(keep=0.5)._ranks(found) == [3, 1, 2]
    assert COMCAT(keep=0.5, ranks="uniform")._ranks(found) == [2, 2, 2]
    assert COMCAT(keep=1)._ranks(found) == [4, 4, 4]


def test_what_cannot_be_is_refused():
    for spec, said in (("keep=0", "shares"), ("mlp=2", "shares"), ("ranks=x", "spectra or uniform")):
        with pytest.raises(UserError, match=said):
            parse(f"comcat:{spec}")
    for ranks in ("spectra", "uniform"):
        with pytest.raises(UserError, match=r"keep=0\.125 or more"):
            made("vit", f"comcat:keep=0.1,ranks={ranks}")
        assert {step.dim for step in made("vit", f"comcat:keep=0.125,ranks={ranks}")[2].steps} == {1}
    with pytest.raises(UserError, match=r"more than 0\.01 of its parameters"):
        made("vit", "comcat:mlp=0.01")
    model = tiny("llama")
    with pytest.raises(UserError, match="converts models of dinov2, vit"):
        calibrated(model, parse("comcat"), [])
    with pytest.raises(UserError, match="keep their channels"):
        converted(model, SurgeryPlan((HeadDim(layer=0, dim=4),)))


def test_heads_may_be_cut_first():
    half = converted(tiny("vit"), SurgeryPlan((Prune(axis="heads", keep=(0, 2, 3)),)))
    made_half, _ = calibrated(half, parse("comcat:keep=1"), IMAGES["vit"])
    assert_close(run(made_half), run(half), ROUND)
