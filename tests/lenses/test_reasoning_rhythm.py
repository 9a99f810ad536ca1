# SPDX-License-Identifier: Apache-2.0
"""Spans, WAAD and FAI equal those of dense maps; closed forms; decoding; the credit by its sums and cases."""

import numpy as np
import pytest
import torch

import manyheads
from manyheads.calls.weights import measure, weights
from manyheads.errors import UserError
from manyheads.lens import AttentionView, TokenSpans
from manyheads.lenses.reasoning_rhythm import ReasoningRhythm, credit, middle_layers, peaks, weigh
from oracles import dense, models
from tolerance import CLOSE, FORMULA, SAME, assert_close, error, is_close, is_far, nearly

LENGTH, FIRST = 40, 9  # tokens, of which the response begins at
SMALL = "reasoning_rhythm:window=4,nearest=3,farthest=9"


def look(name, lens=SMALL, attn=None, first=FIRST, last=LENGTH, **inputs):
    model = models.tiny(name) if attn is None else models.build(name, attn=attn)
    roles = TokenSpans({"response": [[(first, last)]]})
    with manyheads.watch(model, lens, roles=roles) as seen, torch.no_grad():
        model(**inputs)
    return seen.compute()


def formula(maps, valid, response, window=4, near=3, far=9, share=0.3, sinks=True):
    """From dense maps ``[L, H, T, T]`` of one prompt: spans ``[L, H]``, with and without first token, WAAD, FAI."""
    maps = maps.double()
    t = torch.arange(maps.shape[-1])
    back = (t[:, None] - t).double()
    first = int(valid.float().argmax())
    rest = maps.clone()
    rest[..., first] = 0
    span = (maps * back).sum(-1)[..., response].mean(-1)
    beyond = (rest * back)[..., response, :].sum((-1, -2)) / rest[..., response, :].sum((-1, -2))
    order = (span if sinks else beyond).flatten().argsort()
    count = round(share * len(order))
    local, world = (maps.flatten(0, 1)[chosen].mean(0) for chosen in (order[:count], order[-count:]))
    waad = (local * back.clamp(max=window)).sum(-1).where(valid, torch.nan)
    fai = torch.full((len(t),), torch.nan).double()
    for s in t[valid]:
        rows = response & (t >= s + near) & (t <= s + far)
        fai[s] = world[rows, s].mean()
    return span, beyond, waad, fai


def same(found, n, want, limit=SAME):
    span, beyond, waad, fai = want
    assert_close(torch.tensor(found.tables["span"].values[n]), span, limit)
    assert_close(torch.tensor(found.tables["span_without_first"].values[n]), beyond, limit)
    for name, right in (("waad", waad), ("fai", fai)):
        got = torch.tensor(found.series[name][n])
        assert torch.equal(got.isnan(), right.isnan()), name
        assert_close(got.nan_to_num(), right.nan_to_num(), limit)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "gpt_oss"])
