# SPDX-License-Identifier: Apache-2.0
"""The detector finds what was planted and no more; its figures are those of the block outputs; interventions."""

import json

import numpy as np
import pytest
import torch

import manyheads
from manyheads.errors import UserError
from manyheads.integrations.blocks import block_of
from manyheads.lenses.refined_massive_activations import RefinedMassiveActivations, massive, means, name_tokens
from manyheads.lenses.refined_massive_activations.extremes import Extremes, medians
from manyheads.lenses.refined_massive_activations.writers import writer_of
from oracles import models
from tolerance import CLOSE, HALF, SAME, assert_close, error, is_close, is_far, nearly

SLUG = "refined_massive_activations"
LOW = "threshold=0.5,ratio=3"  # what tiny models reach


def outputs(model, **inputs):
    """Outputs ``[B, T, D]`` of the blocks, by hooks of the test's own, and what the model returns."""
    found, handles = [], []
    for site, _ in manyheads.integrations.transformers.find_sites(model):
        block = block_of(model, site.name)
        if site.kind == "self":
            handles.append(
                block.register_forward_hook(lambda m, a, o: found.append(o[0] if isinstance(o, tuple) else o))
            )
    with torch.no_grad():
        result = model(**inputs)
    for handle in handles:
        handle.remove()
    return found, result


def given(name):
    made = models.inputs(name)
    if name in models.SEQ2SEQ:
        made["decoder_input_ids"] = models.tokens(2, 11, seed=1)
    return made


def seen_by(model, spec, **inputs):
    with manyheads.watch(model, spec) as seen, torch.no_grad():
        logits = model(**inputs).logits
    return seen.compute(), logits


def planted(scale=1.0):
    hidden = torch.randn(2, 7, 50, generator=torch.Generator().manual_seed(0))
    hidden[1, 4, 17] = -5000.0
    return hidden * scale, torch.ones(2, 7, dtype=torch.bool)


def test_a_planted_spike_and_only_that():
    hidden, valid = planted()
    hits = massive(hidden, valid, medians(hidden, valid))
    assert hits.nonzero().tolist() == [[1, 4, 17]]
    small, _ = planted(0.01)  # 50, and as far above the median as before
    assert not massive(small, valid, medians(small, valid)).any()
    assert massive(small, valid, medians(small, valid), threshold=0).any()
    valid[1, 4] = False
    assert not massive(hidden, valid, medians(hidden, valid)).any()  # padding
    zeroed = hidden.masked_fill(hits, 0)
    valid[:] = True
    assert not massive(zeroed, valid, medians(zeroed, valid)).any()


