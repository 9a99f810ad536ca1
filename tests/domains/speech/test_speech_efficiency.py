# SPDX-License-Identifier: Apache-2.0
"""speech_efficiency: where layers go, what a step's batch is, an epoch in a given room; and the tasks that count it."""

import numpy as np
import pytest
import torch

from manyheads.data.bucketing import padding
from manyheads.domains.speech.speech_efficiency import SpeechEfficiency
from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.spec import parse
from manyheads.tasks.speech.batch_padding import BatchPadding
from manyheads.tasks.speech.decoding_cost import DecodingCost, _written
from manyheads.tasks.speech.digit_dictation import DigitDictation
from oracles import tasks
from tiny.recordings import digits
from tolerance import SAME, error

__all__ = ["digits"]

TINY = {"dim": 16, "layers": 3, "heads": 2, "batch": 6, "digits": 3, "dropout": 0.0}


def corpus(count=900):
    rng = np.random.default_rng(0)
    durations = rng.geometric(0.3, count) * rng.uniform(0.3, 0.6, count)
    return durations.tolist(), np.round(2 + durations * rng.uniform(2, 12, count)).tolist()


def test_layers_move():
    model = SpeechEfficiency(shift=2).build(DigitDictation(**TINY), 8)
    assert (len(model.encoder.blocks), len(model.decoder.layers)) == (5, 1)
    plain = SpeechEfficiency().build(DigitDictation(**TINY), 8)
    assert (len(plain.encoder.blocks), len(plain.decoder.layers)) == (3, 3)
    assert plain.state_dict().keys() == DigitDictation(**TINY).reference(8).state_dict().keys()
    with pytest.raises(UserError, match="no decoder"):
        SpeechEfficiency(shift=3).build(DigitDictation(**TINY), 8)


@pytest.mark.parametrize("fields", [{"batching": "random"}, {"batching": "sorted"}, {"sub": 1}, {}])
def test_no_batch_of_an_epoch_is_larger_than_its_room(fields):
    durations, tokens = corpus()
    room = (4 * max(durations), 4 * max(tokens))
    made = SpeechEfficiency(count=8, **fields).epoch(durations, tokens, room, np.random.default_rng(1))
    for batch in made:
        assert len(batch) * max(durations[i] for i in batch) <= room[0] * (1 + 1e-9)
        assert len(batch) * max(tokens[i] for i in batch) <= room[1]
    seen = sorted(i for batch in made for i in batch)
    assert len(seen) == len(set(seen)) and (len(seen) == 900 or not fields.get("batching"))
    again = SpeechEfficiency(count=8, **fields).epoch(durations, tokens, room, np.random.default_rng(1))
    assert made == again != SpeechEfficiency(count=8, **fields).epoch(durations, tokens, room, np.random.default_rng(2))


def test_a_steps_batch_is_of_one_bucket(digits):
    task = DigitDictation(folder=str(digits), **TINY)

    def waste(recipe):
        shares = []
        for i in range(60):
            mask = recipe.batches(task, np.random.default_rng(i), task.samples("train"))["mask"]
            shares.append(1 - float(mask.float().mean()))
        return np.mean(shares)

    assert waste(SpeechEfficiency(count=3)) < 0.5 * waste(SpeechEfficiency(batching="random"))
    sizes = {
        len(SpeechEfficiency(count=3).batches(task, np.random.default_rng(i), task.samples("train"))["mask"])
        for i in range(20)
    }
    assert len(sizes) > 1 and max(sizes) > task.batch  # short ones are more at a time


