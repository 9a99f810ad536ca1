# SPDX-License-Identifier: Apache-2.0
"""Measures of expressions equal those of dense maps, and their closed forms; idioms of a made-up language are found."""

import math

import numpy as np
import pytest
import torch

import manyheads
from manyheads.data.translations import IDIOMS, made_up
from manyheads.errors import UserError
from manyheads.lens import TokenSpans
from manyheads.lenses.mwe_attention import MEASURES, Blocks, measures
from manyheads.lenses.mwe_attention.extraction import augmented, expressions, jaccard, matches, places, read_list, words
from oracles import dense, models
from tolerance import FORMULA, MODEL, assert_close, is_far, within

LIMIT = within(torch.float64, 4 * MODEL)  # logits of random models are large
PAIRS = made_up(1500, np.random.default_rng(0))
SAID = [tuple([word for word, *_ in words(side)] for side in pair) for pair in PAIRS]


def formula(a, rows, tokens):
    """Every measure of ``a [T, J]``, number by number in float64."""
    block = a[rows[0] : rows[1], tokens[0] : tokens[1]]
    focus = float(np.mean([sum(row) for row in block]))
    entropies = [-sum(x / sum(row) * math.log(x / sum(row)) for x in row) for row in block]
    values = np.linalg.eigvalsh(block @ block.T)  # squares of the singular values
    spread = np.mean([-sum(x * math.log(x) for x in a[t] if x > 0) for t in range(*rows)])
    size = tokens[1] - tokens[0]
    return [focus, focus * a.shape[1] / size, np.mean(entropies) / math.log(size), values.max() / values.sum(), spread]


def of(block, sources=8):
    found = measures(torch.tensor(block)[None], sources, torch.zeros(1, len(block)))
    return [float(found[name][0]) for name in MEASURES[:4]]


def test_closed_forms():
    assert_close(of([[0.5, 0.5], [0.5, 0.5]]), [1, 4, 1, 1], FORMULA)  # as a whole, from both rows
    assert_close(of([[1.0, 0.0], [0.0, 1.0]]), [1, 4, 0, 0.5], FORMULA)  # word by word
    assert_close(of([[1 / 8] * 2] * 3), [0.25, 1, 1, 1], FORMULA)  # evenly over a sentence of 8
    one = of([[1.0]])
    assert one[:2] == [1, 8] and math.isnan(one[2]) and math.isnan(one[3])


def test_equals_dense_maps():
    model, ids = models.tiny("bart", torch.float64), models.tokens(2, 9)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 7:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": models.tokens(2, 7, seed=1)}
    said, stands = [[(1, 3), (4, 7)], [(0, 2)]], [[(2, 5), (0, 2)], [(3, 6)]]
    roles = TokenSpans({"expression": said}, {"expression": stands})
    with manyheads.watch(model, "mwe_attention", roles=roles) as seen, torch.no_grad():
        model(**inputs)
        model(**inputs)  # other sentences are put behind
    found = seen.compute()
    maps = dense.maps(models.build("bart", attn="eager", dtype=torch.float64), **inputs)["cross"]
    pairs = [(0, *pair) for pair in zip(said[0], stands[0], strict=True)] + [(1, said[1][0], stands[1][0])]
    for layer, a in enumerate(maps):
        for i, (n, rows, tokens) in enumerate(pairs):
            kept = int(mask[n].sum())
            for head in range(4):
                want = formula(a[n, head, :, :kept].numpy(), rows, tokens)
                assert_close([found.tables[name].values[i, layer, head] for name in MEASURES], want, LIMIT)
                wrong = formula(a[n, head, :, :kept].numpy(), (rows[0] + 1, rows[1]), tokens)  # a row too few
                assert is_far([found.tables[name].values[i, layer, head] for name in MEASURES], wrong, LIMIT)
    mean = formula(maps[0][0].mean(0).numpy(), *pairs[1][1:])
    assert_close([found.records["expressions"][1][name] for name in MEASURES], mean, LIMIT)
    assert [one["prompt"] for one in found.records["expressions"]] == [0, 0, 1, 2, 2, 3]
    with pytest.raises(UserError, match="each of the 2"), manyheads.watch(model, "mwe_attention"):
        model(**inputs)
    odd = manyheads.watch(model, "mwe_attention", roles=TokenSpans({"expression": said}, {"expression": said[::-1]}))
    with pytest.raises(UserError, match="translations of them"), odd:
        model(**inputs)