def test_equals_dense_maps(name):
    """Rows padded on the left, sets of heads of each prompt: with other bands, rows or sets it is something else."""
    ids, mask = models.tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    response = torch.arange(LENGTH) >= FIRST
    maps = torch.stack(dense.maps(dense.eager(name), input_ids=ids, attention_mask=mask)["self"], 1)
    for attn in ("eager", None) if name not in ("gemma2", "gpt_oss") else ("eager",):
        for sinks in (True, False):
            lens = f"{SMALL},per_prompt=true,sinks={sinks}"
            found = look(name, lens, attn, input_ids=ids, attention_mask=mask)
            for n in range(2):
                same(found, n, formula(maps[n], mask[n].bool(), response & mask[n].bool(), sinks=sinks))
    for other in ({"window": 5}, {"near": 2}, {"far": 10}, {"share": 0.5}):
        with pytest.raises(AssertionError):
            same(found, 0, formula(maps[0], mask[0].bool(), response, sinks=False, **other))
    assert np.isnan(found.series["waad"][1][:5]).all() and np.isfinite(found.series["waad"][1][5:]).all()
    gamma = found.series["gamma"][0]
    assert np.isnan(gamma[:FIRST]).all() and set(np.unique(gamma[FIRST:])) <= {1, 1.25, 1.5, 1.75}


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_decoders_of_pairs(name):
    """In encoder-decoder models it looks at the decoder's self-attention alone."""
    inputs = models.inputs(name)
    inputs["decoder_input_ids"] = models.tokens(2, 20, seed=1)
    inputs.pop("attention_mask", None)
    maps = torch.stack(dense.maps(dense.eager(name), **inputs)["self"], 1)
    valid = torch.ones(20, dtype=torch.bool)
    found = look(name, f"{SMALL},per_prompt=true", last=20, **inputs)
    for n in range(2):
        same(found, n, formula(maps[n], valid, torch.arange(20) >= FIRST))
    with pytest.raises(UserError, match="no attention to act on"):
        look("bert", input_ids=models.tokens(1, 6))


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_generation_equals_one_forward(name):
    """Left-padded, with a cache; keys that a sliding window has dropped keep what they received."""
    inputs, model = models.inputs(name), models.tiny(name)
    length = inputs["input_ids"].shape[1]
    with manyheads.watch(
        model, SMALL, roles=TokenSpans({"system": [[(0, length)]]})
    ) as seen:  # response: what is behind
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 24, dtype=torch.long)], 1)[:, :-1]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    whole = look(name, first=length, last=99, input_ids=ids[:, :-1], attention_mask=mask, position_ids=places)
    for key in whole.tables:
        assert is_close(seen.compute().tables[key].values, whole.tables[key].values, CLOSE)
    for key in ("waad", "fai"):  # repeated tokens tie, and gamma depends on what is just above what
        for a, b in zip(seen.compute().series[key], whole.series[key], strict=True):
            assert is_close(a, b, SAME)
    assert np.isfinite(whole.series["fai"][0]).sum() > 15


def test_a_batch_is_its_rows_and_looking_changes_no_bit():
    model, ids = models.tiny("llama"), models.tokens(3, LENGTH)
    with torch.no_grad():
        plain = model(ids).logits
    roles = TokenSpans({"response": [[(FIRST, LENGTH)]]})
    with manyheads.watch(model, f"{SMALL},per_prompt=true", roles=roles) as seen, torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
        for row in ids:
            model(row[None])
    found = seen.compute()
    for key in ("waad", "fai", "gamma"):
        assert is_close(found.series[key][:3], found.series[key][3:])
        assert is_far(found.series[key][0], found.series[key][1], SAME)
    assert is_close(found.tables["span"].values[:3], found.tables["span"].values[3:])


def closed(maps, block=None, **fields):
    """LensResult on given maps ``[H, T, T]``."""
    lens = ReasoningRhythm(**fields)
    heads, length, _ = maps.shape
    site = manyheads.Site("x", 0, 0, "self", True)
    q = torch.eye(length, dtype=torch.float64).expand(1, heads, -1, -1)
    k = maps.double().clamp(min=1e-300).log().transpose(-1, -2)[None]
    call = manyheads.AttentionCall(site, q, k, k, scale=1.0, is_causal=True)
    known = torch.ones(1, length, dtype=torch.bool)
    view = AttentionView(call, q, {"shared": {"whole": True}}, TokenSpans(), known, known, 0, True)
    asked = lens.statistics(view)
    lens.update(view, dict(zip(asked, measure(call, list(asked.values()), block), strict=True)))
    return lens.compute([(site, view.memory)])


