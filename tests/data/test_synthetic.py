# SPDX-License-Identifier: Apache-2.0
"""Sequences made by a rule: every key is asked for, with its value."""

from collections import Counter
from itertools import product

import pytest
import torch

from manyheads.data.synthetic import associative_recall, guessed_recall
from manyheads.errors import UserError
from tolerance import DRAWN, WRONG


@pytest.mark.parametrize("asked", [1, 3])
def test_every_key_is_asked_for_so_often(asked):
    pairs, length = 4, 40
    ids, judged = associative_recall(50, length, pairs, 21, torch.Generator().manual_seed(0), asked)
    for row, mask in zip(ids, judged, strict=True):
        value_of = dict(row[: 2 * pairs].view(-1, 2).tolist())
        keys = row[:-1][mask].tolist()
        assert sorted(keys) == sorted([*value_of] * asked)
        assert [value_of[key] for key in keys] == row[1:][mask].tolist()
        assert int((row > 0).sum()) == 2 * pairs * (1 + asked)
    assert len({tuple(row[:-1][mask].tolist()) for row, mask in zip(ids, judged, strict=True)}) > 40
    with pytest.raises(UserError, match="of length"):
        associative_recall(1, 2 * (1 + asked) * pairs - 2, pairs, 21, torch.Generator(), asked)


def best_guess(row, pairs, cross_out=True):
    """Values of one sequence that are guessed right without a look at any key: the most frequent that is left."""
    left, right = Counter(row[1 : 2 * pairs : 2]), 0
    said = [token for token in row[2 * pairs :] if token][1::2]
    for value in said:
        right += max(left, key=lambda x: left[x]) == value
        left[value] -= cross_out
    return right / len(said)


@pytest.mark.parametrize(("pairs", "vocab"), [(4, 33), (6, 14)])
def test_the_best_guess_without_keys(pairs, vocab):
    """The expectation is what a guesser reaches on sequences; a guess that crosses nothing out reaches less."""
    values = vocab - 1 - (vocab - 1) // 2
    ids, _ = associative_recall(4000, 6 * pairs, pairs, vocab, torch.Generator().manual_seed(1))
    found = torch.tensor([best_guess(row, pairs) for row in ids.tolist()])
    error = float(found.std()) / len(found) ** 0.5
    want = guessed_recall(pairs, values)
    assert abs(float(found.mean()) - want) / error < DRAWN
    lazy = torch.tensor([best_guess(row, pairs, cross_out=False) for row in ids.tolist()])
    assert abs(float(lazy.mean()) - want) / error > WRONG and 1 / pairs < float(lazy.mean()) < want


def test_guesses_by_trying_all_sequences():
    def by_hand(pairs, values):
        found = 0.0
        for left in range(1, pairs + 1):
            drawn = list(product(range(values), repeat=left))
            found += sum(max(Counter(one).values()) for one in drawn) / len(drawn) / left
        return found / pairs

    for pairs, values in ((1, 5), (2, 3), (4, 3), (5, 2)):
        assert guessed_recall(pairs, values) == pytest.approx(by_hand(pairs, values))
    assert guessed_recall(3, 1) == 1
