# SPDX-License-Identifier: Apache-2.0
"""Tasks that ask the models of byte_lm something else: planted constants, and scores by offset."""

import torch

from manyheads.experiment import Arm
from manyheads.tasks.training import _training_task
from manyheads.tasks.training.byte_lm import ByteLM
from manyheads.tasks.training.offset_scores import OffsetScores
from manyheads.tasks.training.planted_constant import PlantedConstant

from .conftest import SOFTMAX, TEXT, Knows, context, values

LONG = {**TEXT, "length": 160}


def test_they_read_the_model_that_was_kept(measured, monkeypatch):
    trained = []
    original = _training_task.train_lm
    monkeypatch.setattr(_training_task, "train_lm", lambda *a, **more: trained.append(a) or original(*a, **more))
    results = measured(ByteLM(**LONG), PlantedConstant(**LONG), OffsetScores(**LONG))
    assert len(trained) == 2  # one at each rate, by the first task
    assert len(values(results, "completed")) == len(values(results, "answer_nll")) == 4
    assert {at["offset"] for *_, at, _ in values(results, "score")} == {0, 1, 2, 4, 8}


def test_a_model_that_knows_the_answer_completes_it(texts):
    """It completes every constant for next to nothing; one that knows all but the last byte of an answer none."""
    task, run = PlantedConstant(**LONG), context(texts)
    contexts = task._contexts(run)
    room = contexts.inserter.question_size + contexts.inserter.answer_size
    planted = contexts.single(task.length - room)
    whole = torch.tensor([[*c.ids, *c.questions[0].question, *c.questions[0].answer] for c in planted])
    wrong = whole.clone()
    wrong[:, -1] = (wrong[:, -1] + 1) % 256
    for known, right in ((whole, 1.0), (wrong, 0.0)):
        rows = list(task.rows(run, SOFTMAX, 0, Knows(known, 256)))
        assert [row.value for row in rows if row.metric == "completed"] == [right] * 4
        assert all((row.value < 0.01) == bool(right) for row in rows if row.metric == "answer_nll")


def test_a_collinear_key_scores_highest_at_no_distance(measured):
    """Strict CoCA's score falls from offset 0 on at any weights; that of RoPE need not."""
    results = measured(OffsetScores(**TEXT, offsets=(0, 1, 8)), arms=(SOFTMAX, Arm("coca", "coca:form=strict")))
    score = {}
    for arm, sample, _, at, value in values(results, "score"):
        score[arm, sample, at["offset"]] = value
    for sample in "0123":
        assert score["coca", sample, 0] > score["coca", sample, 8]
    assert all(torch.isfinite(torch.tensor(list(score.values()))))