def test_closed_forms():
    t = torch.arange(30, dtype=torch.float64)
    eye = torch.eye(30, dtype=torch.float64)[None]
    found = closed(eye)
    assert found.tables["span"].mean.max() < FORMULA
    assert np.abs(found.series["waad"][0]).max() < FORMULA and np.nanmax(found.series["fai"][0]) < FORMULA
    before = torch.zeros_like(eye)
    before[0, 0, 0] = 1
    before[0, t[1:].long(), t[:-1].long()] = 1
    found = closed(before)
    assert_close(torch.tensor(found.series["waad"][0]), (t > 0).double(), FORMULA)
    assert found.tables["span"].mean[0, 0] == nearly(29 / 30)
    uniform = torch.ones(1, 30, 30).double().tril() / (t + 1)[:, None]
    found = closed(uniform, nearest=4, farthest=7)
    assert found.tables["span"].mean[0, 0] == nearly(float(t.mean() / 2))
    want = torch.stack([t[: n + 1].clamp(max=10).sum() / (n + 1) for n in range(30)])
    assert_close(torch.tensor(found.series["waad"][0]), want, FORMULA)
    fai = torch.tensor(found.series["fai"][0])
    assert fai[26:].isnan().all() and fai[:26].isfinite().all()  # no row is four tokens past the last four
    assert fai[3] == nearly(float((1 / (t[7:11] + 1)).mean())) and fai[25] == nearly(1 / 30)
    sunk = torch.zeros_like(eye)
    sunk[..., 0] = 1
    found = closed(sunk)
    assert_close(torch.tensor(found.series["waad"][0]), t.clamp(max=10), FORMULA)
    assert found.tables["span"].mean[0, 0] == nearly(float(t.mean()))
    assert np.isnan(found.tables["span_without_first"].mean[0, 0]) and found.tables["first"].mean[0, 0] == 1
    assert found.series["fai"][0][0] == nearly(1) and np.nanmax(found.series["fai"][0][1:]) < FORMULA
    half = closed(torch.cat([eye, sunk, (before + sunk) / 2, uniform]))
    assert half.tables["span_without_first"].mean[0, 2] == nearly(1)
    assert half.tables["span"].mean[0, 2] > 7
    assert "no FAI" in closed(eye[:, :9, :9]).notes[-1] and "100% of their weight" in half.notes[1]


def test_distances_are_exact_far_away():
    """Blocks of rows count from their own first row: a local head at column 100,000 has span 1, in float32 too."""
    heads, size = 1, 100_000
    call = manyheads.AttentionCall(
        manyheads.Site("x", 0, 0, "self", True), torch.ones(1, heads, 3, 1), torch.zeros(1, heads, size, 1),
        torch.zeros(1, heads, size, 1), scale=1.0, is_causal=True,
    )  # fmt: skip
    call.k[:, :, -4:-2, 0] = torch.tensor([200.0, 200.7])
    lens, known = ReasoningRhythm(), torch.ones(1, size, dtype=torch.bool)
    view = AttentionView(call, call.q, {"shared": {"whole": True}}, TokenSpans(), known[:, :3], known, size - 3, False)
    found = measure(call, [lens.statistics(view)["distance"]], 1)[0][0, 0]
    near = torch.tensor(0.7).sigmoid()
    want = torch.arange(3) + 1 - near
    assert_close(found, want, 1e-6)
    rows = next(weights(call, 3))[1][0, 0]
    plain = (size - 3 + torch.arange(3)) - rows @ torch.arange(size, dtype=torch.float32)
    assert error(plain, want) > 1e-4


def test_layers_of_rl():
    assert middle_layers(range(36), 5) == (12, 15, 18, 21, 24) and middle_layers(range(2), 5) == (0, 1)
    assert middle_layers((3, 7, 11), 5) == (7, 11)
    inputs = {"input_ids": models.tokens(1, LENGTH)}
    assert len(look("llama", "reasoning_rhythm:middle=1", **inputs).tables["span"].sites) == 1
    for spec in ("window=0", "nearest=9,farthest=8", "head_share=0.6", "share=2"):
        with pytest.raises(UserError, match="reasoning_rhythm needs"):
            manyheads.parse(f"reasoning_rhythm:{spec}")


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


def test_peaks():
    score = torch.tensor([[3.0, torch.nan, 1.0, 3.0, 2.0, 0.0], [torch.nan] * 6])
    assert peaks(score, 0.4).tolist() == [[True, False, False, True, False, False], [False] * 6]
    assert peaks(score, 1.0)[0].tolist() == [True, False, True, True, True, True]
    assert peaks(score[:, [0, 3]], 0.5)[0].tolist() == [True, False]


