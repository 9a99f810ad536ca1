# SPDX-License-Identifier: Apache-2.0
"""What every task of a field and every recipe must do, whichever there are; each test has a wrong variant."""

import dataclasses
from functools import cache
from statistics import mean
from typing import ClassVar

import numpy as np
import pytest
import torch

import manyheads
from manyheads import catalog
from manyheads.errors import UserError
from manyheads.experiment import Arm, RunContext, Trainable
from manyheads.recipe import Procedure, Recipe
from manyheads.tasks import _field, _field_training, data_of, load, names
from manyheads.tasks._field import FieldData, FieldTask
from manyheads.tasks._field_training import FieldTraining, Reference, load_model, recipe_of
from manyheads.training.matching import parameters_of
from oracles import tasks
from tolerance import SAME, error

TINY = {
    "dim": 16, "layers": 2, "heads": 2, "batch": 4, "steps": 3, "rates": (3e-3,), "samples_judged": 8, "dropout": 0.1,
}  # fmt: skip
SIMPLE = "digit_dictation"  # every metric is of every sample
TASKS = [name for name in names() if data_of(name) is not None]
RECIPES = [
    row.slug
    for row in [*catalog.papers(), *catalog.baselines()]
    if row.category.startswith("domains") and row.state != "planned" and issubclass(catalog.load(row.slug), Recipe)
]
ARMS = [
    *(Arm(slug, slug) for slug in RECIPES),
    *(Arm(kind, options={"reference": kind}) for name in TASKS for kind in load(name).references),
]


def made(name, **fields):
    """A tiny task; skipped where its data are not here, for nothing is fetched."""
    if data_of(name)["absent"]:
        pytest.skip("the data of this task are not on this machine")
    task = load(name)(**{**TINY, **fields})
    if task.unsupported_reason(context(Arm("reference"))):
        pytest.skip("a published model that this task reads is not on this machine")
    return task


def task_of(arm, **fields):
    if arm.spec:
        return made(arm.strategy.task, **fields)
    (name,) = [name for name in TASKS if arm.options["reference"] in load(name).references]
    return made(name, **fields)


def context(*arms, folder=None):
    return RunContext(Trainable(), arms, device=torch.device("cpu"), folder=folder)


def weights(model):
    return torch.cat([x.detach().flatten().double() for x in model.state_dict().values()])


@pytest.fixture
def planted(monkeypatch):
    """``planted(task, change)`` has the task's own samples changed one by one."""
    own = {}

    def change_all(task, change):
        kind = type(task)
        if kind not in own:
            own[kind] = [sample for part in ("train", "validation", "test") for sample in task.samples(part)]
        changed = [change(sample) for sample in own[kind]]
        monkeypatch.setattr(kind, "read", classmethod(lambda cls, folder: changed))
        _field._read = cache(_field._read.__wrapped__)

    before = _field._read
    yield change_all
    _field._read = before


def test_every_task_of_a_field_says_what_its_data_are():
    """Also where it stands in a base of another file, which is read without an import."""
    fields = ("language", "series", "speech", "vision")
    of_fields = [name for field in fields for name in names(field) if issubclass(load(name), FieldData)]
    assert sorted(of_fields) == TASKS and len(TASKS) > 10
    for name in TASKS:
        kind = load(name)
        assert data_of(name)["folder"] == kind.takes and data_of(name)["data"] in (*kind.files, "made here")
    assert data_of("batch_padding") is None


