# SPDX-License-Identifier: Apache-2.0
"""Wait-k: what is seen in training is what will have been read, and AL is k."""

import numpy as np
import pytest
import torch

from manyheads.domains.language.wait_k import WaitK
from manyheads.tasks.language._streaming import stream
from manyheads.tasks.language.simultaneous_translation import SimultaneousTranslation
from tolerance import SAME, is_close, is_far


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    place, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(0)
    rows = [" ".join(f"w{i}" for i in rng.integers(0, 6, 6)) + f" n{k}" for k in range(30)]
    (place / "source.txt").write_text("\n".join(rows))
    (place / "target.txt").write_text("\n".join(row.replace("w", "v") for row in rows))
    return SimultaneousTranslation(
        folder=str(place), dim=16, layers=2, heads=2, batch=4, steps=4, vocabulary=300, dropout=0.0, rates=(1e-2,)
    )


@pytest.fixture
def model(task):
    torch.manual_seed(0)
    return task.reference(24).eval()


def test_training_sees_what_is_read_in_use(task, model):
    """Log probabilities of the right words, the end apart, which is written once all is read."""
    batch = task.collate(task.judged("test"))
    states, (mask,) = model.read(batch)
    for k in (1, 3, 0):
        recipe = WaitK(k=k)
        used = {}
        recipe.loss(_Told(task, used), model, batch)
        read = used["read"]
        seen = torch.arange(mask.shape[1]) < read[..., None]
        log_probs = model.write(states, [mask[:, None] & seen], batch["words"])
        right = batch["next"]
        want = log_probs.gather(-1, right.clamp(min=0)[..., None])[..., 0]
        reading = []
        recipe.predict(_Told(task, used, reading), model, batch)
        found = stream(model, batch, reading[0], right).log_probs
        inner = (right >= 0) & (right != 2)
        assert is_close(found[inner], want[inner], SAME)
        other = stream(model, batch, lambda seen, length: torch.full_like(length, seen.shape[1] + 1), right).log_probs
        assert is_far(other[inner], want[inner], SAME)


class _Told:
    """A task that keeps what it is told."""

    def __init__(self, task, used, reading=None):
        self.task, self.used, self.reading = task, used, reading

    def loss(self, model, batch, read):
        self.used["read"] = read
        return self.task.loss(model, batch, read)

    def streamed(self, model, batch, reading):
        self.reading.append(reading)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_what_has_been_read(task, model, k):
    batch = task.collate(task.judged("test"))
    reading = []
    WaitK(k=k).predict(_Told(task, {}, reading), model, batch)
    seen = stream(model, batch, reading[0]).seen
    length = batch["mask_0"].sum(1, keepdim=True)
    assert torch.equal(seen, (torch.arange(seen.shape[1]) + k).minimum(length))


def test_paths_are_of_any_k(task, model):
    batch, drawn = task.collate(task.judged("test")[:1]), set()
    torch.manual_seed(0)
    for _ in range(100):
        used = {}
        WaitK(k=2, paths=True).loss(_Told(task, used), model, batch)
        drawn.add(int(used["read"][0, 0]))
    assert drawn == set(range(1, batch["mask_0"].shape[1] + 1))
    used = {}
    WaitK(k=2).loss(_Told(task, used), model, batch)
    assert used["read"][0].tolist() == [i + 2 for i in range(batch["words"].shape[1])]


def test_it_learns_with_whole_sentences_first(task, model):
    asked = {}

    def fit(module, batches, loss, steps):
        batch = batches(np.random.default_rng(0))
        asked.update(steps=steps)
        assert is_close(loss(module, batch), task.loss(module, batch), SAME)

    WaitK(k=2, before=0.5).start(task, model, fit)
    assert asked == {"steps": 2}
    WaitK(before=0).start(task, model, None)
