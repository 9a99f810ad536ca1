# SPDX-License-Identifier: Apache-2.0
"""Video-BLADE's attention: scores and blocks against their formulas, dense in its limits, on diffusers' own classes."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads.attention.reference import attention
from manyheads.attention.sparse import merge
from manyheads.call import AttentionCall, DiffusionStep, Layout, Site
from manyheads.diffusion.video_blade import Rival, VideoBlade
from manyheads.diffusion.video_blade.video_blade import pooled_attention, sampled_scores
from manyheads.errors import UserError
from oracles import diffusion as tiny
from oracles import pipelines
from tolerance import FORMULA, SAME, WRONG, assert_close, error

LAYOUT = Layout(4, 6, 5)


def tensors(length, heads=2, width=8, batch=2, count=3, seed=0, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, heads, length, width, generator=source, dtype=dtype) * 1.5 for _ in range(count)]


def call(layout=LAYOUT, seed=0, **more):
    length = layout.tokens + layout.text
    q, k, v = tensors(length, seed=seed)
    step = DiffusionStep(1, 3, 10, 500.0, ("all",), layout)
    site = Site("blocks.0.attn1", 0, 0, "joint" if layout.text else "self", False)
    return AttentionCall(**{"site": site, "q": q, "k": k, "v": v, "scale": 0.4, "diffusion": step, **more})


def dense(given, mask=None):
    return attention(given.q, given.k, given.v, scale=given.scale, mask=mask)


def mask_of(strategy, given):
    """Which pairs are read, in the model's own order of tokens."""
    plan = strategy.plan(given)
    mask = torch.zeros(2, 2, len(plan.order), len(plan.order), dtype=torch.bool)
    mask[:, :, plan.order[:, None], plan.order] = plan.pattern.to_mask().expand(2, 2, -1, -1)
    return mask


# ---- scores and blocks


def test_scores_are_those_of_the_formula():
    q, k = tensors(22, count=2)
    rows, columns = torch.tensor([[0, 3, 7], [1, 2, 6]]), torch.tensor([[5, 2, 0], [7, 4, 3]])
    got = sampled_scores(q, k, rows, columns, scale=0.3, block=8)
    want = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    for b, h in ((b, h) for b in range(2) for h in range(2)):
        for i in range(3):
            for r in (min(8 * i + int(x), 21) for x in rows[h]):
                logits = [[0.3 * q[b, h, r] @ k[b, h, min(8 * j + int(x), 21)] for x in columns[h]] for j in range(3)]
                top = max(max(block) for block in logits)
                for j in range(3):
                    want[b, h, i, j] = max(want[b, h, i, j], (max(logits[j]) - top).exp())
    assert_close(got.exp(), want, FORMULA)
    assert error(got.softmax(-1), want / want.sum(-1, keepdim=True)) <= FORMULA
    means = sampled_scores(q, k, rows, columns.flip(0), scale=0.3, block=8)  # draws of another head
    assert error(means.exp(), want) > WRONG * FORMULA


def test_scores_do_not_see_what_is_added_to_a_whole_row():
    q, k = tensors(32, count=2)
    draws = torch.arange(8).expand(2, 8)
    plain = sampled_scores(q, k, draws, draws, scale=0.3, block=8)
    shifted = k + torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    assert error(sampled_scores(q, shifted, draws, draws, scale=0.3, block=8), plain) <= 10 * FORMULA  # sums cancel
    one = k.clone()
    one[:, :, 5] = shifted[:, :, 5]
    assert error(sampled_scores(q, one, draws, draws, scale=0.3, block=8), plain) > 1e-3


def test_scores_do_not_depend_on_how_many_rows_are_scored_at_once(monkeypatch):
    q, k = tensors(40, count=2)
    draws = torch.arange(4).expand(2, 4)
    whole = sampled_scores(q, k, draws, draws, scale=0.3, block=8)
    monkeypatch.setattr("manyheads.diffusion.video_blade.video_blade._LOGITS", 1)
    assert_close(sampled_scores(q, k, draws, draws, scale=0.3, block=8), whole, FORMULA)


def test_kept_blocks_are_within_their_bounds_and_grow_with_the_mass():
    given = call()  # 120 tokens, 30 blocks
    kept = {}
    for mass in (0.05, 0.3, 0.6, 0.95):
        strategy = VideoBlade(block=4, samples=2, mass=mass, least=0.1, most=0.5)
        kept[mass] = strategy.plan(given).pattern.blocks()
        counts = kept[mass].sum(-1)
        assert counts.min() >= 3 and counts.max() <= 15
    assert kept[0.3].float().mean() < kept[0.95].float().mean()
    for less, more in ((0.05, 0.3), (0.3, 0.6), (0.6, 0.95)):
        assert not (kept[less] & ~kept[more]).any()
    other = VideoBlade(block=4, samples=2, mass=0.3, least=0.1, most=0.5, seed=1).plan(given).pattern.blocks()
    assert (other & ~kept[0.6]).any()  # draws of another seed are not nested
    assert VideoBlade(block=4, least=0, most=0).plan(given).pattern.blocks().sum(-1).min() == 1


