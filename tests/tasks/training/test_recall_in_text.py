# SPDX-License-Identifier: Apache-2.0
"""Recall within text: what is planted, what counts, and who recalls."""

import pytest
import torch

from manyheads.errors import UserError
from manyheads.tasks.training._bytes import VOCAB
from manyheads.tasks.training.recall_in_text import RecallInText

from .conftest import MODEL, SOFTMAX, TEXT, context, values

SMALL = {**TEXT, "length": 48, "keys": 8, "asked": 3}


def test_half_of_a_batch_is_text_and_half_holds_pairs_within_it(texts):
    task, run = RecallInText(**SMALL, weight=4.0), context(texts)
    ids, counts = task.batches(run, 0)(3)
    plain, _ = super(RecallInText, task).batches(run, 0)(3)
    mixed = task.batch // 2
    assert torch.equal(ids[mixed:], plain[mixed:]) and (counts[mixed:] == 1).all()
    for row, weights, text in zip(ids[:mixed], counts[:mixed], plain[:mixed], strict=True):
        planted = row >= VOCAB
        assert int(planted.sum()) == 2 * task.pairs * (1 + task.asked)
        assert torch.equal(row[~planted], text[: int((~planted).sum())])  # the text reads on around what is planted
        value_of = dict(row[: 2 * task.pairs].view(-1, 2).tolist())
        asked = (weights == task.weight).nonzero()[:, 0]
        assert len(asked) == task.asked * task.pairs
        assert all(value_of[int(row[i])] == int(row[i + 1]) for i in asked)
        assert (weights[row[1:] < VOCAB] == 1).all()
        keys = planted[1:] & (weights != task.weight)
        assert (weights[keys] == 0).all()  # which key comes next cannot be known: a loss on it would be noise
    assert torch.equal(task.batches(run, 0)(3)[0], ids) and not torch.equal(task.batches(run, 1)(3)[0], ids)


class Reads:
    """Stands for a model: it says the value of the key that it has just read, or one of another key."""

    def __init__(self, task, right):
        self.task, self.right = task, right

    def __call__(self, ids):
        said = torch.zeros(*ids.shape, self.task.vocab)
        for row, out in zip(ids, said, strict=True):
            pairs = row[: 2 * self.task.pairs].view(-1, 2).tolist()
            value_of = dict(pairs) if self.right else {k: pairs[i - 1][1] for i, (k, _) in enumerate(pairs)}
            for i, key in enumerate(row.tolist()):
                out[i, value_of.get(key, 0)] = 30.0
        return said, None


def test_who_reads_recalls_at_any_length_and_who_takes_another_key_does_not(texts):
    task, run = RecallInText(**{**SMALL, "samples": 20}, times=(1, 2)), context(texts)
    for right, low, high in ((True, 1.0, 1.0), (False, 0.0, 0.3)):
        rows = [r for r in task.rows(run, SOFTMAX, 0, Reads(task, right)) if r.metric == "recalled"]
        assert {r.at["times"] for r in rows} == {1, 2} and len(rows) == 40
        assert low <= sum(r.value for r in rows) / 40 <= high


def test_text_and_recall_are_of_one_model(measured):
    results = measured(RecallInText(**SMALL), seeds=2)
    assert len(values(results, "recalled")) == len(values(results, "token_nll")) == 2 * 4
    assert all(0 <= value <= 1 for *_, value in values(results, "recalled"))


def test_too_little_to_tell_is_refused():
    with pytest.raises(UserError, match="four pairs"):
        RecallInText(**MODEL, pairs=3)
    with pytest.raises(UserError, match="batch of 2"):
        RecallInText(**MODEL, batch=1)
