# SPDX-License-Identifier: Apache-2.0
"""Token mixers trained and compared: equal terms for all arms, runs that can be cut off, and mixers that cheat."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from manyheads.compare import compare_trained
from manyheads.compare import stats as statistics
from manyheads.compare.results import ROWS, Results
from manyheads.compare.stats import Estimate
from manyheads.compare.train import run as train_run
from manyheads.compare.train import tasks
from manyheads.compare.train.arms import build, check_causal, default_strategies, make_arms, perturb_zero_params
from manyheads.compare.train.budget import Size
from manyheads.compare.train.data import Stream, split
from manyheads.compare.train.summary import crossover, summarise
from manyheads.data.texts import Text, standard_library
from manyheads.errors import UserError
from manyheads.models.decoder import Decoder
from manyheads.strategy import Mixer

TINY = Size(
    dim=16, layers=1, heads=2, length=128, tokens=128, budget=7_000, rates=(3e-3, 1e-2), seeds=2, samples=4, reach=2,
    lengths=(128, 160), pairs=2, recall_length=12, recall_vocab=10, recall_batch=4,
)  # fmt: skip
TIMED = {"seconds"}


@pytest.fixture(scope="module")
def texts():
    return standard_library()[:40]


def run(texts, out, strategies=("softmax:window=16",), **changes):
    return compare_trained(texts, strategies, size=changes.pop("size", TINY), out=out, **changes)


def measured(results):
    """Rows without what a clock says."""
    return [
        {k: v for k, v in row.items() if k not in TIMED}
        for row in results.rows
        if row["metric"] not in ("decode", "speed")
    ]


@pytest.fixture(scope="module")
def results(texts, tmp_path_factory):
    return run(texts, tmp_path_factory.mktemp("trained"), ["softmax:window=16", "softmax:position=none"])


def test_arms_are_on_equal_terms(results):
    arms = results.run["arms"]
    assert [arm["key"] for arm in arms] == ["softmax", "softmax:window=16", "softmax:position=none"]
    for name in ("parameters", "recall_parameters"):
        sizes = [arm[name] for arm in arms]
        assert max(abs(size / sizes[0] - 1) for size in sizes) <= 0.02
    trained = [row for row in results.rows if row["task"] == "train"]
    for seed in (0, 1):
        assert len({row["order"] for row in trained if row["seed"] == seed}) == 1
    assert trained[0]["order"] != trained[-1]["order"] and len({row["tokens"] for row in trained}) == 1
    for key in (arm["key"] for arm in arms):
        assert [row["rate"] for row in results.rows if (row["task"], row["arm"]) == ("tune", key)] == [3e-3, 1e-2]
        assert len([row for row in trained if row["arm"] == key]) == 2


def test_every_figure_is_there(results):
    assert results.finished and results.run["kind"] == "train" and not results.run["skipped"]
    summary = summarise(results)
    for arm in summary.arms:
        assert set(arm.figures) == {"loss", "beyond", "recall", "needle"}
        assert [(first, last) for first, last, _, _ in arm.spans] == [(0, 32), (32, 128), (128, 256)]
        assert set(arm.speeds) == set(TINY.speed_lengths)
        assert set(arm.state) == set(arm.decode) == {128, 160} and arm.speed is not None and arm.rate in TINY.rates
        assert 2 < arm.figures["loss"].value < np.log(256)
    assert not summary.base.deltas and set(summary.arms[1].deltas) == set(summary.base.figures)
    assert (
        summary.arms[1].state[160]
        < summary.base.state[160]
        == pytest.approx(160 / 128 * summary.base.state[128], rel=0.05)
    )
    json.dumps(summary.document(), allow_nan=False)


def test_the_kept_model_is_the_one_that_was_judged(results):
    arm = summarise(results).arms[1]
    model = Decoder.load(arm.model)
    assert model.strategy.spec == arm.key and model.parameters_held == arm.parameters
    assert model(torch.zeros(1, 8, dtype=torch.long))[0].shape == (1, 8, 256)


@pytest.fixture(scope="module")
def once(texts, tmp_path_factory):
    return run(texts, tmp_path_factory.mktemp("once"))


def test_the_same_seed_gives_the_same_rows(once, texts, tmp_path):
    assert measured(run(texts, tmp_path / "again")) == measured(once)
    other = measured(run(texts, tmp_path / "other", seed=1))
    assert [row["value"] for row in other] != [row["value"] for row in measured(once)]


@pytest.mark.parametrize("task", ["train", "judge", "cost"])
def test_a_killed_run_goes_on(once, texts, tmp_path, monkeypatch, task):
    """Killed within the second unit of a task, and the last line torn: the rows are those of a run in one piece."""
    seen = 0
    original = tasks._MEASURES[task]

    def dies(bench, unit):
        nonlocal seen
        seen += 1
        if seen == (1 if task == "cost" else 2):
            raise KeyboardInterrupt
        yield from original(bench, unit)

    monkeypatch.setitem(tasks._MEASURES, task, dies)
    with pytest.raises(KeyboardInterrupt):
        run(texts, tmp_path)
    monkeypatch.setitem(tasks._MEASURES, task, original)
    with (tmp_path / ROWS).open("a") as file:
        file.write('{"unit": "judge/softmax/0", "task": "jud')
    assert not Results.read(tmp_path).finished
    assert measured(run(texts, tmp_path)) == measured(once)


def test_minutes_become_tokens_once(texts, tmp_path, monkeypatch):
    """By the speed that is measured; a run that goes on keeps what it began with, whatever the speed is then."""
    size = replace(TINY, seeds=1, samples=2, rates=(1e-2,))
    seconds = 0.65 * 60 * 2 / 2 / 7_100 * size.step  # a step takes so long that two minutes hold 7,100 tokens per arm
    monkeypatch.setattr(train_run, "step_times", lambda *_: [seconds])
    first = run(texts, tmp_path, minutes=2, size=size)
    assert first.run["settings"]["budget"] == 7_100
    (tmp_path / ROWS).write_text("")
    monkeypatch.setattr(train_run, "step_times", lambda *_: [seconds / 7])
    assert run(texts, tmp_path, minutes=2, size=size).run["settings"]["budget"] == 7_100


class Cheat(torch.nn.Module):
    """Softmax over the past, and a mean over everything, the future included, behind a gate that starts shut."""

    def __init__(self, config, gate):
        super().__init__()
        self.out_proj = torch.nn.Linear(config.dim, config.dim, bias=False)
        self.gate = torch.nn.Parameter(torch.full((config.dim,), gate))

    def forward(self, x, *, mask=None, state=None, cu_seqlens=None):
        past = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
        return self.out_proj(past + self.gate * x.mean(1, keepdim=True)), state


@dataclass(frozen=True, kw_only=True)
class Peeks(Mixer):
    gate: float = 0.1

    def build(self, config):
        return Cheat(config, self.gate)


@dataclass(frozen=True, kw_only=True)
class Honest(Mixer):
    def build(self, config):
        mixer = Cheat(config, 0.0)
        mixer.register_buffer("gate", mixer._parameters.pop("gate").detach())
        return mixer


@pytest.mark.parametrize("gate", [0.1, 0.0])
def test_a_mixer_that_sees_the_future_is_refused(texts, tmp_path, gate):
    with pytest.raises(UserError, match="not causal"):
        run(texts, tmp_path / "out", [Peeks(gate=gate)])
    assert not (tmp_path / "out").exists()


def test_an_honest_mixer_of_ones_own_is_not(texts):
    ids = torch.randint(0, 256, (2, 64))
    for strategy in (Honest(), *default_strategies()):
        arm = make_arms([strategy])[-1]
        model = build(arm, Size(dim=32, layers=4, heads=2).text, 120_000, 0, torch.device("cpu")).eval()
        perturb_zero_params(model)
        check_causal(model, ids, arm.key)


def test_files_are_parted_whole_and_stay_where_they_are(texts):
    parts = split(texts)
    names = [text.name for part in parts.values() for text in part]
    assert sorted(names) == sorted(text.name for text in texts)
    assert all(parts.values())
    fewer = split([text for text in texts if text.name != parts["train"][0].name])
    assert {t.name for t in fewer["test"]} & {t.name for t in parts["train"]} == set()
    assert {k: sum(len(t.content) for t in v) for k, v in split([Text("one", "abcd" * 1000)]).items()} == {
        "test": 400, "validation": 200, "train": 3400,
    }  # fmt: skip


def test_a_stream_depends_on_seed_and_step_alone():
    data = torch.arange(250, dtype=torch.uint8)
    a, b = (Stream(data, 16, 4, seed) for seed in (0, 1))
    assert torch.equal(a(3)[0], a(3)[0]) and not torch.equal(a(3)[0], a(4)[0]) and not torch.equal(a(3)[0], b(3)[0])
    assert a.order(5) != b.order(5) and a(0)[0].shape == (4, 17) and bool((a(0)[0].diff(dim=1) == 1).all())


def test_a_budget_is_kept(results):
    steps, settings = results.run["steps"], results.run["settings"]
    spent = len(TINY.rates) * steps["tune"] * 128 + TINY.seeds * steps["text"] * 128 + steps["recall"] * 4 * 12
    assert 0.9 * settings["budget"] < spent <= settings["budget"]


def test_crossover():
    def times(*values):
        return {n: Estimate(v, v, v, 1, 1) for n, v in zip((1024, 4096, 16384), values, strict=True)}

    base = times(1.0, 2.0, 8.0)
    assert crossover(times(2.0, 2.0, 2.0), base) == pytest.approx(4096)
    assert crossover(times(2.0, 4.0, 4.0), base) == pytest.approx(8192)
    assert crossover(times(0.5, 0.5, 0.5), base) == 1024 and crossover(times(0.5, 0.5, 9.0), base) is None
    assert crossover({n: Estimate(e.value, 0, 99, 1, 1) for n, e in times(2.0, 2.0, 2.0).items()}, base) is None


def test_crossed_intervals_cover():
    """Of many draws with known spread over trainings and contexts, 95 % or more cover the truth; either alone fewer."""
    rng = np.random.default_rng(0)
    hits, alone = 0, 0
    for i in range(150):
        values = rng.normal(0, 1, (5, 1)) + rng.normal(0, 1, (1, 20)) + rng.normal(0, 0.5, (5, 20))
        whole = statistics.crossed(values, i, "x")
        context = statistics.mean(values.mean(0), np.arange(20), i, "x")
        hits += whole.low <= 0 <= whole.high
        alone += context.low <= 0 <= context.high
    assert hits >= 0.92 * 150 and alone < 0.75 * 150
    one = statistics.crossed(rng.normal(0, 1, (1, 20)), 0, "x")
    assert np.isfinite([one.low, one.high]).all() and not np.isfinite(statistics.crossed(np.ones((1, 1)), 0, "x").low)