@pytest.mark.parametrize("name", TASKS)
def test_samples_and_batches_are_of_the_stated_shapes(name):
    task = made(name)
    assert isinstance(task, FieldTask) and task.takes and task.references and task.metrics
    for part in ("train", "validation", "test"):
        assert {sample.part for sample in task.samples(part)} == {part}
        judged = task.judged(part)
        assert 0 < len(judged) <= task.samples_judged and len({sample.name for sample in judged}) == len(judged)
        assert {sample.group for sample in judged} <= {sample.group for sample in task.samples(part)}
    drawn = task.draw(np.random.default_rng(0), task.samples("train"))
    batch = task.collate(drawn)
    assert len(drawn) == task.batch and {sample.part for sample in drawn} == {"train"}
    tensors = [x for x in batch.values() if isinstance(x, torch.Tensor)]
    assert tensors and all(len(x) == task.batch and x.double().isfinite().all() for x in tensors)
    again = task.collate(task.draw(np.random.default_rng(0), task.samples("train")))
    assert all(torch.equal(x, again[key]) for key, x in batch.items() if isinstance(x, torch.Tensor))
    other = task.collate(task.draw(np.random.default_rng(1), task.samples("train")))
    assert any(not torch.equal(x, other[key]) for key, x in batch.items() if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("name", TASKS)
def test_a_metric_is_best_for_the_truth_and_at_chance_for_noise(name):
    task = made(name, samples_judged=200)
    judged = task.judged("test")
    of_truth = [task.score(sample, task.truth(sample)) for sample in judged]
    of_noise = [task.score(a, task.truth(b)) for a, b in zip(judged, [*judged[1:], judged[0]], strict=True)]
    for metric in task.metrics:
        sign = 1 if metric.higher else -1
        right, noise = ([sign * one[metric.name] for one in found] for found in (of_truth, of_noise))
        assert mean(right) > mean(noise) and all(a >= b for a, b in zip(right, noise, strict=True))
        if metric.floor is not None:  # what guesses reach: the truth of another sample is no better
            chance = 2 * float(np.std(noise)) / len(noise) ** 0.5
            assert mean(noise) <= sign * metric.floor + chance < mean(right)


@pytest.mark.parametrize("name", TASKS)
def test_no_group_is_in_two_parts(name, planted):
    task = made(name)
    groups = [{sample.group for sample in task.samples(part)} for part in ("train", "validation", "test")]
    assert sum(map(len, groups)) == len(set.union(*groups))
    first = next(iter(groups[0]))
    planted(task, lambda sample: dataclasses.replace(sample, group=first) if sample.part == "test" else sample)
    with pytest.raises(UserError, match="two parts"):
        task.samples("train")


@pytest.mark.parametrize("name", TASKS)
def test_nothing_of_the_test_part_is_seen_in_training(name, planted):
    """Other test samples under planted labels change no weight, no choice of a rate, and what is found of the test."""
    task = made(name, rates=(1e-3, 3e-3))
    arm = Arm("reference")

    def trained():
        run = context(arm)
        rows = [row for row in tasks.rows(task, run) if row.metric == task.metrics[-1].name]
        training = FieldTraining(task, run, arm)
        return weights(training.model(0).model), training.validation(), [row.value for row in rows]

    before = trained()
    other = {}
    for part in ("train", "test"):
        some = task.samples(part)
        other |= {sample.name: some[(i + 7) % len(some)].target for i, sample in enumerate(some)}

    def turned(inputs):
        return inputs[::-1] if isinstance(inputs, tuple) else -inputs  # words in a row, or numbers

    def change(sample, part="test"):
        if sample.part != part:
            return sample
        return dataclasses.replace(sample, target=other[sample.name], inputs=turned(sample.inputs))

    planted(task, change)
    after = trained()
    assert torch.equal(before[0], after[0]) and before[1] == after[1] and before[2] != after[2]
    planted(task, lambda sample: change(change(sample), "train"))  # control: what is trained on is seen
    assert not torch.equal(before[0], trained()[0])


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_parameters_are_equal(arm):
    task = task_of(arm)
    base = Arm("reference")
    run = context(base, arm)
    held = [parameters_of(recipe_of(run, a).build(task, FieldTraining(task, run, a).width())) for a in (base, arm)]
    assert abs(held[1] / held[0] - 1) <= 0.02


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_a_recipe_trains_is_killed_goes_on_and_is_kept(arm, tmp_path, monkeypatch):
    task = task_of(arm)
    whole = FieldTraining(task, context(arm, folder=tmp_path / "whole"), arm)
    plain = whole.model(0)
    before = recipe_of(context(arm), arm).build(task, plain.width)
    assert len(plain.record["losses"]) == task.steps and np.isfinite(plain.record["losses"]).all()
    assert not torch.equal(weights(before), weights(plain.model)) and not plain.model.training

    kept = load_model(tmp_path / "whole" / "models" / arm.name / "seed-0")
    judged, cpu = task.judged("test"), torch.device("cpu")
    first, again = (task.said(m.recipe, m.model, judged, cpu) for m in (plain, kept))
    assert list(map(str, first)) == list(map(str, again)) and torch.equal(weights(plain.model), weights(kept.model))
    assert [task.score(a, b) for a, b in zip(judged, first, strict=True)] == [
        task.score(a, b) for a, b in zip(judged, again, strict=True)
    ]

    monkeypatch.setattr(_field_training, "_SAVED", 0.0)
    killed = FieldTraining(task, context(arm, folder=tmp_path / "killed"), arm)

    def kill(state):
        if state.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed.train(0, 3e-3, kill)
    steps = []
    went_on = killed.train(0, 3e-3, lambda state: steps.append(state.step))
    assert steps == [2, 3] and torch.equal(weights(went_on.model), weights(plain.model))


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_a_recipe_overfits_one_batch(arm):
    """Its loss falls to a tenth, and its own predictions go three quarters of the way to those that are right."""
    task = task_of(arm, dim=32, layers=1, dropout=0.0, batch=2)
    recipe = recipe_of(context(arm), arm)
    torch.manual_seed(0)
    model, samples = recipe.build(task, 48), task.draw(np.random.default_rng(5), task.samples("train"))
    batch, name, learner = task.collate(samples), task.metrics[0].name, recipe.learner(task, model, 48)
    optimizer, losses = torch.optim.AdamW(learner.parameters(), 5e-3), []

    def found(said):
        return mean(task.score(sample, one)[name] for sample, one in zip(samples, said, strict=True))

    def way():
        return (found(task.said(recipe, model.eval(), samples, torch.device("cpu"))) - start) / (best - start)

    best = found([task.truth(sample) for sample in samples])
    start = found(task.said(recipe, model.eval(), samples, torch.device("cpu")))
    while len(losses) < 200 and not (len(losses) % 20 == 19 and losses[-1] < 0.1 * losses[0] and way() >= 0.75):
        loss = recipe.loss(task, learner.train(), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0] and way() >= 0.75


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_a_batch_equals_its_samples_one_by_one(arm):
    """What fills up a batch changes nothing of what is said."""
    task, recipe = task_of(arm), recipe_of(context(arm), arm)
    torch.manual_seed(0)
    model, judged = recipe.build(task, 16).eval(), task.judged("test")[:3]
    cpu = torch.device("cpu")
    together = task.said(recipe, model, judged, cpu)
    alone = [task.said(recipe, model, [sample], cpu)[0] for sample in judged]
    values = [
        [list(task.score(a, b).values()) for a, b in zip(judged, said, strict=True)] for said in (together, alone)
    ]
    assert error(values[0], values[1]) <= SAME < error(values[0], values[0][::-1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Other(Procedure):
    """Says of each test sample what is right of the next: chance."""

    task: ClassVar[str] = SIMPLE

    def run(self, task, rng):
        judged = task.judged("test")
        for sample, other in zip(judged, [*judged[1:], judged[0]], strict=True):
            for metric, value in task.score(sample, task.truth(other)).items():
                yield metric, sample.name, value


@dataclasses.dataclass(frozen=True, kw_only=True)
class Own(Recipe):
    """A recipe that no catalogue knows: the reference, and what it is asked for."""

    task: ClassVar[str] = SIMPLE
    gain: int = 2
    calls: list = dataclasses.field(default_factory=list, compare=False)

    def batches(self, task, rng, samples):
        self.calls.append("batches")
        return super().batches(task, rng, samples)

    def after_step(self, model, progress):
        self.calls.append(round(progress, 2))


def test_a_procedure_and_a_recipe_of_ones_own(tmp_path):
    made(SIMPLE)
    own, fields = Own(gain=3), ",".join(f"{k}={v}" for k, v in TINY.items() if k != "rates")
    out = tmp_path / "run"
    results = manyheads.train([Other(), own], f"{SIMPLE}:{fields},rates=0.003", seeds=1, out=out)
    assert own.calls == ["batches", 0.33, "batches", 0.67, "batches", 1.0]
    rows = {arm: [row for row in results.rows if row.arm == arm] for arm in (own.spec, Other().spec)}
    first = load(SIMPLE).metrics[0].name
    assert all(sum(row.metric == first for row in some) == TINY["samples_judged"] for some in rows.values())
    assert {row.metric for row in rows[Other().spec]} == {metric.name for metric in load(SIMPLE).metrics}
    folder = next(iter((out / "models").glob(f"{own.slug}*/seed-0")))
    with pytest.raises(UserError, match="of your own"):
        manyheads.load(folder)
    assert manyheads.load(folder, recipe=own).recipe == own


def test_an_arm_that_is_no_recipe_is_refused():
    run = context(Arm("x"))
    assert recipe_of(run, Arm("x", options={"reference": "transformer"})) == Reference(kind="transformer")
    with pytest.raises(UserError, match="no recipe"):
        recipe_of(run, Arm("snapkv", "snapkv"))
