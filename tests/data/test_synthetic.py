# SPDX-License-Identifier: Apache-2.0
"""Sequences made by a rule: every key is asked for, with its value."""

import pytest
import torch

from manyheads.data.synthetic import associative_recall
from manyheads.errors import UserError


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
