# SPDX-License-Identifier: Apache-2.0
"""The engine of all lenses: statistics equal those of dense maps; nothing changes; padding, batches and decoding."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import manyheads
from manyheads.calls.statistics import Band, Columns, ColumnSum, Entropy, Pooled, WeightedSum
from manyheads.calls.weights import measure, weights
from manyheads.errors import UserError
from manyheads.heads import HeadTable, ablation_curve, layer_matched_heads
from manyheads.lens import Lens, LensResult, PerToken, RunningMean, TokenSpans, table
from oracles import dense, models
from tolerance import FORMULA, SAME, assert_close, error, is_close, is_far, nearly

NAMES = ("llama", "gpt2", "qwen3", "gemma2", "gemma3_text", "gpt_oss", "deepseek_v3", "bert", "bart", "whisper")


@dataclass(frozen=True, kw_only=True)
class Everything(Lens):
    """Every statistic at every site, kept as it comes."""

    block: int | None = None

    def statistics(self, view):
        size = view.call.k.shape[2]
        where = view.key_positions.float()
        return {
            "mass": WeightedSum(torch.stack([view.first().float(), where.expand_as(view.keys)], -1)),
            "entropy": Entropy(),
            "column": Columns(torch.arange(0, size, 3)),
            "received": ColumnSum(view.valid[..., None].float()),
            "band": Band(torch.arange(5, 0, -1).float(), view.valid),
            "pooled": Pooled(4),
        }

    def update(self, view, found):
        view.memory.setdefault("valid", PerToken()).add(view.valid.float(), view.fresh)
        view.memory.setdefault("mass", PerToken()).add(found["mass"].transpose(1, 2), view.fresh)
        view.memory.setdefault("entropy", PerToken()).add(found["entropy"].transpose(1, 2), view.fresh)
        view.memory.setdefault("near", PerToken()).add(found["band"][0].transpose(1, 2), view.fresh)
        count = view.valid.sum(1)[:, None]
        masked = found["entropy"].masked_fill(~view.valid[:, None], 0)
        view.memory.setdefault("tally", RunningMean()).add(masked.sum(-1), count, view.fresh)
        view.memory["last"] = found

    def compute(self, sites):
        return LensResult(tables={"entropy": table("entropy", sites, "tally")})


def look(name, lens=None, attn=None, **given):
    model = models.tiny(name) if attn is None else models.build(name, attn=attn)
    with manyheads.watch(model, lens or Everything()) as seen, torch.no_grad():
        model(**given)
    return seen._port.kept(seen._bundle), seen


def given(name, padded=True):
    made = models.inputs(name)
    if name in models.SEQ2SEQ:
        made["decoder_input_ids"] = models.tokens(2, 11, seed=1)
    if not padded:
        made.pop("attention_mask", None)
    return made


def compare_with_maps(name, sites, maps):
    used = dict.fromkeys(maps, 0)
    for site, memory in sites:
        kind = "cross" if site.kind == "cross" else "self" if site.causal or "encoder" not in maps else "encoder"
        want, mine = maps[kind][used[kind]], memory["0"]["last"]
        used[kind] += 1
        rows = torch.stack([torch.as_tensor(x) for x in memory["0"]["valid"].rows()]).bool()[:, None]

        def same(got, right, rows=rows):
            where = rows[..., None].expand_as(right) if right.ndim == 4 else rows.expand_as(right)
            assert_close(got[where], right[where], SAME)

        size = want.shape[3]
        same(mine["entropy"], torch.special.entr(want).sum(-1))
        same(mine["column"], want[..., ::3])
        same(mine["mass"][..., 1], want @ torch.arange(size).float())
        back = torch.arange(want.shape[2])[:, None] + size - want.shape[2] - torch.arange(size)
        profile = torch.where((back >= 0) & (back < 5), 5.0 - back, 0.0)
        same(mine["band"][0], (want * profile).sum(-1))
        counted = want * rows[..., None]
        assert_close(mine["band"][1], (counted * profile).sum(2), SAME)
        assert_close(mine["received"][..., 0], counted.sum(2), SAME)
        assert error(mine["received"][..., 0], want.sum(2) * 1.001) > SAME
    assert all(used[kind] == len(maps[kind]) for kind in maps)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_equal_dense_maps(name):
    """With padding on the left, under either attention function of the model."""
    inputs = given(name)
    maps = dense.maps(dense.eager(name), **inputs)
    compare_with_maps(name, look(name, attn="eager", **inputs)[0], maps)
    if name not in ("gemma2", "gpt_oss"):  # SDPA has neither cap nor sinks
        compare_with_maps(name, look(name, **inputs)[0], maps)


def test_blocks_of_any_size_and_a_wrong_one():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, t, 8, generator=generator).double() for h, t in ((4, 13), (2, 17), (2, 17)))
    site = manyheads.Site("x", 0, 0, "self", True)
    call = manyheads.AttentionCall(site, q, k, v, scale=0.3, is_causal=True)
    want = torch.cat([rows for _, rows in weights(call, 1000)], 2)
    assert_close(want @ v.repeat_interleave(2, 1), call.attend().transpose(1, 2), FORMULA)
    assert_close(want.sum(-1), torch.ones(2, 4, 13).double(), FORMULA)
    for block in (1, 3, 13, None):
        made = measure(call, [Entropy(), Band(torch.ones(4).double()), Pooled(5), Pooled(100)], block)
        assert_close(made[0], torch.special.entr(want).sum(-1), FORMULA)
        assert_close(made[3], want, FORMULA)
        cell = want[:, :, :3, :4].mean((-1, -2))
        assert_close(made[2][:, :, 0, 0], cell, FORMULA)
        assert made[2].shape == (2, 4, 5, 5)
        assert error(made[1][0], want.tril(17 - 13 + 3).sum(-1)) > 1e-3
    empty = call.replace(mask=torch.zeros(2, 1, 13, 17, dtype=torch.bool))
    assert all(not rows.any() for _, rows in weights(empty))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_decoding_equals_one_forward(name):
    """Left-padded, with a cache, sliding windows too: the same value for every token and every head."""
    inputs = models.inputs(name)
    model = models.tiny(name)
    with manyheads.watch(model, Everything()) as seen:
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 12, dtype=torch.long)], 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, :-1]  # as generate gives them
    whole, again = look(name, input_ids=ids[:, :-1], attention_mask=mask[:, :-1], position_ids=places)
    for (_, a), (_, b) in zip(seen._port.kept(seen._bundle), whole, strict=True):
        for key in ("entropy", "near", "valid"):
            for x, y, ok in zip(a["0"][key].rows(), b["0"][key].rows(), b["0"]["valid"].rows(), strict=True):
                assert_close(torch.tensor(x)[ok > 0], torch.tensor(y)[ok > 0], SAME)
    assert is_close(seen.compute().tables["entropy"].values, again.compute().tables["entropy"].values)
    assert is_far(seen.compute().tables["entropy"].values[0], again.compute().tables["entropy"].values[1])


def test_a_batch_is_its_rows_and_prompts_stay_apart():
    model, ids = models.tiny("llama"), models.tokens(3, 16)
    with manyheads.watch(model, Everything()) as seen, torch.no_grad():
        model(ids)
        for row in ids:
            model(row[None])
        mask = torch.ones(1, 21, dtype=torch.long)
        mask[:, 16:] = 0
        model(torch.cat([ids[:1], torch.full((1, 5), 7)], 1), attention_mask=mask)  # padded on the right
    made = seen.compute().tables["entropy"].values
    assert made.shape == (7, 2, 4)
    assert is_close(made[:3], made[3:6]) and is_close(made[0], made[6])
    assert is_far(made[0], made[1])


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart"])
def test_looking_changes_no_bit(name):
    model = models.tiny(name)
    plain = models.forward(name, model)
    with manyheads.watch(model, Everything(), Everything(block=3)):
        assert torch.equal(models.forward(name, model), plain)
    assert torch.equal(models.forward(name, model), plain)


@pytest.mark.slow
def test_compiled():
    torch._dynamo.reset()
    model = models.build("llama")
    fast = torch.compile(model, backend="eager")
    ids = models.tokens(2, 12)
    with manyheads.watch(model, Everything()) as seen, torch.no_grad():
        logits = fast(ids).logits
        assert torch.equal(fast(ids).logits, logits)
    want = look("llama", input_ids=ids)[1].compute().tables["entropy"].values
    assert is_close(seen.compute().tables["entropy"].values, np.concatenate([want, want]))
    torch._dynamo.reset()


def test_roles():
    model, ids = models.tiny("llama"), models.tokens(2, 10)
    found = {}

    @dataclass(frozen=True, kw_only=True)
    class Parts(Everything):
        def update(self, view, told):
            super().update(view, told)
            for role in ("bos", "system", "response"):
                found[role] = (view.rows(role), view.columns(role))

    roles = TokenSpans({"system": [[(0, 3), (5, 6)], [(4, 6)]]})
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    with manyheads.watch(model, Parts(), roles=roles), torch.no_grad():
        with pytest.raises(UserError, match="known are system"):
            roles.mask("image", torch.arange(3), 2)
        roles.spans["bos"] = [[(0, 1)], [(4, 5)]]
        model(ids, attention_mask=mask)
    rows, columns = found["system"]
    assert columns.int().tolist() == [[1, 1, 1, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]]
    assert torch.equal(rows, columns)
    assert found["response"][0].int().tolist() == [[0] * 6 + [1] * 4, [0] * 6 + [1] * 4]
    assert found["bos"][1].int().argmax(1).tolist() == [0, 4]


def test_refusals():
    model = models.tiny("llama")
    with pytest.raises(UserError, match="acts on the model"):
        manyheads.watch(model, "snapkv")
    with pytest.raises(UserError, match="at least one lens"):
        manyheads.watch(model)
    with pytest.raises(UserError, match="does not look here"):
        look("llama", input_ids=models.tokens(1, 4))[1].compute("sinks")
    with (
        pytest.raises(UserError, match="has dropped some"),
        manyheads.use(model, "knorm:budget=0.5"),
        manyheads.watch(model, "active_dormant"),
    ):
        model.generate(models.tokens(1, 24), max_new_tokens=3)


def test_head_table():
    values = np.arange(24.0).reshape(2, 3, 4)
    values[0, 0, 0] = np.nan
    made = HeadTable("score", ("a", "b", "c"), values, {"seed": 0})
    assert made.mean[0, 0] == 12 and made.mean[2, 3] == 17
    assert made.top(2) == [(2, 3), (2, 2)] and made.top(1, largest=False) == [(0, 1)]
    again = HeadTable.from_dict(json.loads(json.dumps(made.to_dict(), allow_nan=False)))
    assert np.array_equal(again.values, made.values, equal_nan=True) and again.about == {"seed": 0}
    assert made.correlation(made) == nearly(1)
    turned = HeadTable("turned", made.sites, -made.values)
    assert made.correlation(turned) == nearly(-1)
    assert made.overlap(made, 3) == (3, nearly(1 / 220))
    assert made.overlap(turned, 3) == (0, nearly(1.0))
    low, high = made.interval()
    assert (low <= made.mean).all() and (high >= made.mean).all() and (high - low)[1, 1] > 1
    assert np.isinf(HeadTable("one", ("a",), np.zeros((1, 4))).interval()[0]).all()
    with pytest.raises(UserError, match="do not fit"):
        HeadTable("bad", ("a",), values)
    heads = [(0, 1), (0, 2), (2, 0)]
    drawn = layer_matched_heads(heads, 4, 0, avoid=heads)
    assert sorted(r for r, _ in drawn) == [0, 0, 2] and not set(drawn) & set(heads) and len(set(drawn)) == 3


def test_picture(tmp_path):
    for sign in (1, -1):
        made = HeadTable("score", ("a", "b"), sign * np.arange(8.0).reshape(2, 4), layers=(3, 7))
        text = made.plot(tmp_path / "heads.svg").read_text()
        assert "<svg" in text and len(text) > 1000


def test_ablation_curve():
    """The chosen heads are those of the table, the control is of the same layers and never the same heads."""
    made = HeadTable("score", ("a", "b"), np.array([[0.0, 3.0, 0.0, 1.0], [0.0, 0.0, 2.0, 0.0]]), layers=(5, 9))
    gone = []

    def score(heads):
        gone.append(heads)
        return 10.0 - sum({"5.1": 3, "9.2": 2, "5.3": 1}.get(head, 0) for head in heads)

    curve = ablation_curve(made, (0, 1, 3), score, draws=4)
    assert curve.heads == ("5.1", "9.2", "5.3") and curve.ranked.tolist() == [10, 7, 4]
    assert curve.control.shape == (4, 3) and (curve.control[:, [0, 2]] == 10).all()
    assert set(curve.control[:, 1]) <= {9, 10}  # 5.3 may be drawn while it is not among the chosen
    assert all(sorted(h[0] for h in heads) == ["5", "5", "9"] for heads in gone if len(heads) == 3)


def test_the_interval_of_a_share_stays_one():
    """Few prompts near 1 would be given bounds above it; in log odds they are not."""
    values = np.array([[[0.999, 0.5, 1.0, 0.0]], [[0.90, 0.6, 1.0, 0.0]], [[0.97, 0.4, 1.0, 0.0]]])
    plain, share = HeadTable("x", ("a",), values), HeadTable("x", ("a",), values, {"share": True})
    low, high = share.interval()
    assert plain.interval()[1][0, 0] > 0.99 and (high <= 1).all() and (low >= 0).all()
    assert (low <= share.mean + 1e-9).all() and (high >= share.mean - 1e-9).all() and (low[0, :2] < high[0, :2]).all()
    assert is_close([x[0, 1] for x in (low, high)], [x[0, 1] for x in plain.interval()], 0.02)  # in the middle
    two = np.array([[[0.99]], [[0.6]]])
    assert (
        HeadTable("x", ("a",), two).interval()[1].max()
        > 1
        >= HeadTable("x", ("a",), two, {"share": True}).interval()[1].max()
    )
    assert not plain.minus(share).about["share"] and not share.minus(plain).about["share"]
