# SPDX-License-Identifier: Apache-2.0
"""Source mass and lookback ratio equal those of dense maps, in decoding too; 1 at the first token; closed forms."""

import numpy as np
import pytest
import torch

import manyheads
from manyheads.errors import UserError
from manyheads.lens import TokenSpans
from oracles import dense, models
from tolerance import CLOSE, SAME, assert_close, error, is_close, is_far

START, STOP, ANSWER, LENGTH = 4, 9, 13, 20  # the source, and where the answer begins


def roles(answer=ANSWER, stop=LENGTH):
    return TokenSpans({"source": [[(START, STOP)]], "response": [[(answer, stop)]]})


def look(name, attn=None, given=None, **inputs):
    model = models.tiny(name) if attn is None else models.build(name, attn=attn)
    with manyheads.watch(model, "hallucination_risk", roles=given or roles()) as seen, torch.no_grad():
        model(**inputs)
    return seen.compute()


def formula(maps, keys, shift=1):
    """Source mass and lookback ratio of the tokens of the answer, ``[N, L, H, R]``, of dense maps ``[B, H, T, S]``."""
    at = torch.arange(keys.shape[1])
    source, before = (keys & (at >= a) & (at < b) for a, b in ((START, STOP), (0, ANSWER)))
    mass, lookback = [], []
    for a in maps:
        rows = a[:, :, ANSWER - shift : LENGTH - shift]
        new = (at >= ANSWER) & (at <= torch.arange(ANSWER - shift, LENGTH - shift)[:, None])  # [R, S]
        c = (rows * before[:, None, None]).sum(-1) / before.sum(1)[:, None, None]
        g = (rows * new).sum(-1) / new.sum(1).clamp(min=1)
        mass.append((rows * source[:, None, None]).sum(-1))
        lookback.append(c / (c + g))
    return torch.stack(mass, 1), torch.stack(lookback, 1)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gpt_oss"])
def test_equals_dense_maps(name):
    """The second row is padded on the left into its source. The rows that look stand one before those they predict."""
    ids, mask = models.tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :6] = 0
    maps = dense.maps(dense.eager(name), input_ids=ids, attention_mask=mask)["self"]
    for attn in ("eager", None) if name != "gpt_oss" else ("eager",):
        found = look(name, attn, input_ids=ids, attention_mask=mask)
        for key, want, late in zip(
            ("source mass", "lookback"), formula(maps, mask.bool()), formula(maps, mask.bool(), 0), strict=True
        ):
            got = torch.tensor(found.tables[key].values).float()
            assert_close(got, want.mean(-1), SAME)
            assert error(got, late.mean(-1)) > 1e-3  # of the answer's own rows
            series = np.stack(found.series[key])
            assert np.isnan(series[:, : ANSWER - 1]).all() and np.isnan(series[:, LENGTH - 1 :]).all()
            assert is_close(series[:, ANSWER - 1 : LENGTH - 1], want.mean((1, 2)), SAME)
        assert ((found.tables["lookback"].values > 0) & (found.tables["lookback"].values <= 1)).all()
        first = np.stack(found.series["lookback"])[:, ANSWER - 1]
        assert (first == 1).all() and is_far(np.stack(found.series["lookback"])[:, ANSWER], first, 1e-2)
    assert "of the attention on source" in found.notes[0]


def test_generation_equals_one_forward():
    inputs, model = models.inputs("llama"), models.tiny("llama")
    length = inputs["input_ids"].shape[1]
    given = TokenSpans({"source": [[(START, STOP)]], "response": [[(length, length + 6)]]})
    with manyheads.watch(model, "hallucination_risk", roles=given) as seen:
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), 6, dtype=torch.long)], 1)[:, :-1]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    whole = look("llama", given=given, input_ids=ids[:, :-1], attention_mask=mask, position_ids=places)
    for key in ("source mass", "lookback"):
        assert is_close(seen.compute().tables[key].values, whole.tables[key].values, CLOSE)
        assert is_close(np.stack(seen.compute().series[key]), np.stack(whole.series[key]), CLOSE)
    # Without the role, every token past the known ones is the answer's.
    open_ended = TokenSpans({"source": [[(START, STOP)], [(START, STOP)]], "prompt": [[(0, length)]]})
    same = look("llama", given=open_ended, input_ids=ids[:, :-1], attention_mask=mask, position_ids=places)
    assert is_close(same.tables["lookback"].values, whole.tables["lookback"].values, CLOSE)


def test_even_attention_looks_back_by_half_and_a_batch_is_its_rows():
    """Queries of 0 make attention even: a mass of the source's share, and equal means, so a ratio of one half."""
    model, ids = models.build("llama"), models.tokens(3, LENGTH)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    with manyheads.watch(model, "hallucination_risk", roles=roles()) as seen, torch.no_grad():
        plain = model(ids).logits
        for row in ids:
            assert torch.isfinite(model(row[None]).logits).all()
    found = seen.compute()
    want = [(STOP - START) / (t + 1) for t in range(ANSWER - 1, LENGTH - 1)]
    assert is_close(found.series["source mass"][0][ANSWER - 1 : LENGTH - 1], want, SAME)
    assert is_close(found.series["lookback"][0][ANSWER : LENGTH - 1], np.full(LENGTH - 1 - ANSWER, 0.5), SAME)
    for key in ("source mass", "lookback"):
        assert is_close(found.tables[key].values[:3], found.tables[key].values[3:], SAME)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)


def test_needs_a_source():
    with pytest.raises(UserError, match="role 'source'"):
        look("llama", given=TokenSpans({"response": [[(ANSWER, LENGTH)]]}), input_ids=models.tokens(1, LENGTH))
    nothing = look("llama", given=roles(60, 70), input_ids=models.tokens(1, LENGTH))
    assert "No token of response" in nothing.notes[0] and np.isnan(nothing.tables["lookback"].values).all()