def test_local_and_global_credit():
    everywhere = torch.ones(1, 6, dtype=torch.bool)
    waad, fai = row(0, 5, 5, 1, 1, 1), row(0.1, 0.2, 0.9, 0.3, torch.nan, torch.nan)
    assert credit(waad, fai, everywhere, "local").tolist() == [[1.5, 1, 1.5, 1, 1, 1]]  # of five changes two
    assert credit(waad, fai, everywhere, "global").tolist() == [[1, 1, 1.5, 1.5, 1, 1]]  # NaN is out of the quantile
    late = everywhere.clone()
    late[:, :3] = False
    assert credit(waad, fai, late, "local")[0, :3].tolist() == [1, 1, 1]
    assert credit(waad, fai, late, "global", amplify=3.0, share=1.0).tolist() == [[1, 1, 1, 3, 1, 1]]
    kept = credit(waad, fai, late, "global", share=1.0, normalise=True)
    assert kept[late].mean() == nearly(1) and kept[0, :3].tolist() == [1, 1, 1]


def test_coupled_credit():
    """A dominated anchor gives half its bonus to the token before it whose WAAD changes most."""
    everywhere = torch.ones(1, 10, dtype=torch.bool)
    waad = row(1, 1, 6, 0, 0, 1, 1, 1, 3, 1)  # changes 0 5 6 0 1 0 0 2 2
    fai = row(0, 0, 0, 0, 1, 0, 0, 0, 0.5, 0)
    gamma = credit(waad, fai, everywhere, share=0.2)
    assert gamma.tolist() == [[1, 1, 1.25, 1, 1.25, 1, 1, 1, 1.5, 1]]  # 4 introduced by 2; 8 is free
    assert (gamma - 1).sum() == nearly(0.5 * 2)
    assert credit(waad, fai, everywhere, share=0.2, back=1)[0, 4] == 1.5  # its introduction is out of reach
    assert credit(waad, fai, everywhere, share=0.2, alpha=1.0)[0, [2, 4]].tolist() == [1.5, 1]
    assert credit(waad, fai, everywhere, share=0.2, waad_quantile=0.0, change_quantile=1.0)[0, 4] == 1.25
    high = waad.clone()
    high[0, 4] = 3
    assert credit(high, fai, everywhere, share=0.2)[0, 4] == 1.5  # an anchor that looks back is free
    itself = credit(waad, fai + row(0, 0, 0.7, 0, 0, 0, 0, 0, 0, 0), everywhere, share=0.2)
    assert itself.tolist() == [[1, 1, 1.75, 1, 1.25, 1, 1, 1, 1, 1]]  # a free anchor that introduces another
    both = credit(waad, fai + row(0, 0, 0, 0.8, 0, 0, 0, 0, 0, 0), everywhere, share=0.2)
    assert both.tolist() == [[1, 1, 1.25, 1.25, 1.25, 1, 1, 1, 1, 1]]  # two share one, which is paid once


def test_sums_of_credit():
    """With an introduction of its own for every dominated anchor the bonus is that of the anchors."""
    generator = torch.Generator().manual_seed(0)
    met = 0
    for _ in range(50):
        waad, fai = (torch.rand(1, 40, generator=generator, dtype=torch.float64) for _ in "wf")
        everywhere = torch.ones(1, 40, dtype=torch.bool)
        gamma = credit(waad, fai, everywhere)
        assert set(gamma.unique().tolist()) <= {1.0, 1.25, 1.5, 1.75}
        anchors = peaks(fai, 0.4)
        dominated = int((anchors & ((gamma * 4) % 2 == 1)).sum() > 0)
        paid, full = float((gamma - 1).sum()), 0.5 * int(anchors.sum())
        assert paid <= full + 1e-9
        met += abs(paid - full) < 1e-9 and dominated
    assert met > 3


def test_advantages():
    advantages = torch.tensor([[2.0, -2.0, 0.0, 2.0]], requires_grad=True)
    gamma = torch.tensor([[1.5, 1.5, 1.25, torch.nan]], requires_grad=True)
    got = weigh(advantages, gamma)
    assert got.tolist() == [[3, -2, 0, 2]]  # blame is shared as ever
    got.sum().backward()
    assert gamma.grad is None and advantages.grad.tolist() == [[1.5, 1, 1.25, 1]]
