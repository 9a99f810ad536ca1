# SPDX-License-Identifier: Apache-2.0
"""Sequences made by a rule: what is asked for stands there once, before it is asked for."""

import pytest
import torch

from manyheads.data.synthetic import associative_recall, planted_values
from manyheads.errors import UserError


def test_planted_values_are_asked_for_once_each():
    filler, kinds, values, length = 24, 4, 8, 40
    ids, judged = planted_values(50, length, filler, kinds, values, torch.Generator().manual_seed(0))
    assert ids.shape == (50, length + 1) and int(ids.max()) < filler + kinds * (1 + values)
    for row, mask in zip(ids, judged, strict=True):
        asked, answers = row[:-1][mask] - filler, row[1:][mask]
        assert sorted(asked.tolist()) == list(range(kinds))
        assert ((answers - filler - kinds) // values == asked).all()
        before = row[: length + 1 - 2 * kinds]
        assert all(int((before == answer).sum()) == 1 for answer in answers)
        assert int((before >= filler).sum()) == kinds
    assert len({tuple(row[:-8].tolist()) for row in ids}) == 50
    with pytest.raises(UserError, match="need a length"):
        planted_values(1, 10, filler, kinds, values, torch.Generator())


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
