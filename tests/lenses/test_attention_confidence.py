# SPDX-License-Identifier: Apache-2.0
"""Scores equal the formula on dense maps and on the released matrices, and closed forms; decoded tokens add up."""

import math

import numpy as np
import pytest
import torch

import manyheads
from manyheads.data import files
from manyheads.errors import UserError
from manyheads.lens import TokenSpans
from manyheads.lenses.attention_confidence import AttentionConfidence, Soft, hybrid, scores
from oracles import dense, models
from tolerance import FORMULA, MODEL, SAME, assert_close, is_far, within

PARTS = ("confidence", "CDP", "AP_in", "AP_out")
SOURCE, TARGET = 9, 7
LIMIT = within(torch.float64, 4 * MODEL)  # logits of random models are large: an error of theirs is one of weights


def formula(a, w=6.0, cut=0):
    """The scores of ``a [J][I]`` as the paper writes them, number by number in float64."""
    rows = [[float(x) for x in row] for row in a]

    def entropy(values):
        total = sum(values)
        return -sum(v / total * math.log(v / total) for v in values if v > 0) if total else 0.0

    columns = list(zip(*rows, strict=True))[cut:]
    cdp = -sum(math.log(1 + abs(1 - sum(row)) ** w) for row in rows) / len(rows)
    ap_in, ap_out = (-sum(map(entropy, side)) / len(side) for side in (rows, columns))
    return np.array([cdp + ap_in + ap_out, cdp, ap_in, ap_out])


def of(a, w=6.0):
    found = scores(a, w)
    return np.array([found[part] for part in PARTS])


