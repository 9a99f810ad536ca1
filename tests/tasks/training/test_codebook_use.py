# SPDX-License-Identifier: Apache-2.0
"""Use of codebooks: figures by hand, and the models are those of recall_in_text."""

import math

import pytest
import torch

from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.tasks.training.codebook_use import CodebookUse, key_error, perplexity
from manyheads.tasks.training.recall_in_text import RecallInText
from tolerance import nearly

from .conftest import SOFTMAX, TEXT, values

VQ = Arm("vq", "longvq:codes=5,block=4,key_dim=8,ndim=2")


def test_figures_by_hand():
    assert perplexity(torch.tensor([[0, 1], [2, 3]]), 9) == nearly(4.0)
    assert perplexity(torch.tensor([2, 2, 2, 2]), 9) == nearly(1.0)
    assert perplexity(torch.tensor([0, 0, 0, 1]), 2) == nearly(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    keys = torch.tensor([[0.0, 1.0], [0.0, -1.0], [2.0, 0.0], [-2.0, 0.0]])
    assert key_error(keys, torch.zeros(4, 2)) == nearly(1.0)
    assert key_error(keys, keys) == 0.0
    assert key_error(keys, torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0], [-2.0, 0.0]])) == nearly(0.2)


def test_the_models_are_those_of_recall_in_text(measured):
    given = {**TEXT, "pairs": 4, "length": 40}
    results = measured(
        RecallInText(**given, only=("vq",)), CodebookUse(**given, only=("vq",)), arms=(SOFTMAX, VQ), seeds=2
    )
    used, off = ([row[-1] for row in values(results, name)] for name in ("codebook_perplexity", "key_error"))
    assert len(used) == len(off) == 2 * TEXT["layers"]
    assert all(1 <= x <= 5 for x in used) and all(0 < x < 2 for x in off)
    assert len({row.about["order"] for row in results.rows if row.metric == "training_nll"}) == 2  # trained once each


def test_an_arm_without_a_codebook_is_refused(measured):
    with pytest.raises(UserError, match="softmax has no codebook"):
        measured(CodebookUse(**TEXT, only=("softmax",)), arms=(SOFTMAX,))