def test_thresholds_at_their_edges():
    hidden = torch.full((1, 3, 3), 0.125)
    valid = torch.ones(1, 3, dtype=torch.bool)
    for value, want in ((125.0, True), (124.99, False)):  # at least 1000 times the median
        hidden[0, 0, 0] = value
        assert massive(hidden, valid, medians(hidden, valid)).any() == want
    hidden[:] = 0.0625
    for value, want in ((100.0, False), (100.01, True)):  # more than 100
        hidden[0, 0, 0] = value
        assert massive(hidden, valid, medians(hidden, valid)).any() == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pieces_equal_the_whole(dtype):
    """Tokens that come in pieces: the same entries, the same median; exact in 16 bits."""
    hidden = torch.randn(3, 13, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    valid = torch.ones(3, 13, dtype=torch.bool)
    valid[1, :5] = False
    valid[2] = False
    where, positions = torch.arange(13), valid.long().cumsum(1) - 1
    whole, pieces = Extremes(6), Extremes(6)
    whole.add(hidden, valid, where, positions)
    for cut in (slice(0, 6), slice(6, 7), slice(7, 13)):
        pieces.add(hidden[:, cut], valid[:, cut], where[cut], positions[:, cut])
    for row in range(2):
        entries = hidden[row][valid[row]].float()
        best = entries.abs().flatten().sort(descending=True).values[:6]
        for made in (whole, pieces):
            assert torch.equal(made.values[row].abs(), best)
            assert torch.equal(hidden[row, made.columns[row], made.channels[row]].float(), made.values[row])
            assert torch.equal(positions[row, made.columns[row]], made.positions[row])
        assert torch.equal(whole.median()[row], entries.abs().median())
        limit = HALF[torch.bfloat16] if dtype == torch.float32 else 0.0
        assert_close(pieces.median()[row], entries.abs().median(), limit)
        assert error(pieces.median()[row], hidden[row].float().abs().max()) > 0.1
    assert whole.median()[2].isnan() and pieces.median()[2].isnan()
    pieces.close()
    assert_close(pieces.median()[:2], whole.median()[:2], HALF[torch.bfloat16])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma2", "gpt_oss", "bert", "bart", "whisper"])
def test_figures_equal_the_block_outputs(name):
    """Left-padded, every architecture; and nothing changes by a bit."""
    model, inputs = models.tiny(name), given(name)
    found, logits = seen_by(model, f"{SLUG}:{LOW}", **inputs)
    blocks, plain = outputs(model, **inputs)
    assert torch.equal(logits, plain.logits)
    assert len(blocks) == len(found.tables["max"].sites) and set(found.tables["max"].values.shape[2:]) == {1}
    spikes = 0
    for at, hidden in enumerate(blocks):
        for row in range(2):
            length = hidden.shape[1]
            mask = inputs.get("attention_mask")
            decoder = name in models.SEQ2SEQ and at >= len(blocks) // 2
            start = 0 if mask is None or decoder else int((mask[row] == 0).sum())
            mine = hidden[row, start:length]
            size, norm = mine.abs(), mine.norm(dim=-1)
            want = {
                "max": size.max(), "median": size.median(), "max / median": size.max() / size.median(),
                "first / others": norm[0] / norm[1:].mean(),
            }  # fmt: skip
            for key, value in want.items():
                assert_close(torch.tensor(found.tables[key].values[row, at, 0]).float(), value)
            if start:
                assert error(hidden[row].abs().median(), want["median"]) > SAME  # padding would show
            hits = ((size > 0.5) & (size >= 3 * size.median())).nonzero().tolist()
            here = [
                s for s in found.records["spikes"] if (s["site"], s["prompt"]) == (found.tables["max"].sites[at], row)
            ]
            assert len(here) == min(len(hits), 64)
            for spike in here:
                assert [spike["position"], spike["channel"]] in hits and spike["column"] == spike["position"] + start
                assert spike["value"] == hidden[row, spike["column"], spike["channel"]]
            spikes += len(here)
    assert spikes
    json.dumps(found.records)


def test_batches_rows_and_decoding():
    model, ids = models.tiny("llama"), models.tokens(3, 16)
    with manyheads.watch(model, f"{SLUG}:{LOW}") as seen, torch.no_grad():
        model(ids)
        for row in ids:
            model(row[None])
    found = seen.compute()
    for key in ("max", "median", "first / others"):
        assert is_close(found.tables[key].values[:3], found.tables[key].values[3:])
    inputs = models.inputs("llama")
    with manyheads.watch(model, f"{SLUG}:{LOW}") as seen:
        out = model.generate(**inputs, max_new_tokens=9, do_sample=False)
    decoded = seen.compute()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)[:, :-1]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    whole, _ = seen_by(model, f"{SLUG}:{LOW}", input_ids=out[:, :-1], attention_mask=mask, position_ids=places)
    for key in ("max", "first / others"):
        assert_close(torch.tensor(decoded.tables[key].values), torch.tensor(whole.tables[key].values), CLOSE)
    assert_close(
        torch.tensor(decoded.tables["median"].values), torch.tensor(whole.tables["median"].values), HALF[torch.bfloat16]
    )
    key = next(iter(whole.series))
    assert len(whole.series[key][1]) == out.shape[1] - 1 and np.isnan(whole.series[key][1][:5]).all()
    report = name_tokens(whole, out.tolist(), lambda ids: str(ids[0]))
    assert sum(row["count"] for row in report) == len(whole.records["spikes"])
    assert all(s["token"] == str(int(out[s["prompt"], s["column"]])) for s in whole.records["spikes"])


