# SPDX-License-Identifier: Apache-2.0
"""Segformer++: attention over merged tokens as a dense formula says it, what presets merge, and what is refused."""

import dataclasses

import pytest
import torch

import manyheads
from manyheads import UserError
from manyheads.attention.grid_merging import behind, matched_cells, pooled_cells
from manyheads.call import AttentionCall, Site
from manyheads.reducing import Layout
from manyheads.tokens.segformer_pp import SegformerPP
from oracles import reducers
from tiny.image_encoders import NAMES, build, forward, images
from tolerance import CALL, FORMULA, SAME, assert_close, is_far, within

SPECS = (
    "segformer_pp:refuse=never", "segformer_pp:refuse=never,preset=fast,reach=1",
    "segformer_pp:refuse=never,preset=2x2",
    "segformer_pp:refuse=never,of=keys,proportional=true,ratio=0.5,cell=2", "segformer_pp:refuse=never,choose=random",
)  # fmt: skip
LINEAR = within(torch.float64, 4 * CALL)  # two projections and two means beside the call
SITE = Site("encoder.layer.0.attention", 0, None, "self", False)


def called(layout, queries, keys, seed=0, heads=2, width=4):
    """A call of attention with ``layout``, and without ``hidden``: queries are compared themselves."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, heads, n, width, generator=generator, dtype=torch.float64) for n in (queries, keys, keys))
    return AttentionCall(site=SITE, q=q, k=k, v=v, scale=0.5, state={"layout": layout})


def answered(strategy, call):
    edited = strategy.edit(call)
    return strategy.patch(edited, edited.attend()), edited


def groups_of(grouping):
    """``[B, M, N]``, 1 where a token is in a group."""
    return (grouping.into[:, None] == torch.arange(grouping.count)[:, None]).double()


def dense(call, part, grouping, proportional):
    """The formula, token by token: means over groups, softmax over them, and to each token what its group has."""
    groups = groups_of(grouping)
    means = groups / groups.sum(2, keepdim=True)
    q, k, v = call.q, call.k, call.v
    if part in ("queries", "both"):
        q = torch.einsum("bmn,bhnd->bhmd", means, q)
    if part in ("keys", "both"):
        k, v = (torch.einsum("bmn,bhnd->bhmd", means, x) for x in (k, v))
    logits = call.scale * q @ k.mT
    if proportional and part != "queries":
        logits = logits + groups.sum(2).log()[:, None, None]
    out = logits.softmax(3) @ v
    return (torch.einsum("bmn,bhmd->bnhd", groups, out) if part != "keys" else out.transpose(1, 2)), q, k


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("part", ["queries", "keys", "both"])
def test_attention_is_the_formula(part, proportional):
    layout = reducers.layout(5, 6)
    call = called(layout, 31, 31)
    strategy = SegformerPP(of=part, ratio=0.5, cell=2, proportional=proportional, refuse="never")
    got, edited = answered(strategy, call)
    metric = (call.k if part == "keys" else call.q).transpose(1, 2).flatten(2)
    grouping = behind(1, matched_cells(metric[:, 1:], (5, 6), 2, 15))
    want, q, k = dense(call, part, grouping, proportional)
    assert_close(got, want, FORMULA)
    assert (edited.q.shape[2], edited.k.shape[2]) == (q.shape[2], k.shape[2])
    if part != "queries":  # control: a count that is left away, or put where there is none
        assert is_far(got, dense(call, part, grouping, not proportional)[0], FORMULA)


def test_gradients_are_those_of_the_formula():
    layout, strategy = reducers.layout(4, 4), SegformerPP(of="both", ratio=0.4, cell=2, refuse="never")
    call = called(layout, 17, 17)
    leaves = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    got, _ = answered(strategy, call)
    grouping = behind(1, matched_cells(call.q.transpose(1, 2).flatten(2)[:, 1:], (4, 4), 2, 6))
    weights = torch.randn(got.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours = torch.autograd.grad((got * weights).sum(), leaves)
    theirs = torch.autograd.grad((dense(call, "both", grouping, False)[0] * weights).sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, LINEAR)


@pytest.mark.parametrize(
    ("stage", "preset", "part", "left"),
    [
        (0, "hq", "keys", 64 - 38), (1, "hq", "keys", 64 - 38), (2, "hq", "queries", 64 - 51),
        (3, "hq", "queries", 64 - 51), (0, "fast", "keys", 64 - 57), (3, "fast", "queries", 64 - 57),
        (0, "2x2", "queries", 16), (3, "2x2", "queries", 16),
    ],
)  # fmt: skip
def test_presets_really_merge(stage, preset, part, left):
    """As the paper's table of presets, by stage; the released fast and 2x2 merge nothing."""
    layout = Layout(grid=(8, 8), stage=stage, stages=4)
    edited = SegformerPP(preset=preset, refuse="never").edit(called(layout, 64, 64))
    counts = {"queries": edited.q.shape[2], "keys": edited.k.shape[2]}
    assert counts == {"queries": 64, "keys": 64} | {part: left}


