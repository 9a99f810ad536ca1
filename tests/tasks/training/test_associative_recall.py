# SPDX-License-Identifier: Apache-2.0
"""Associative recall: what is counted as recall, longer sequences, and rates that another task has chosen."""

import pytest
import torch

from manyheads.data.synthetic import guessed_recall
from manyheads.errors import UserError
from manyheads.tasks.training.associative_recall import AssociativeRecall
from manyheads.tasks.training.byte_lm import ByteLM
from tolerance import DRAWN, WRONG

from .conftest import MODEL, SOFTMAX, TEXT, Knows, context, values


def test_who_looks_up_recalls_all_and_who_guesses_a_quarter(texts):
    """A guess among the values of a sequence is right once in four pairs, and where two pairs have one value.

    A model that looks up always is; one that guesses among all values of the vocabulary is found out.
    """
    task, run = AssociativeRecall(samples=200), context(texts)
    ids, judged = task._drawn(run, task.samples, 1, part="test")
    guessed = ids.clone()
    for row, where in zip(guessed, judged, strict=True):
        places = where.nonzero()[:, 0] + 1
        row[places] = row[1 : 2 * task.pairs : 2][torch.randint(task.pairs, (task.pairs,))]

    def share(whole):
        rows = list(task.rows(run, SOFTMAX, 0, Says(ids, whole, task.tokens)))
        assert {row.metric for row in rows} == {"recalled"} and len(rows) == task.samples
        return sum(row.value for row in rows) / task.samples

    assert share(ids) == 1.0
    kinds = task.tokens - 1 - (task.tokens - 1) // 2
    chance, asked = 1 / task.pairs + (1 - 1 / task.pairs) / kinds, task.samples * task.pairs
    off = abs(share(guessed) - chance) / (chance * (1 - chance) / asked) ** 0.5
    assert off < DRAWN and task.metric("recalled").floor == guessed_recall(4, kinds) > chance  # who crosses values out
    assert AssociativeRecall(pairs=8).metric("recalled").floor < task.metric("recalled").floor
    for row, where in zip(guessed, judged, strict=True):
        places = where.nonzero()[:, 0] + 1
        row[places] = torch.randint(task.tokens - kinds, task.tokens, (task.pairs,))
    assert abs(share(guessed) - chance) / (chance * (1 - chance) / asked) ** 0.5 > WRONG


class Says(Knows):
    """Reads ``ids`` and says what another text has there."""

    def __init__(self, ids, said, vocab):
        super().__init__(ids, vocab)
        self.said = said

    def __call__(self, ids):
        rows = [next(i for i, row in enumerate(self.whole) if torch.equal(row[: ids.shape[1]], read)) for read in ids]
        return 30.0 * torch.nn.functional.one_hot(self.said[rows][:, 1 : ids.shape[1] + 1], self.vocab), None


def test_longer_sequences_and_the_rates_of_another_task(measured):
    text = ByteLM(**TEXT, tune_steps=2)
    task = AssociativeRecall(
        **MODEL, length=18, batch=4, steps=4, rates=TEXT["rates"], samples=4, tokens=12, times=(1, 2), tuned_by=text
    )
    results = measured(text, task, seeds=2)
    assert {at["times"] for *_, at, _ in values(results, "recalled")} == {1, 2}
    rates = {row.about["rate"] for row in results.rows if row.metric == "training_nll"}
    assert len(rates) == 1 and not [r for r in results.rows if (r.task, r.metric) == (task.key, "tuning_nll")]


def test_few_pairs_are_refused():
    with pytest.raises(UserError, match="four pairs"):
        AssociativeRecall(pairs=2)
