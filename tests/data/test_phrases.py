# SPDX-License-Identifier: Apache-2.0
"""Phrases: every token is as the rules say, and the marks stand where they should."""

import torch

from manyheads.data.phrases import BOS, DEF, USE, PhraseLanguage


def test_rules_and_marks():
    language = PhraseLanguage.of(0)
    made = language.draw(20, 128, torch.Generator().manual_seed(1))
    first = language.vocab - language.values
    gaps = []
    assert all(2 <= len(tail) <= 5 for tail in language.tails)
    for row, starts, defined, used, free in zip(*(x.tolist() for x in vars(made).values()), strict=True):
        assert row[0] == BOS and free[0]
        t, value, last = 1, None, None
        while t < len(row):
            if row[t] == DEF:
                assert value is None
                if t + 1 < len(row):
                    value, last = row[t + 1], t + 1
                    assert value >= first and free[t]
                t += 2
            elif row[t] == USE:
                assert used[t] and defined[last] and (t + 1 == len(row) or row[t + 1] == value)
                gaps.append(t - last)
                value = None
                t += 2
            else:
                tail = language.tails[row[t] - 3]
                assert starts[t] and tuple(row[t + 1 : t + 1 + len(tail)]) == tail[: len(row) - t - 1]
                assert not any(free[t : min(len(row) - 1, t + len(tail))])
                t += 1 + len(tail)
        assert sum(starts) == sum(3 <= token < 3 + len(language.tails) for token in row)
        assert sum(defined) == sum(used) == row.count(USE)
    assert min(gaps) >= 10 and max(gaps) <= 50 and max(gaps) > 40


def test_draws_are_fixed_by_the_generator():
    language = PhraseLanguage.of(0)
    a, b, c = (language.draw(2, 50, torch.Generator().manual_seed(seed)).ids for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert PhraseLanguage.of(0) == language != PhraseLanguage.of(1)
