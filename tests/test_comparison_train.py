# SPDX-License-Identifier: Apache-2.0
"""Token mixers trained and compared, from options to rows."""

import json
from dataclasses import dataclass, replace

import pytest
import torch

from manyheads import comparison_train
from manyheads.comparison_train import (
    TrainingSize,
    compare_on,
    compare_trained,
    mixers,
    plan_on,
    plan_training,
    training_size,
)
from manyheads.data.texts import standard_library
from manyheads.errors import UserError
from manyheads.models.decoder import Decoder
from manyheads.report.summary import Summary
from manyheads.strategy import Mixer
from tolerance import nearly

TINY = TrainingSize(
    dim=16, layers=1, heads=2, length=128, tokens=128, budget=7_000, rates=(3e-3, 1e-2), seeds=2, samples=4, reach=2,
    lengths=(128, 160), pairs=4, recall_length=20, recall_vocab=10, recall_batch=4, rounds=2,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Mean(Mixer):
    """The mean of the past."""

    def build(self, config):
        return Past(config)


class Past(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.out_proj = torch.nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, *, mask=None, state=None, cu_seqlens=None):
        total = x.cumsum(1) if state is None else state.total[:, None] + x.cumsum(1)
        seen = (0 if state is None else state.seen) + torch.arange(1, x.shape[1] + 1)
        return self.out_proj(total / seen[:, None]), Kept(total[:, -1], int(seen[-1]))


@dataclass(frozen=True)
class Kept:
    total: torch.Tensor
    seen: int

    @property
    def nbytes(self):
        return self.total.nbytes


@pytest.fixture(scope="module")
def texts():
    return standard_library()[:40]


@pytest.fixture(scope="module")
def results(texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    return compare_trained(texts, ["softmax:window=16", Mean()], size=TINY, out=out)


def test_every_figure_is_there(results):
    assert results.finished and results.run["kind"] == "train" and not results.run["skipped"]
    found = {(row.task, row.metric) for row in results.rows}
    assert found == {
        ("byte_lm", "token_nll"), ("byte_lm", "span_nll"), ("byte_lm", "training_nll"), ("byte_lm", "tuning_nll"),
        ("planted_constant", "completed"), ("planted_constant", "answer_nll"), ("associative_recall", "recalled"),
        ("associative_recall", "training_nll"), ("mixer_speed", "token_time"), ("mixer_cost", "state"),
        ("mixer_cost", "decode"),
    }  # fmt: skip
    for arm in results.run["experiment"]["arms"]:
        assert {row.metric for row in results.rows if row.arm == arm["key"]} == {metric for _, metric in found}
    assert [arm["key"] for arm in results.run["experiment"]["arms"]] == ["softmax", "softmax:window=16", Mean().spec]
    assert {row.seed for row in results.rows if row.metric == "recalled"} == {0}


def test_a_budget_is_kept(results):
    tune, text, recall = TINY.steps
    spent = len(TINY.rates) * tune * 128 + TINY.seeds * text * 128 + recall * 4 * 20
    assert 0.9 * TINY.budget < spent <= TINY.budget
    tokens = {row.about["tokens"] for row in results.rows if row.metric == "training_nll"}
    assert tokens == {text * 128, recall * 4 * 20}


def test_the_kept_model_loads(results):
    model = Decoder.load(results.folder / "models" / "softmax-window-16" / "seed-0")
    assert model.strategy.spec == "softmax:window=16"
    assert model(torch.zeros(1, 8, dtype=torch.long))[0].shape == (1, 8, 256)


def _arm(document):
    """The arm whose attention has a window of 16."""
    return next(arm for arm in document["arms"] if arm["arm"].endswith("=16"))


def test_what_is_shown_follows_the_rows(results):
    """Figures of every arm; the arm whose losses are a nat lower shows it, and an unfinished run is shown as far."""
    shown = Summary(results).document()
    json.dumps(shown, allow_nan=False)
    first, second = shown["arms"][0], _arm(shown)
    assert first["figures"].keys() == second["figures"].keys() and first["figures"]
    better = [
        replace(row, value=row.value - 1) if row.arm.endswith("=16") and row.metric == "token_nll" else row
        for row in results.rows
    ]
    other = _arm(Summary(replace(results, rows=better)).document())
    moved = {
        key
        for key, figure in second["figures"].items()
        if other["figures"][key]["estimate"]["value"] == nearly(figure["estimate"]["value"] - 1)
    }
    assert moved and all("token_nll" in key for key in moved)
    for tasks in (("byte_lm",), ("mixer_cost",)):  # an unfinished run
        json.dumps(Summary(replace(results, rows=[r for r in results.rows if r.task in tasks])).document())


def test_minutes_become_tokens_once(texts, tmp_path, monkeypatch):
    """By the speed that is measured; a run that goes on keeps what it began with, whatever the speed is then."""
    size = replace(TINY, seeds=1, samples=2, rates=(1e-2,))
    monkeypatch.setattr(comparison_train, "_affordable", lambda *_: 7_100)
    first = compare_trained(texts, [], minutes=2, size=size, out=tmp_path)
    assert first.run["training"]["budget"] == 7_100
    next((tmp_path / "units").iterdir()).unlink()
    monkeypatch.setattr(comparison_train, "_affordable", lambda *_: 9_900)
    again = compare_trained(texts, [], minutes=2, size=size, out=tmp_path)
    assert again.run["training"]["budget"] == 7_100 and again.finished


def test_a_slower_machine_affords_less(texts, monkeypatch):
    clock = iter(range(10**6))
    for seconds in (0.5, 1.0):
        monkeypatch.setattr(comparison_train, "_now", lambda _, seconds=seconds: seconds * next(clock))
        found = comparison_train._affordable(10, plan_training([], TINY).at("cpu"), 0, "cpu", {"texts": texts})
        assert found == float(f"{0.65 * 600 / seconds * 128:.1e}")


def test_options_that_cannot_be(texts, tmp_path):
    for wrong, match in (
        ({"budget": "2M", "minutes": 3.0}, "not both"), ({"minutes": 0.0}, "above 0"),
        ({"budget": "7 steps"}, "tokens or time"),
        ({"length": 16}, "at least 32"), ({"seeds": 0}, "1 or more"), ({"budget": 1_000}, "too small"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=match):
            compare_trained(texts, [], out=tmp_path / "out", **wrong)
    with pytest.raises(UserError, match="no token mixer"):
        mixers(["snapkv"])
    assert not (tmp_path / "out").exists()
    assert training_size(length=512).lengths == (512, 1024, 4096, 16384) and training_size("cuda").times == (1, 4, 16)


CLASSES = "sequence_classification:data=tones,length=256,stride=32,steps=4,dim=16,layers=2,batch=2"


def test_mixers_that_see_both_sides_are_compared_on_tasks_of_encoders(tmp_path):
    found = compare_on([CLASSES], ["maelre:switch=4"], seeds=2, samples=3, out=tmp_path)
    said = [row for row in found.rows if row.metric == "accuracy"]
    assert {row.arm for row in said} == {"softmax", "maelre:switch=4"} and len(said) == 2 * 2 * 3
    again = compare_on([CLASSES], ["maelre:switch=4"], seeds=2, samples=3, out=tmp_path)
    assert [row.value for row in again.rows] == [row.value for row in found.rows]
    assert plan_on([CLASSES + ",samples=9"], ["mra"], samples=3).at("cpu").tasks[0].samples == 9
    assert plan_on(["byte_lm"], ["coca"]).at("cpu").seeds == (0, 1, 2)


@pytest.mark.parametrize(
    ("tasks", "strategies", "says"),
    [
        ([CLASSES], ["coca"], "coca sees the past only"),
        (["byte_lm"], ["maelre"], "name a task of encoders"),
        ([CLASSES, "byte_lm"], ["softmax"], "compare them apart"),
        (["perplexity"], ["softmax"], "leave --train away"),
        ([CLASSES], ["snapkv"], "no token mixer"),
    ],
)
def test_what_does_not_go_together_is_refused(tasks, strategies, says):
    with pytest.raises(UserError, match=says):
        plan_on(tasks, strategies)