def test_no_more_join_than_are_no_targets():
    edited = SegformerPP(ratio=0.99, cell=4, refuse="never").edit(called(Layout(grid=(8, 8)), 64, 64))
    assert edited.q.shape[2] == 4


def test_the_model_is_merged_before_its_projections_too():
    """Projections are linear: means of what is projected are what is projected of means."""
    layout = reducers.layout(4, 6, 0)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 24, 8, generator=generator, dtype=torch.float64)
    w = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    reduction = SegformerPP(refuse="never", cell=2).reduce(x, layout)
    assert_close(reduction.merge(x @ w + 1), reduction.merge(x) @ w + 1, LINEAR)


@pytest.mark.parametrize("spec", SPECS)
def test_a_reduction_keeps_sums_and_projects(spec):
    strategy = manyheads.parse(spec)
    x = called(None, 21, 21, width=3).q.transpose(1, 2).flatten(2)
    reduction = strategy.reduce(x, reducers.layout(4, 5))
    reducers.keeps_sums(reduction, x)
    reducers.is_projection(reduction, x)
    whole = pooled_cells(2, (4, 5), 2).restore(x[:, :6])  # the same in every cell
    flat = torch.cat([x[:, :1], whole], 1)
    lossless = SegformerPP(preset="2x2").reduce(flat, reducers.layout(4, 5))
    assert_close(lossless.restore(lossless.merge(flat)), flat, FORMULA)


def test_merged_equal_keys_with_their_count_are_full_attention():
    """The released code, which does not count, errs there: a key of many weighs as one."""
    call = called(Layout(grid=(4, 4)), 16, 16)
    k, v = (pooled_cells(2, (4, 4), 2).restore(x.transpose(1, 2).flatten(2)[:, :4]) for x in (call.k, call.v))
    k[:, 15], v[:, 15] = k[:, 14] + 5, v[:, 14] + 1  # one that is like no other: groups of unequal sizes
    k, v = (x.unflatten(2, (2, 4)).transpose(1, 2) for x in (k, v))
    call = call.replace(k=k, v=v)
    strategy = SegformerPP(of="keys", ratio=11 / 16, cell=2, proportional=True, refuse="never")
    got, edited = answered(strategy, call)
    assert edited.k.shape[2] == 5
    assert_close(got, call.attend(), FORMULA)
    assert is_far(answered(dataclasses.replace(strategy, proportional=False), call)[0], call.attend(), FORMULA)


def test_one_matching_serves_several_layers_and_ends_with_the_forward(monkeypatch):
    made = []

    def counted(*args, **kwargs):
        made.append(args)
        return matched_cells(*args, **kwargs)

    monkeypatch.setattr("manyheads.tokens.segformer_pp.matched_cells", counted)
    model, x = build("dinov2"), images()
    for every, want in ((1, 8), (2, 4), (3, 4), (9, 2)):
        made.clear()
        with manyheads.use(model, f"segformer_pp:refuse=never,every={every}"):
            assert torch.equal(forward(model, x), forward(model, x))
        assert len(made) == want