def test_a_bucket_is_as_likely_as_it_has_recordings_and_counts_the_end(digits, monkeypatch):
    task, seen = DigitDictation(folder=str(digits), **TINY), []

    def epoch(self, durations, tokens, room, rng):
        seen.append((durations, tokens, room))
        return [[0], list(range(1, 10))]

    monkeypatch.setattr(SpeechEfficiency, "epoch", epoch)
    recipe = SpeechEfficiency()
    sizes = [len(recipe.batches(task, np.random.default_rng(i), task.samples("train"))["mask"]) for i in range(100)]
    assert 0.8 < np.mean([size == 9 for size in sizes]) < 0.98
    durations, tokens, room = seen[0]
    drawn = task.drawn(np.random.default_rng(0), task.samples("train"), 4 * task.batch)
    assert tokens == [len(sample.target.split()) + 1 for sample in drawn]
    assert durations == [len(sample.inputs) / 8000 for sample in drawn]
    assert room == (6 * max(durations), 6 * max(tokens))


def test_rows_of_padding_are_those_of_the_batches(monkeypatch):
    durations, tokens = corpus()
    monkeypatch.setattr("manyheads.tasks.speech.batch_padding.corpus", lambda strings, digits: (durations, tokens))
    two = Arm("two", "speech_efficiency:count=8")
    task, run = BatchPadding(epochs=2), tasks.context(Arm("random"), two)
    rows = tasks.rows(task, run)
    room = (4 * max(durations), 4 * max(tokens))
    made = SpeechEfficiency(count=8).epoch(durations, tokens, room, run.rng(epoch=1, seed=0))
    want = padding(durations, tokens, made)
    assert tasks.values(rows, "inputs", "two")[1] == want.inputs and tasks.values(rows, "filled", "two")[1] == want.size
    assert (tasks.values(rows, "inputs", "two") < 0.5 * tasks.values(rows, "inputs", "random")).all()
    assert (tasks.values(rows, "steps", "two") < tasks.values(rows, "steps", "random")).all()
    assert tasks.values(rows, "filled", "random")[0] == 4
    with pytest.raises(UserError, match="by length"):
        list(task.measure(tasks.context(Arm("s", "snapkv")), task.units(tasks.context(Arm("s", "snapkv")))[0]))


def operations(frames, tokens, dim, encoder, decoder, width):
    """Twice the products of a recording of Whisper's shape, by hand: its own, and those of each token behind the first.

    Legend: a token is projected to queries, keys, values and outputs for itself, to queries and outputs for the frames.
    """
    heard = 2 * 3 * dim * (80 * 2 * frames + dim * frames)
    heard += encoder * frames * (2 * 4 * dim**2 + 4 * frames * dim + 4 * dim * width)
    heard += decoder * frames * 2 * 2 * dim**2  # keys and values of the frames, once
    each = [
        decoder * (2 * 6 * dim**2 + 4 * (t + frames) * dim + 4 * dim * width) + 2 * dim * 51864
        for t in range(1, tokens + 1)
    ]
    return heard + sum(each), sum(each[1:]) / (tokens - 1)


def test_operations_are_those_by_hand_of_each_recording(monkeypatch):
    recordings = ((0.5, 1.13), (2.0, 3.0))
    monkeypatch.setattr("manyheads.tasks.speech.decoding_cost.corpus", lambda count, digits: recordings)
    task, moved = DecodingCost(dim=48, layers=2, heads=2, recordings=2), Arm("shifted", "speech_efficiency:shift=1")
    rows = tasks.rows(task, tasks.context(Arm("base"), moved))
    size = {arm: tasks.values(rows, "parameters", arm)[0] for arm in ("base", "shifted")}
    assert abs(size["shifted"] / size["base"] - 1) <= 0.02
    _, width = task._shape(moved)
    for arm, layers in (("base", (2, 2, 192)), ("shifted", (3, 1, width))):
        want = [operations(frames, tokens, 48, *layers) for frames, tokens in ((25, 2), (57, 3))]
        assert tasks.values(rows, "whole", arm) == pytest.approx([one[0] / 1e9 for one in want], rel=1e-12)
        assert tasks.values(rows, "operations", arm) == pytest.approx([one[1] / 1e9 for one in want], rel=1e-12)
    assert operations(25, 4, 48, 2, 2, 192) != operations(25, 4, 48, 3, 1, 192)
    assert (tasks.values(rows, "operations", "shifted") < tasks.values(rows, "operations", "base")).all()
    assert DecodingCost(timed=True).unsupported_reason(tasks.context(Arm("base"))) == (
        "seconds are of a GPU, --device cuda"
    )