def drawn(sources=SOURCE, targets=TARGET, seed=0):
    return torch.rand(sources, targets, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(0)


def test_equals_the_formula():
    a = drawn()
    for w in (6.0, 2.0):
        assert_close(of(a, w), formula(a, w), FORMULA)
    assert is_far(of(a), formula(a, 2.0), FORMULA) and is_far(of(a), formula(a.T), FORMULA)


def test_closed_forms():
    assert_close(of(np.eye(5)), np.zeros(4), FORMULA, unit=1.0)  # one to one
    even = -math.log1p(abs(1 - 4 / 8) ** 6)  # of 4 target tokens on 8 source tokens each has half a token's attention
    assert_close(of(np.full((8, 4), 1 / 8))[1:], [even, -math.log(4), -math.log(8)], FORMULA)
    one = np.zeros((4, 6))
    one[0] = 1  # one source token has all of it; of the others the entropy is 0
    assert_close(of(one)[1:], [-(math.log1p(5**6) + 3 * math.log(2)) / 4, -math.log(6) / 4, 0], FORMULA)
    assert math.isnan(scores(np.ones((3, 1)))["confidence"])


def test_the_order_of_tokens_is_nothing_to_it():
    a, shuffle = drawn(), np.random.default_rng(0).permutation
    assert_close(of(a[shuffle(SOURCE)][:, shuffle(TARGET)]), of(a), FORMULA)
    other = a.clone()  # while which token attends to which is
    other[:, 0] = other[shuffle(SOURCE), 0]
    assert is_far(of(other), of(a), FORMULA)


def test_the_released_matrices():
    """200 sentences of a trained recurrent system; the file is float32, the scores of it are not."""
    names = [f"attention-confidence-{name}" for name in ("maps", "source", "output")]
    if any(files.local(name) is None for name in names):
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")
    maps = np.load(files.path(names[0]), allow_pickle=False)
    source, output = (files.text(name).splitlines() for name in names[1:])
    found, want = [], []
    for a, said, made in list(zip(maps, source, output, strict=True))[::5]:
        cut = a[: len(said.split()), : len(made.split())]
        found.append(of(cut))
        want.append(formula(cut))
    found = np.array(found)
    assert_close(found, np.array(want), FORMULA)
    assert (found[:, 1:] <= 0).all() and found[:, 0].std() > 0.3  # sentences differ
    uniform = np.array([of(np.full((len(s.split()), len(m.split())), 1 / len(s.split())))[0]
                        for s, m in list(zip(source, output, strict=True))[::5]])  # fmt: skip
    assert (found[:, 0] > uniform).all()  # a trained system is less absent than one that looks everywhere


def batch(name, padded=3):
    """Two sentences, the second one's source padded behind, and the rows of it that are target tokens."""
    ids, said = models.tokens(2, SOURCE), models.tokens(2, TARGET, seed=1)
    mask = torch.ones(2, SOURCE, dtype=torch.long)
    mask[1, SOURCE - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": said}, (TARGET, TARGET - 2)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_equals_dense_maps(name):
    inputs, rows = batch(name)
    roles = TokenSpans({"target": [[(0, count)] for count in rows]})
    model = models.tiny(name, torch.float64)  # weights of 1e-3 of a token magnify what float32 rounds
    with manyheads.watch(model, "attention_confidence", roles=roles) as seen, torch.no_grad():
        model(**inputs)
    found = seen.compute()
    maps = dense.maps(models.build(name, attn="eager", dtype=torch.float64), **inputs)["cross"]
    for layer, a in enumerate(maps):
        for n, count in enumerate(rows):
            kept = int(inputs["attention_mask"][n].sum())
            each = [formula(x[:count, :kept].double().T) for x in [*a[n], a[n].mean(0)]]
            for part, want in zip(PARTS, np.array(each).T, strict=True):
                table, mean = found.tables[part], found.tables[f"{part}, heads averaged"]
                assert_close(np.append(table.values[n, layer], mean.values[n, layer]), want, LIMIT)
            wrong = formula(a[n].mean(0)[:, :kept].double().T)  # with the rows that are padding
            assert is_far(found.tables["confidence, heads averaged"].values[n, layer], wrong[0], LIMIT) == (n == 1)
    last = found.tables["confidence, heads averaged"].values[:, -2, 0]
    assert [record["prompt"] for record in found.records["sentences"]] == list(np.argsort(last))  # the last but one
    assert f"{last.min():.2f}" in found.notes[0]


def test_decoded_tokens_go_on_with_their_prompt():
    model, ids = models.tiny("bart"), models.tokens(2, SOURCE)
    with manyheads.watch(model, "attention_confidence") as seen, torch.no_grad():
        said = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=1)
    with manyheads.watch(model, "attention_confidence") as again, torch.no_grad():
        model(input_ids=ids, decoder_input_ids=said[:, :-1])
    for part in PARTS:
        assert_close(seen.compute().tables[part].values, again.compute().tables[part].values, SAME)


def test_blocks_of_rows_are_one_sum():
    a = drawn(SOURCE, 8, 2).T[None, None].repeat(1, 2, 1, 1)
    columns, rows = torch.ones(1, SOURCE, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)
    parts, whole = Soft(columns, rows), Soft(columns, rows)
    for start in (0, 3, 6):
        parts.update(a[:, :, start : start + 3], start, 8)
    whole.update(a, 0, 8)
    assert_close(parts.result().mass, whole.result().mass, FORMULA)
    assert_close(parts.result().entropy, whole.result().entropy, FORMULA)
    assert parts.result().mass.shape == (1, 3, SOURCE)  # two heads and their mean, and no row of the map


def test_a_decoder_that_reads_both_sides():
    """Rows of the target on columns of the source, which they share out anew; what is outside is told."""
    ids = models.tokens(1, 16)
    roles = TokenSpans({"source": [[(1, 8)]], "target": [[(9, 15)]]})
    with manyheads.watch(models.tiny("llama"), "attention_confidence:at=self", roles=roles) as seen, torch.no_grad():
        models.tiny("llama")(ids)
    a = dense.maps(dense.eager("llama"), input_ids=ids)["self"][0][0].mean(0)[9:15, 1:8].double()
    found = seen.compute().tables
    want = formula((a / a.sum(1, keepdim=True)).T)
    assert_close([found[f"{part}, heads averaged"].values[0, 0, 0] for part in PARTS], want, SAME)
    assert_close(found["outside, heads averaged"].values[0, 0, 0], 1 - float(a.sum(1).mean()), SAME)
    assert is_far(found["AP_in, heads averaged"].values[0, 0, 0], formula(a.T)[2], SAME)
    with (
        pytest.raises(UserError, match="source"),
        manyheads.watch(models.tiny("llama"), "attention_confidence:at=self"),
    ):
        models.tiny("llama")(ids)


def test_some_heads_and_layers():
    inputs, _ = batch("bart")
    with manyheads.watch(models.tiny("bart"), "attention_confidence:heads=1+3,layers=1") as seen, torch.no_grad():
        models.tiny("bart")(**inputs)
    a = dense.maps(dense.eager("bart"), **inputs)["cross"][1][0][[1, 3]].mean(0).double()
    found = seen.compute()
    assert_close(found.tables["confidence, heads averaged"].values[0, 0, 0], formula(a.T)[0], SAME)
    record = next(one for one in found.records["sentences"] if one["prompt"] == 0)
    assert_close(record["confidence"], formula(a.T)[0], SAME)
    with pytest.raises(UserError, match="0 to 3"), manyheads.watch(models.tiny("bart"), "attention_confidence:heads=4"):
        models.tiny("bart")(**inputs)
    with pytest.raises(UserError, match="above 0"):
        AttentionConfidence(w=0)


def test_hybrid():
    first, second = np.array([-1.0, -2.0, -3.0]), np.array([-2.0, -1.9, -1.0])
    assert hybrid(first, second).tolist() == [False, True, True]
    assert hybrid(first, second, doubtful=-1.5).tolist() == [True, True, False]  # the one above -1.5 is not trusted