@pytest.mark.parametrize("name", NAMES)
def test_what_costs_more_than_it_saves_is_refused(name):
    model = build(name)
    with pytest.raises(UserError, match="costs more than it saves"), manyheads.use(model, "segformer_pp"):
        forward(model, images())


@pytest.mark.parametrize("side", [8, 32])
def test_the_count_refuses_small_images_alone(side):
    layout = Layout(grid=(side, side))
    call = called(layout, side**2, side**2, width=32)
    strategy = SegformerPP()
    if side == 8:
        with pytest.raises(UserError, match="costs more than it saves at 64 queries and 64 keys"):
            strategy.edit(call)
    else:
        assert strategy.edit(call).q.shape[2] == side**2 - int(0.8 * side**2)


def test_the_clock_refuses_what_it_finds_slower(monkeypatch):
    times = iter([5.0, 4.0, 1.0, 2.0, 4.0, 1.0])
    monkeypatch.setattr("manyheads.tokens.segformer_pp._milliseconds", lambda *_: next(times))
    strategy = SegformerPP(refuse="measured")
    with pytest.raises(UserError, match="5 ms against 3"):
        strategy.edit(called(Layout(grid=(8, 8)), 64, 64))
    call = called(Layout(grid=(8, 8)), 64, 64)
    strategy.edit(call)
    strategy.edit(call)  # not timed again: no times are left
    assert next(times, None) is None


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("preset=bsm_fast", "preset"), ("ratio=1", "below 1"), ("cell=1", "at least 2"), ("every=0", "every"),
        ("preset=2x2,ratio=0.5", "averages whole cells"),
    ],
)  # fmt: skip
def test_refused_settings(spec, match):
    with pytest.raises(UserError, match=match):
        manyheads.parse(f"segformer_pp:{spec}")


def test_refused_models():
    from oracles import models

    with pytest.raises(UserError, match="finds no attention"), manyheads.use(models.tiny("llama"), "segformer_pp"):
        pass
    with pytest.raises(UserError, match="on their grid"), manyheads.use(models.tiny("bert"), SPECS[0]):
        models.forward("bert", models.tiny("bert"))


@pytest.mark.parametrize("name", NAMES)
def test_in_models(name):
    model = build(name)
    reducers.is_off(model, "segformer_pp:ratio=0")
    counts = reducers.is_on(model, SPECS[0])
    tokens = {"vit": 65, "dinov2": 65, "segformer": None}[name]
    if tokens:
        assert counts == [(65 - 51, 65)] * 4  # a class token and 64 patches, of which 51 have joined others
    else:  # 256 tokens with 64 keys, of which 38 join; then 64 tokens, of which 51 join
        assert counts == [(256, 64 - 38)] * 2 + [(64 - 51, 64)] * 2
    for spec in SPECS[1:]:
        reducers.is_on(model, spec)
    reducers.is_restored(model, SPECS[0])
    reducers.is_row_by_row(model, SPECS[3])


@pytest.mark.parametrize("name", NAMES)
def test_eager_attention_is_the_same(name):
    x, found = images(height=12, width=18), []
    for attn in ("sdpa", "eager"):
        model = build(name, attn=attn)
        if name == "vit":
            x = images()
        with manyheads.use(model, SPECS[3]):
            found.append(forward(model, x))
    assert_close(*found, SAME)  # eager softmax of ViT is in float32


def test_control_of_the_oracles():
    """A layout that says the wrong grid, and one that counts the class token as a patch, are told apart."""
    call = called(reducers.layout(4, 4), 17, 17)
    strategy = SegformerPP(ratio=0.5, cell=2, refuse="never")
    want, _ = answered(strategy, call)
    for wrong in (reducers.layout(2, 8), reducers.layout(1, 16)):
        got, _ = answered(strategy, call.replace(state={"layout": wrong}))
        assert is_far(got, want, FORMULA)