def test_the_mass_is_reached_by_the_fewest_blocks():
    given = call()
    strategy = VideoBlade(block=4, samples=4, mass=0.5, least=0, most=1)
    plan = strategy.plan(given)
    q, k = given.q[:, :, plan.order], given.k[:, :, plan.order]
    scores = strategy.scores(given, q, k, None).softmax(-1)
    held = (scores * plan.pattern.blocks()).sum(-1)
    least = scores.masked_fill(~plan.pattern.blocks(), 2).amin(-1)
    assert held.min() >= 0.5 - 1e-12 and (held - least).max() < 0.5


@pytest.mark.parametrize("first", [True, False])
def test_text_is_read_and_reads_always(first):
    layout = Layout(4, 6, 5, text=7, text_first=first)
    given = call(layout)
    strategy = VideoBlade(block=8, samples=2, least=0, most=0.1)
    mask = mask_of(strategy, given)
    text = slice(0, 7) if first else slice(120, 127)
    assert mask[:, :, text].all() and mask[:, :, :, text].all() and not mask.all()
    wrong = dataclasses.replace(layout, text_first=not first)
    other = mask_of(strategy, given.replace(diffusion=dataclasses.replace(given.diffusion, layout=wrong)))
    assert not other[:, :, text].all()


# ---- what is computed


@pytest.mark.parametrize("text", [0, 7])
def test_the_result_is_attention_under_the_mask(text):
    given = call(dataclasses.replace(LAYOUT, text=text))
    strategy = VideoBlade(block=8, samples=4, most=0.3)
    mask = mask_of(strategy, given)
    assert_close(strategy.attend(given), dense(given, mask), FORMULA)
    assert error(dense(given, mask.roll(8, 3)), dense(given, mask)) > WRONG * FORMULA


def test_all_blocks_are_dense_attention_in_either_order():
    for layout in (LAYOUT, Layout(3, 4, 7, text=5, text_first=True)):
        given = call(layout)
        for order in ("hilbert", "raster"):
            strategy = VideoBlade(block=8, samples=2, mass=1, most=1, order=order)
            assert_close(strategy.attend(given), dense(given), FORMULA)
            assert sorted(strategy.plan(given).order.tolist()) == list(range(given.q.shape[2]))
    half = dataclasses.replace(strategy, most=0.5)
    assert error(half.attend(given), dense(given)) > 1e-2
    other = dataclasses.replace(half, order="hilbert")
    assert error(other.attend(given), half.attend(given)) > 1e-3


def test_windows_beside_blocks_are_one_softmax():
    given = call()
    strategy = VideoBlade(block=8, samples=4, most=0.3, pool=9)  # 120 tokens: the last window has 3
    plan = strategy.plan(given)
    k, v = given.k[:, :, plan.order], given.v[:, :, plan.order]
    means = [torch.stack([x[:, :, i : i + 9].mean(2) for i in range(0, 120, 9)], 2) for x in (k, v)]
    bias = torch.tensor([9.0] * 13 + [3.0], dtype=torch.float64).log()

    def want(bias):
        own = (given.q @ given.k.transpose(2, 3) * given.scale).masked_fill(~mask_of(strategy, given), -torch.inf)
        weights = torch.cat([own, given.q @ means[0].transpose(2, 3) * given.scale + bias], 3).softmax(3)
        return (weights @ torch.cat([given.v, means[1]], 2)).transpose(1, 2)

    assert_close(strategy.attend(given), want(bias), 4 * FORMULA)  # two attentions and a merge
    assert error(strategy.attend(given), want(torch.zeros(14, dtype=torch.float64))) > 1e-2


def test_windows_of_one_token_are_dense_attention():
    given = call()
    out, lse = pooled_attention(given.q, given.k, given.v, 1, scale=given.scale)
    assert_close(out.transpose(1, 2), dense(given), FORMULA)
    assert_close(lse, (given.q @ given.k.transpose(2, 3) * given.scale).logsumexp(-1), FORMULA)
    twice, _ = merge((out, out), (lse, lse))
    assert_close(twice, out, FORMULA)
    assert error(pooled_attention(given.q, given.k, given.v, 2, scale=given.scale)[0], out) > 1e-2


def test_gradients_are_those_of_the_mask():
    given = call()
    strategy = VideoBlade(block=8, samples=4, most=0.3)
    found = []
    for attend in (strategy.attend, lambda c: dense(c, mask_of(strategy, c))):
        leaves = [x.clone().requires_grad_() for x in (given.q, given.k, given.v)]
        out = attend(given.replace(q=leaves[0], k=leaves[1], v=leaves[2]))
        found.append(torch.autograd.grad(out.square().sum(), leaves))
    for got, want in zip(*found, strict=True):
        assert_close(got, want, 4 * FORMULA)
    assert error(found[0][0], found[0][1]) > 1e-2