def test_seconds_are_of_each_repeat_but_the_first():
    task, run = (
        DecodingCost(dim=32, layers=2, heads=2, tokens=2, batch=1, repeats=3, timed=True),
        tasks.context(Arm("x")),
    )
    rows = list(task._seconds(run, Arm("x"), 1, 64))
    assert [row.sample for row in rows] == ["repeat 1", "repeat 2", "repeat 3"] and min(row.value for row in rows) > 0
    with pytest.raises(UserError, match="no decoder"):
        task._shape(Arm("all", "speech_efficiency:shift=2"))
    with pytest.raises(UserError, match="moves no layers"):
        task._shape(Arm("other", "snapkv"))


@pytest.mark.parametrize("fields", [{"recordings": 0}, {"dim": 50}])
def test_costs_that_cannot_be_are_refused(fields):
    with pytest.raises(UserError, match=r"count|divide"):
        DecodingCost(**fields)


def test_what_is_decoded_with_a_cache_is_what_is_decoded_without():
    torch.manual_seed(0)
    model = DecodingCost(dim=32, layers=1, heads=2)._built(0, 64).eval()
    sound = torch.randn(2, 80, 3000)
    said, ids = _written(model, sound, 4), torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat((ids, model(input_features=sound, decoder_input_ids=ids).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(said, ids[:, 1:])


def test_dictation_by_hand(digits):
    task = DigitDictation(folder=str(digits), **TINY)
    judged = task.judged("test")
    model = task.reference(16).eval()
    batch = task.collate(judged)
    x, mask = model.encoder.encode(batch["inputs"], batch["mask"])
    logits = model(x, mask, batch["targets"])
    for i in range(logits.shape[1]):  # a symbol depends on those before it alone
        assert error(model(x, mask, batch["targets"][:, :i])[:, -1], logits[:, i]) <= SAME
    want = torch.stack([-logits[b].log_softmax(-1)[i, k] for b, s in enumerate(judged)
                        for i, k in enumerate([*(int(d) + 1 for d in s.target.split()), 0])]).mean()  # fmt: skip
    assert error(task.loss(model, batch), want) <= SAME
    with torch.no_grad():
        said = task.predict(model, batch)
    scores = [task.score(s, one)["nll"] for s, one in zip(judged, said, strict=True)]
    assert error(torch.tensor(scores).mean(), want) <= SAME
    assert task.predict(model, {k: batch[k] for k in ("inputs", "mask")})[0].log_probs.shape == (0, 11)


def test_what_never_ends_is_written_until_there_is_no_more_place():
    torch.manual_seed(0)
    task = DigitDictation(**{**TINY, "digits": 32})
    model = task.reference(16).eval()
    with torch.no_grad():
        model.head.bias[0] = -1e9
        said = task.predict(model, {"inputs": torch.randn(2, 40, 40), "mask": torch.ones(2, 40, dtype=torch.bool)})
        model.head.bias[0] = 1e9
        assert [
            one.text
            for one in task.predict(
                model, {"inputs": torch.randn(1, 40, 40), "mask": torch.ones(1, 40, dtype=torch.bool)}
            )
        ] == [""]
    assert [len(one.text.split()) for one in said] == [32, 32]


@pytest.mark.parametrize("spec", ["count=0", "shift=-1", "batching=any", "sub=0"])
def test_what_cannot_be_is_refused(spec):
    with pytest.raises(UserError, match="speech_efficiency"):
        parse(f"speech_efficiency:{spec}")
