# SPDX-License-Identifier: Apache-2.0
"""Encoders of each arm trained on a task: what is scored is what they say, the same for all arms."""

import numpy as np
import pytest
import torch

from manyheads.data import files
from manyheads.data.encoder_tasks import TASKS, EncoderTask, encoder_task
from manyheads.errors import UserError
from manyheads.experiment import Arm, Experiment, run
from manyheads.experiment.subjects import Convertible
from manyheads.tasks.text import encoder_tuning
from manyheads.tasks.text.encoder_tuning import EncoderTuning, cut
from oracles.conversions import tiny
from oracles.texts import words_tokenizer

BASE = Arm("causal", "gemma_encoder:mask=causal,pooler=last,dropout=0,head=linear")
ARMS = (BASE, Arm("ours", "gemma_encoder"), Arm("frozen", "gemma_encoder", options={"train": "head"}))
NEEDED = {"snips": ("snips",), "cranfield": ("cranfield",)}


def made(kind):
    """The class, score or place of w4 and w5; 24 to train on, 9 to test."""
    rng = np.random.default_rng(0)
    texts, targets = [], []
    for i in range(33):
        other = [f"w{n}" for n in rng.integers(6, 60, 3)]
        if kind == "lists":
            order = rng.permutation(3)
            texts.append([(" ".join(other), f"w{4 + int(j > 0)} w{n}") for j, n in zip(order, (7, 8, 9), strict=True)])
            targets.append([float(j == 0) for j in order])
        else:
            texts.append(" ".join([f"w{4 + i % 2}", *other]))
            targets.append(i % 2 if kind == "classes" else 2.0 * (i % 2) - 1)
    classes = ("four", "five") if kind == "classes" else ()
    return EncoderTask(kind, classes, texts, targets, [f"{i}" for i in range(33)], range(24), range(24, 33))


@pytest.mark.parametrize("kind", ["classes", "scores", "lists"])
def test_arms_are_judged_alike_by_what_they_say(kind, monkeypatch, tmp_path):
    task, seen = made(kind), []
    monkeypatch.setattr(encoder_tuning, "encoder_task", lambda name, rng: task)
    monkeypatch.setattr(encoder_tuning, "tune", lambda encoder, *a, tuned=encoder_tuning.tune, **k: (
        seen.append(encoder), tuned(encoder, *a, **k))[1])  # fmt: skip
    named = {"classes": "snips", "scores": "sick_relatedness", "lists": "cranfield"}[kind]
    sizes = {"steps": 30, "batch": 6, "lr": 2e-3, "head_lr": 2e-2, "layers": 2, "samples": 8}
    subject = Convertible("tiny", tiny("llama").float(), words_tokenizer())
    experiment = Experiment(
        subject=subject, arms=ARMS, baseline=BASE, tasks=(EncoderTuning(data=named, **sizes),), seeds=2
    )
    before = {name: p.clone() for name, p in subject.model.named_parameters()}
    results = run(experiment.at("cpu"), tmp_path / "run")
    assert all(torch.equal(p, before[name]) for name, p in subject.model.named_parameters())
    assert all(encoder.model.config.num_hidden_layers == 2 for encoder in seen)
    metric = {"classes": "accuracy", "scores": "squared_error", "lists": "reciprocal_rank"}[kind]
    rows = {}
    for row in results.rows:
        if row.metric == metric:
            rows.setdefault((row.arm, row.seed), {})[row.sample] = row.value
    assert len(rows) == 6 and all(list(some) == [f"{i}" for i in range(24, 32)] for some in rows.values())
    for encoder, (_, found) in zip(seen, rows.items(), strict=True):
        for i in range(24, 32):
            given = task.texts[i] if kind == "lists" else [task.texts[i]]
            said = encoder.predict(given).double().numpy()
            if kind == "classes":
                want = float(said[0].argmax() == task.targets[i])
            elif kind == "scores":
                want = (said[0, 0] - task.targets[i]) ** 2
            else:
                want = 1 / (1 + np.argsort(-said[:, 0]).tolist().index(int(np.argmax(task.targets[i]))))
            assert found[f"{i}"] == pytest.approx(want, abs=1e-4)
    mean = {arm: np.mean([v for (a, _), some in rows.items() if a == arm for v in some.values()]) for arm in ("ours",)}
    assert mean["ours"] < 0.8 if kind == "scores" else mean["ours"] > 0.6  # the task is learned


def test_the_lowest_layers_are_the_models_own():
    model = tiny("llama")
    few = cut(model, 2)
    assert few.config.num_hidden_layers == 2 and few.model.layers[1].mlp.up_proj.weight is (
        model.model.layers[1].mlp.up_proj.weight
    )
    assert cut(model, 0) is model and len(model.model.layers) == 3


@pytest.mark.parametrize("name", TASKS)
def test_published_tasks_are_whole(name):
    if any(files.local(file) is None for file in NEEDED.get(name, ("sick-train", "sick-test"))):
        pytest.skip("this file is neither in MANYHEADS_DATA nor in the cache")
    found = encoder_task(name, np.random.default_rng(0))
    assert not set(found.train) & set(found.test) and found.outputs == max(1, len(found.classes))
    assert len(set(found.names)) == len(found.names) == len(found.texts) == len(found.targets)
    if found.kind == "lists":
        assert all(sum(grades) == 1 for grades in found.targets)
        assert list(map(len, found.targets)) == list(map(len, found.texts))
        return
    train, test = ([found.targets[i] for i in part] for part in (found.train, found.test))
    if found.kind == "scores":
        assert (
            abs(np.mean(train)) < 1e-9
            and np.std(train) == pytest.approx(1)
            and np.std(test) == pytest.approx(1, abs=0.05)
        )
        return
    floor = EncoderTuning(data=name).metric("accuracy").floor
    assert max(map(test.count, range(len(found.classes)))) / len(test) == pytest.approx(floor, abs=1e-3)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError, match="no task for encoders 'glue'"):
        encoder_task("glue", np.random.default_rng(0))
    for wrong in ({"data": "glue"}, {"train": "some"}, {"steps": 0}):
        with pytest.raises(UserError):
            EncoderTuning(**wrong)
