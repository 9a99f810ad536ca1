# SPDX-License-Identifier: Apache-2.0
"""What the clock is read for, by a clock that the work itself turns."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from manyheads.experiment import Arm, CausalLM, RunContext
from manyheads.tasks.text import speed
from manyheads.tasks.text.speed import Speed
from tiny import compare as tiny
from tolerance import nearly

texts, tokenizer, model = tiny.texts, tiny.tokenizer, tiny.model
ARMS = tuple(Arm(name) for name in ("full", "one", "two", "own"))
OPEN = {"full": 0.0, "one": 0.25, "two": 0.5, "own": 3.0}  # seconds of each arm's work after the prompt
LENGTH = 96


@pytest.fixture
def world(monkeypatch):
    """Reading a token takes 1/16 s, feeding the i-th after it i milliseconds; the arm ``own`` reads alone."""
    made = SimpleNamespace(now=0.0, read=[], fed=[], opened=[])

    class Read:
        def __init__(self, model, ids, arms):
            made.now += ids.shape[1] / 16
            made.read.append((ids.shape[1], tuple(arm.name for arm in arms)))

        def serves(self, arm):
            return arm.name != "own"

        @contextmanager
        def open(self, arm):
            made.now += OPEN[arm.name]
            made.opened.append(arm.name)
            yield SimpleNamespace(arm=arm.name, steps=0)

    def fed(model, cache, token, keep):
        cache.steps += 1
        made.now += cache.steps / 1024  # exact, however late it is
        made.fed.append((cache.arm, tuple(token.shape)))

    monkeypatch.setattr(speed, "Prefix", Read)
    monkeypatch.setattr(speed, "forward_chunked", fed)
    monkeypatch.setattr(speed.time, "perf_counter", lambda: made.now)
    return made


def measured(task, model, tokenizer, texts):
    run = RunContext(CausalLM("tiny", model, tokenizer), ARMS, data={"texts": texts})
    found, told = [], []
    run.advance = told.append
    for unit in task.units(run):
        found.append(list(task.measure(run, unit)))
        assert sum(told) == nearly(unit.cost)
        told.clear()
    return run, found


@pytest.mark.parametrize("apart", [False, True])
def test_seconds_of_a_prompt_and_milliseconds_of_a_token(world, model, tokenizer, texts, apart):
    _, rounds = measured(Speed(lengths=(64, LENGTH), rounds=3, apart=apart), model, tokenizer, texts)
    assert len(rounds) == 3
    for turn, found in enumerate(rounds):
        prompt = {row.arm: row for row in found if row.metric == "prefill"}
        for arm, row in prompt.items():
            dense = apart or arm != "own"  # what cannot share the prompt's forward has it within its own work
            assert row.value == nearly(OPEN[arm] + dense * LENGTH / 16)
            assert (row.sample, row.context, row.at) == (f"{turn}", f"{turn}", {"length": LENGTH})
            tokens = [row for row in found if (row.metric, row.arm) == ("decode", arm)]
            assert [row.value for row in tokens] == [1000 * n / 1024 for n in range(3, 11)]  # ms; two warm up
            assert [row.sample for row in tokens] == [f"{turn}.{i}" for i in range(8)]
            assert {row.context for row in tokens} == {f"{turn}"} and tokens[0].at == {"length": LENGTH}
    # Each round begins with another arm, and every token is fed once and alone.
    assert [world.opened[i : i + 4] for i in (0, 4, 8)] == [
        ["full", "one", "two", "own"], ["one", "two", "own", "full"], ["two", "own", "full", "one"]
    ]  # fmt: skip
    assert len(world.fed) == 3 * 4 * 10 and {shape for _, shape in world.fed} == {(1, 1)}
    whole = [arms for length, arms in world.read if length == LENGTH]
    everyone = tuple(arm.name for arm in ARMS)
    assert sorted(whole) == (sorted((name,) for name in everyone * 3) if apart else [everyone] * 3)
    assert [length for length, _ in world.read].count(64) == 3  # the warm-up, of other length and not timed


def test_some_arms_alone(world, model, tokenizer, texts):
    task = Speed(lengths=(LENGTH,), rounds=1, timed=("full", "two"))
    run, (found,) = measured(task, model, tokenizer, texts)
    assert {row.arm for row in found} == {"full", "two"} and {arms for _, arms in world.read} == {("full", "two")}
    (unit,) = task.units(run)
    assert unit.cost == LENGTH + 100 * 2 and unit.params == {"length": LENGTH, "round": 0}
    (unit,) = Speed(lengths=(LENGTH,), rounds=1, apart=True).units(run)
    assert unit.cost == 4 * LENGTH + 100 * 4