# ---- on diffusers' classes


@pytest.mark.parametrize("name", tiny.ALL)
def test_unmodified_denoisers(name):
    model = tiny.tiny(name)
    plain = tiny.forward(name, model)
    every = "video_blade:block=4,mass=1,most=1"
    with manyheads.use(model, every):
        assert_close(tiny.forward(name, model), plain, SAME)
    with manyheads.use(model, "video_blade:block=4,samples=2,most=0.4"):
        sparse = tiny.forward(name, model)
        assert error(sparse, plain) > 1e-3
        assert torch.equal(tiny.forward(name, model), sparse)  # draws are the same again
    assert torch.equal(tiny.forward(name, model), plain)


def test_a_pipeline_twice_and_bit_exact_where_there_is_one_block():
    pipe = pipelines.wan()
    plain = pipelines.run_wan(pipe, steps=3)
    with manyheads.use(pipe, "video_blade"):  # 48 tokens are less than a block
        assert torch.equal(pipelines.run_wan(pipe, steps=3), plain)
    with manyheads.use(pipe, "video_blade:block=4,samples=2"):
        first = pipelines.run_wan(pipe, steps=3)
        assert torch.equal(pipelines.run_wan(pipe, steps=3), first) and error(first, plain) > 1e-3


# ---- where it does not act


def test_what_is_left_to_the_model():
    strategy = VideoBlade(block=8)
    given = call()
    assert strategy.refusal(given) is None and strategy.attend(given) is not None
    short = {"k": given.k[:, :, :20], "v": given.v[:, :, :20]}
    on_gpu = SimpleNamespace(is_cuda=True, shape=given.q.shape)
    step = given.diffusion
    left = {
        "other tokens": given.replace(**short),
        "other tokens than": given.replace(diffusion=dataclasses.replace(step, axis="time")),
        "bias": given.replace(bias=torch.zeros(1, 1, 1, 120)),
        "mask": given.replace(mask=torch.ones(1, 1, 120, 120, dtype=torch.bool)),
        "one block": call(Layout(1, 2, 4)),
        "below 8192": given.replace(q=on_gpu),
    }
    quarter = given.replace(diffusion=dataclasses.replace(step, layout=Layout(2, 20, 24)))  # 120 = 10 x 12 tokens
    left["image's or a video's"] = quarter  # of a text, not of a frame at half the size
    frame = dataclasses.replace(quarter.diffusion, axis="space")
    assert strategy.refusal(quarter.replace(diffusion=frame)) is None
    for reason, other in left.items():
        assert reason in strategy.refusal(other)
        assert strategy.attend(other) is None
    assert dataclasses.replace(strategy, from_tokens=0).refusal(given.replace(q=on_gpu)) is None
    with pytest.raises(UserError, match="not known"):
        strategy.attend(given.replace(diffusion=dataclasses.replace(step, layout=None)))


def test_keys_that_are_padding_are_not_read():
    given = call(dataclasses.replace(LAYOUT, text=7))
    mask = torch.ones(2, 1, 1, 127, dtype=torch.bool)
    mask[1, ..., 123:] = False
    strategy = VideoBlade(block=8, samples=4, most=0.3)
    padded = given.replace(mask=mask)
    want = dense(given, mask_of(strategy, padded) & mask)
    assert_close(strategy.attend(padded), want, FORMULA)
    assert error(strategy.attend(given), want) > 1e-3


def test_refusals():
    for wrong, said in (("block=0", "at least 1"), ("mass=0", "above 0"), ("least=0.5,most=0.2", "least <= most")):
        with pytest.raises(UserError, match=said):
            manyheads.parse(f"video_blade:{wrong}")


# ---- rivals


@pytest.mark.parametrize("by", ["mean", "window", "random", "oracle"])
def test_rivals_read_as_many_blocks(by):
    given = call(seed=2)
    ours = VideoBlade(block=4, samples=2, mass=1, most=0.2)
    rival = Rival(block=4, mass=1, most=0.2, by=by)
    kept = rival.plan(given).pattern.blocks().expand(2, 2, 30, 30)
    assert (kept.sum(-1) == 6).all() and (ours.plan(given).pattern.blocks().sum(-1) == 6).all()
    if by == "window":
        assert kept.diagonal(dim1=2, dim2=3).all()
    again = rival.plan(given).pattern.blocks()
    assert torch.equal(again.expand_as(kept), kept) == (by != "random")


def test_the_oracle_holds_the_most():
    given = call(seed=2)
    weights = (given.q @ given.k.transpose(2, 3) * given.scale).softmax(-1)

    def kept(strategy):
        return (weights * mask_of(strategy, given)).sum(-1).mean()

    sizes = {"block": 4, "mass": 1, "most": 0.2}
    found = {by: kept(Rival(**sizes, by=by)) for by in ("mean", "random", "oracle")}
    ours = kept(VideoBlade(**sizes, samples=4))
    assert found["oracle"] > ours > found["random"]
