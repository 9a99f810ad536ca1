# SPDX-License-Identifier: Apache-2.0
"""Expressions and literal pairs have as many words on either side, stand where they are said to, and have values."""

import numpy as np

from manyheads.claims import load
from manyheads.data.translations import pairs
from manyheads.lenses.mwe_attention.extraction import words
from manyheads.models.translator import new_tokenizer
from manyheads.tasks.lenses.matched_expressions import MatchedExpressions, _moved, _tokens
from oracles.tasks import context, rows, values

TASK = MatchedExpressions(
    corpus="made", holds=1.0, loose=0.5, vocab=320, dim=32, layers=2, batch=16, steps=2, samples=8
)  # fmt: skip


def test_samples_are_matched():
    run = context(*load("mwe_attention").experiment.at("quick").arms)
    train = pairs("made")("train")
    drawn, counts = TASK._drawn(run, train)
    assert len(drawn) == 8
    for literal, mine in drawn:
        assert len(literal.words) == len(mine.words)
        assert np.ptp(literal.target) == np.ptp(mine.target) and counts[mine.words] >= 5
        for place in (literal, mine):
            said = [word for word, *_ in words(train[place.sentence][0])]
            assert tuple(said[slice(*place.source)]) == place.words
    table = rows(TASK, run)
    for metric in ("focus", "lift", "spread", "frequency"):
        assert {len(values(table, metric, arm.name)) for arm in run.arms} == {8}
    assert (values(table, "spread", "expressions") == values(table, "spread", "elsewhere")).all()  # the same rows
    assert (values(table, "focus", "expressions") != values(table, "focus", "elsewhere")).any()


def test_words_are_found_among_tokens():
    text = "A fire hydrant, in the snow."
    tokenizer = new_tokenizer([text], 270)  # bytes, nearly
    ids, (start, stop) = _tokens(tokenizer, text, (1, 3))
    assert tokenizer.decode(ids[start:stop]).strip() == "fire hydrant"


def test_elsewhere_is_apart():
    rng = np.random.default_rng(0)
    moved = [_moved((3, 5), 9, rng) for _ in range(50)]
    assert all(b - a == 2 and (b <= 3 or a >= 5) and b <= 9 for a, b in moved) and len(set(moved)) > 2
    assert _moved((0, 4), 5, rng) == (0, 4)  # no room
