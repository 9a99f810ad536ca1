# SPDX-License-Identifier: Apache-2.0
"""Classifiers trained on labelled sequences: what is read, what is judged, and who sees whom."""

import math

import numpy as np
import pytest
import torch

from manyheads.data.labelled import Item, labelled
from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.models.classifier import Classifier
from manyheads.tasks.training._decoders import check_rows
from manyheads.tasks.training.sequence_classification import SequenceClassification, _replayed

from .conftest import MODEL, SOFTMAX, context, values

TONES = {
    **MODEL, "data": "tones", "length": 1024, "stride": 32, "batch": 4, "steps": 8, "samples": 6, "rates": (3e-3,),
}  # fmt: skip


def test_training_reads_stretches_of_the_training_part():
    task, run = SequenceClassification(**{**TONES, "length": 512}), context([])
    known = {item.name: item for item in labelled("tones").part("train")}
    get_batch = task.batches(run, 0)
    rows, labels = get_batch(3)
    assert rows.shape == (4, 512, 1) and labels.shape == (4,)
    for row, label in zip(rows, labels, strict=True):
        assert any(
            item.label == label and any(torch.equal(row, item.values[i : i + 512]) for i in range(513))
            for item in known.values()
        )
    assert torch.equal(get_batch(3)[0], rows) and not torch.equal(get_batch(4)[0], rows)
    assert not torch.equal(task.batches(run, 1)(3)[0], rows)


class Knows(torch.nn.Module):
    """Stands for a model: it is right about the sequences of a part, or wrong."""

    def __init__(self, task, right=True):
        super().__init__()
        self.items, self.right, self.length = labelled("tones").part("test"), right, task.length

    def forward(self, rows):
        of = [
            next(item for item in self.items for i in (0, 512) if torch.equal(item.values[i : i + self.length], row))
            for row in rows
        ]
        labels = torch.tensor([item.label if self.right else 1 - item.label for item in of])
        return 30.0 * torch.nn.functional.one_hot(labels, 2), None


def test_what_is_judged_is_the_test_part_once_before_twice():
    run = context([])
    task = SequenceClassification(**{**TONES, "length": 512, "samples": 85})
    rows = list(task.rows(run, SOFTMAX, 0, Knows(task)))
    said = [row for row in rows if row.metric == "accuracy"]
    assert [row.value for row in said] == [1.0] * 85 and len({row.sample for row in said}) == 85
    assert len({row.context for row in said}) == 80 and {row.about["group"] for row in said} <= {
        item.group for item in labelled("tones").part("test")
    }
    assert [row.sample.endswith("from 512") for row in said] == [False] * 80 + [True] * 5
    wrong = list(task.rows(run, SOFTMAX, 0, Knows(task, right=False)))  # control
    assert {row.value for row in wrong if row.metric == "accuracy"} == {0.0}
    assert all(row.value == pytest.approx(30.0) for row in wrong if row.metric == "label_nll")


def test_short_sequences_are_filled_with_silence():
    task = SequenceClassification(**{**TONES, "length": 2048})
    rows, _ = task.batches(context([]), 0)(0)
    assert not rows[:, 1024:].any() and rows[:, :1024].any()


@pytest.mark.parametrize("length", [512, 2048])
def test_waveforms_are_read_slower_and_faster(length):
    """A sine stays one, of another pitch within the share; half the time it is shorter, half the time longer."""
    wave = torch.sin(2 * math.pi * torch.arange(1024) / 64)[:, None]
    sines = [Item("a", wave, 0, "a", "train")] * 40
    rng = np.random.default_rng(0)
    rates, places = rng.uniform(0.8, 1.2, 40), rng.uniform(size=40)
    rows = _replayed(sines, rates, places, length)
    assert rows.shape == (40, length, 1)
    for row, rate in zip(rows[..., 0], rates, strict=True):
        held = row.nonzero()[:, 0]
        first, last = int(held.min()), int(held.max())
        assert length < 1024 or abs((last - first) * rate - 1024) < 4
        crossings = ((row[first:last] > 0) != (row[first + 1 : last + 1] > 0)).sum()
        assert abs(float(crossings) / (last - first) * 64 / 2 - rate) < 0.08
    assert len({int(row.nonzero()[0, 0]) for row in rows[..., 0]}) > 5 or length < 1024
    plain = _replayed(sines[:1], np.ones(1), np.zeros(1), 2048)[0, :1023]
    assert torch.equal(plain, wave[:1023])
    task = SequenceClassification(**TONES, stretch=0.15)
    get_batch, still = (each.batches(context([]), 0) for each in (task, SequenceClassification(**TONES)))
    assert torch.equal(get_batch(1)[0], get_batch(1)[0]) and not torch.equal(get_batch(1)[0], still(1)[0])
    assert torch.equal(get_batch(1)[1], still(1)[1])
    with pytest.raises(UserError, match="of waveforms"):
        SequenceClassification(data="brown", stretch=0.1)


class Leaks(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        y, _ = self.inner(x)
        return y + 1e-3 * y.mean(0, keepdim=True), None


def test_who_sees_other_sequences_is_refused():
    task = SequenceClassification(**TONES)
    model = Classifier("softmax", task.config)
    rows = task.batches(context([]), 0)(0)[0]
    check_rows(model, rows, "softmax")
    with pytest.raises(UserError, match="see each other"):
        check_rows(Leaks(model), rows, "leaks")


def test_arms_are_trained_alike_and_their_floor_is_known(measured):
    task = SequenceClassification(**TONES, label="tones")
    results = measured(task, arms=(SOFTMAX, Arm("mra", "mra:block=4")), seeds=2)
    assert task.metric("accuracy").floor == 0.5 and SequenceClassification(data="brown").metric("accuracy").floor > 0.4
    found = values(results, "accuracy")
    assert len(found) == 2 * 2 * 6 and {row[-1] for row in found} <= {0.0, 1.0}
    trained = [row for row in results.rows if row.metric == "training_nll"]
    assert len({(row.seed, row.about["order"]) for row in trained}) == 2
    sizes = [row.about["parameters"] for row in trained]
    assert max(sizes) <= 1.02 * min(sizes)
    assert all(math.isfinite(row.value) for row in results.rows)


def test_learns_what_stands_far_apart(measured):
    """The order of two tones in the first and in the last quarter, of pitches that were not in the training part."""
    task = SequenceClassification(**{**TONES, "dim": 32, "batch": 16, "steps": 60, "samples": 80, "rates": (1e-2,)})
    found = [row[-1] for row in values(measured(task), "accuracy")]
    assert sum(found) / len(found) > 0.9


def test_what_is_refused():
    for wrong, says in (
        ({"data": "imdb"}, "there are brown"), ({"stride": 3}, "do not part"), ({"batch": 1}, "batch of 2"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            SequenceClassification(**{**TONES, **wrong})