def spiky(channel=3, size=50_000.0):
    """A tiny Llama whose first block writes a huge value at every token 5 and at the first token."""
    model = models.build("llama")
    mlp = model.model.layers[0].mlp
    mlp.register_forward_hook(lambda m, a, o: _with_spikes(model, o, channel, size))
    return model


def _with_spikes(model, hidden, channel, size):
    made = hidden.clone()
    made[:, 0, channel] += size
    made[:, 5, channel + 1] -= 2 * size
    return made


def test_interventions():
    model, ids = spiky(), models.tokens(4, 12)
    found, plain = seen_by(model, SLUG, input_ids=ids)
    spikes = [s for s in found.records["spikes"] if s["layer"] == 0]
    assert sorted({(s["position"], s["channel"]) for s in spikes}) == [(0, 3), (5, 4)] and len(spikes) == 8
    assert "first in layer 0" in found.notes[0] and "50000" not in found.notes[0]
    assert found.tables["max"].values[:, 0, 0] == pytest.approx(100_000, abs=20)
    calibrated = means(found)
    site = "model.layers.0.self_attn"
    assert set(calibrated[site]["start"]) == {"3"} and set(calibrated[site]["other"]) == {"4"}
    want = np.mean([s["value"] for s in spikes if s["position"] == 0])
    assert calibrated[site]["start"]["3"] == nearly(want)

    def changed(strategy):
        with manyheads.use(model, strategy, RefinedMassiveActivations(layers=(0,))) as port, torch.no_grad():
            logits = model(ids).logits
        return (
            logits,
            port.strategies[0].compute(port.kept(port.strategies[0])),
            port.strategies[1].compute(port.kept(port.strategies[1])),
        )

    zero, notes, after = changed(RefinedMassiveActivations(intervene="zero", layers=(0,)))
    assert not after.records["spikes"] and "8 of 8" in notes.notes[-1]
    assert error(zero, plain) > 0.05
    mean, _, after = changed(RefinedMassiveActivations(intervene="mean", means=calibrated, layers=(0,)))
    assert {round(s["value"], 2) for s in after.records["spikes"] if s["position"] == 0} == {round(want, 2)}
    assert error(mean, plain) < SAME and error(zero, plain) > 0.1
    del calibrated[site]["other"]
    _, notes, after = changed(RefinedMassiveActivations(intervene="mean", means=calibrated, layers=(0,)))
    assert "4 of 8" in notes.notes[-1] and len(after.records["spikes"]) == 8


def test_nothing_found_changes_no_bit_and_gradients_pass(tmp_path):
    model, ids = models.tiny("llama"), models.tokens(2, 9)
    plain = model(ids).logits
    for spec in ("intervene=zero", "intervene=mean,means=" + str(tmp_path / "means.json")):
        (tmp_path / "means.json").write_text("{}")
        with manyheads.use(model, f"{SLUG}:{spec},layers=0-1"):
            assert torch.equal(model(ids).logits, plain)
    embeds = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with manyheads.use(model, f"{SLUG}:{LOW},intervene=zero,layers=1") as port:
        model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad.isfinite().all() and embeds.grad.any()
    assert int(port.kept(port.strategies[0])[0][1]["detected"]) > 0


def test_refusals(tmp_path):
    model, ids = models.tiny("llama"), models.tokens(1, 4)
    with pytest.raises(UserError, match="needs layers="):
        manyheads.parse(f"{SLUG}:intervene=zero")
    with pytest.raises(UserError, match="needs means="):
        manyheads.parse(f"{SLUG}:intervene=mean,layers=0")
    with pytest.raises(UserError, match=r"open it with manyheads\.use"):
        manyheads.watch(model, f"{SLUG}:intervene=zero,layers=0")
    with pytest.raises(UserError, match="keep=0"):
        manyheads.parse(f"{SLUG}:keep=0")
    absent = f"{SLUG}:threshold=0,ratio=1,intervene=mean,layers=0,means={tmp_path / 'none.json'}"
    with pytest.raises(UserError, match="cannot be read"), manyheads.use(model, absent):
        model(ids)
    made = manyheads.parse(f"{SLUG}:intervene=zero,layers=0")
    assert manyheads.parse(made.spec) == made