def test_blocks_of_rows_are_one():
    a = torch.rand(1, 2, 8, 6).softmax(-1)
    parts, whole = (Blocks([(0, (2, 6), (1, 4))], torch.tensor([6])) for _ in range(2))
    for start in (0, 3, 6):
        parts.update(a[:, :, start : start + 3], start, 8)
    whole.update(a, 0, 8)
    for name, value in parts.result()[0].items():
        assert_close(value, whole.result()[0][name], FORMULA)
    assert parts.result()[0]["focus"].shape == (3,)  # two heads, and their mean


def test_idioms_are_found_and_matched():
    """Each word of an idiom is met alone too; what is found depends on no order, and chance puts nothing together."""
    sources = [source for source, _ in SAID]
    found = expressions(sources, stop=0, pmi=1.5)
    idioms = {tuple(source[at : at + 3]) for source, target in SAID for said in IDIOMS.values()
              for at in range(len(source) - 2) if _holds(source[at : at + 3], said)}  # fmt: skip
    assert {one.words for one in found if len(one.words) == 3 and one.count > 50} == idioms and len(idioms) == 3
    assert found == expressions(sources[::-1], stop=0, pmi=1.5)
    pairs = matches(SAID, idioms, stop=0)
    assert {target for target, _ in pairs.values()} == set(IDIOMS.values())
    assert all(0.95 < weight <= 1 for _, weight in pairs.values())
    shuffled = list(zip([s for s, _ in SAID], [t for _, t in SAID[7:] + SAID[:7]], strict=True))
    assert not matches(shuffled, idioms, stop=0)
    none = [source for source, _ in (tuple(x.split() for x in p) for p in made_up(1500, np.random.default_rng(1), 0.0))]
    assert not [one for one in expressions(none, stop=0, pmi=1.5) if one.count > 50]


def _holds(gram, said):
    from manyheads.data.translations import _word

    return any(tuple(map(_word, key)) == tuple(gram) for key, value in IDIOMS.items() if value == said)


def test_weights_and_places():
    assert jaccard(5, 5, 5) == 1 and jaccard(0, 5, 5) == 0 and jaccard(2, 4, 4) == pytest.approx(1 / 3)
    assert places(["a", "b", "a", "b"], ("a", "b")) == [(0, 2), (2, 4)]
    assert words("A T-shirt, isn't") == [("a", 0, 1), ("t-shirt", 2, 9), ("isn't", 11, 16)]


def test_augmented_corpora():
    pairs = [("a fire hydrant", "ein hydrant"), ("a dog", "ein hund"), ("hydrant of fire", "hydrant")] * 10
    matched = {("fire", "hydrant"): (("hydrant",), 0.9)}
    more = augmented(pairs, matched)
    assert len(more) == 31 and more.count(("fire hydrant", "hydrant")) == 1 and more != [*pairs, more[-1]]
    assert sorted(augmented(pairs, matched, "sentences", share=1.0)) == sorted(pairs + pairs[:1] * 10)
    assert len(augmented(pairs, matched, "sentences", share=0.1)) == 33
    with pytest.raises(UserError, match="phrases or sentences"):
        augmented(pairs, matched, "words")


def test_a_list_of_ones_own(tmp_path):
    (tmp_path / "list.txt").write_text("fire hydrant\n\nkick the bucket\n")
    assert read_list(tmp_path / "list.txt") == [("fire", "hydrant"), ("kick", "the", "bucket")]
    (tmp_path / "list.txt").write_text("hydrant\n")
    with pytest.raises(UserError, match="single word"):
        read_list(tmp_path / "list.txt")