def writing(name, path):
    """A model in whose block 1 the module ``path`` writes much into channel 3 of every token."""
    model = models.build(name)
    block = block_of(model, [s for s, _ in manyheads.integrations.transformers.find_sites(model)][1].name)
    layer = block.get_submodule(path)
    linear = layer if hasattr(layer, "weight") and layer.weight.ndim > 1 else None
    if linear is not None and linear.bias is not None:
        linear.bias.data[3] += 5000
    elif linear is not None:
        axis = 1 if type(linear).__name__ == "Conv1D" else 0
        linear.weight.data.select(axis, 3).mul_(5e4)
    else:  # a norm behind, whose scale it is
        layer.weight.data[3] = 5e4
    return model


WRITERS = [
    ("llama", "self_attn.o_proj", "model.layers.1.self_attn"),
    ("llama", "mlp.down_proj", "model.layers.1.mlp"),
    ("gpt2", "attn.c_proj", "transformer.h.1.attn"),
    ("gpt2", "mlp.c_proj", "transformer.h.1.mlp"),
    ("gemma2", "post_feedforward_layernorm", "model.layers.1.post_feedforward_layernorm"),
    ("gemma2", "post_attention_layernorm", "model.layers.1.post_attention_layernorm"),
]


@pytest.mark.parametrize(("name", "path", "writer"), WRITERS)
def test_the_module_that_writes_is_named(name, path, writer):
    """Attention, the MLP, or the norm behind one of them: what adds the entry, not where attention stands."""
    with manyheads.watch(writing(name, path), f"{SLUG}:{LOW}") as seen, torch.no_grad():
        seen._port.model(**models.inputs(name))
    memory = seen._bundle.of(0, seen._port.kept(seen._bundle))[1][1]
    assert {wrote for part in memory["writers"] for _, wrote in part} == {writer}
    others = {other for _, _, other in WRITERS} - {writer}
    text = " ".join(seen.compute().notes)
    assert (f"written by {writer}" in text or "layer 0" in text) and not any(f"by {other}" in text for other in others)


def test_what_was_there_before_has_no_writer_here():
    """An entry that only passes a block, and a change that no two modules explain, are nobody's."""
    generator = torch.Generator().manual_seed(0)
    before, a, b, c = torch.randn(4, 64, generator=generator)
    a[5] = 900
    parts = {"norm": c, "attention": a, "mlp": b}
    assert writer_of(before, before + a + b, parts, 5) == "attention"
    assert writer_of(before, before + 0.2 * a + 0.2 * b, parts, 5) == "attention"  # scaled residuals
    assert writer_of(before, before + a + b, {"norm": c, "mlp": b}, 5) is None
    big = before.clone()
    big[5] = 900
    assert writer_of(big, big + b, {"mlp": b}, 5) is None
    assert writer_of(before, before + a, {}, 5) is None
    huge = torch.where(torch.arange(64) == 5, torch.inf, before)  # overflow of float16
    assert writer_of(before, huge, parts, 5) is None
    assert writer_of(before, before + a, {"mlp": huge, "attention": a}, 5) == "attention"


def test_overflow_is_said_and_no_fault():
    found, _ = seen_by(spiky(size=torch.inf), SLUG, input_ids=models.tokens(2, 12))
    assert any("not finite" in note for note in found.notes)


def test_float64():
    """Wider than the figures are kept: the same figures as in float32."""
    results = []
    for dtype in (torch.float32, torch.float64):
        with manyheads.watch(models.build("llama", dtype=dtype), f"{SLUG}:{LOW}") as seen, torch.no_grad():
            seen._port.model(models.tokens(2, 12))
        results.append(seen.compute().tables)
    assert all(is_close(results[0][n].values, results[1][n].values, SAME) for n in results[0])
    assert is_far(results[0]["max"].values, results[0]["median"].values, SAME)
