# SPDX-License-Identifier: Apache-2.0
"""Arms, sizes, rows, what a run shares, and progress: small rules that every result rests on, one by one."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

from manyheads.errors import UserError
from manyheads.experiment import (
    Arm,
    CausalLM,
    Experiment,
    Metric,
    Pipeline,
    RunContext,
    Task,
    Trainable,
    WorkUnit,
    over,
)
from manyheads.experiment import run as run_experiment
from manyheads.experiment.claim import ClaimResult, ClaimRun
from manyheads.experiment.executors import Serial, _split, attention_planned_once, context, measure
from manyheads.experiment.rows import Row, conditions
from manyheads.experiment.runner import _ordered
from manyheads.experiment.subjects import Machine, subject
from manyheads.spec import parse
from oracles.experiment import Draws, experiment


@pytest.mark.parametrize(
    ("arm", "key", "spec", "count"),
    [
        (Arm("full"), "full", "", 0),
        (Arm("a", "snapkv"), "a", "snapkv", 1),
        (Arm("a", "snapkv", 0.5), "a:budget=0.5", "snapkv:budget=0.5", 1),
        (Arm("snapkv:window_size=8", "snapkv:window_size=8", 64), "snapkv:window_size=8,budget=64",
         "snapkv:window_size=8,budget=64", 1),
        (Arm("plain", "", 0.5), "plain:budget=0.5", "", 0),
        (Arm("two", "snapkv:budget=0.5 + ablate:heads=0.1"), "two", "snapkv:budget=0.5 + ablate:heads=0.1", 2),
    ],
)  # fmt: skip
def test_names_and_specs_of_arms(arm, key, spec, count):
    assert (arm.key, arm.full_spec) == (key, spec) and len(arm.strategies) == count
    assert arm.described() == {"key": key, "name": arm.name, "spec": spec, "budget": arm.budget, "options": {}}
    if count == 1:
        assert arm.strategy is arm.strategies[0] == parse(spec)
    else:
        with pytest.raises(UserError, match="the plain subject" if not arm.spec else "not one strategy"):
            _ = arm.strategy


def test_arms_over_budgets():
    assert over(["a", "b"]) == (Arm("a", "a"), Arm("b", "b"))
    assert over({"x": "a"}, (0.5, 8)) == (Arm("x", "a", 0.5), Arm("x", "a", 8))
    assert over(["a", "b"], (0.5, 0.25)) == tuple(Arm(n, n, b) for n in "ab" for b in (0.5, 0.25))
    assert over([], (1,)) == () and over(["a"], ()) == ()


def test_an_experiment_at_a_size():
    made = experiment(quick={"samples": 6, "seeds": 2}, cpu={"arms": (Arm("worse"),), "subject": "machine"})
    quick, cpu, cuda = (made.at(size) for size in ("quick", "cpu", "cuda"))
    assert quick.seeds == (0, 1) and [task.samples for task in quick.tasks] == [6]
    assert replace(made, sizes=replace(made.sizes, quick={})).at("quick").seeds == (0,)
    assert cuda.seeds == tuple(range(made.seeds)) and replace(made, seeds=5).at("cuda").seeds == (0, 1, 2, 3, 4)
    assert [arm.key for arm in cpu.arms] == ["full", "worse"] and isinstance(cpu.subject, Machine)
    assert [arm.key for arm in cuda.arms] == ["full", "worse", "same"] and cuda.size == "cuda"
    base = replace(made, baseline=made.arms[1], arms=(*made.arms,))
    assert [arm.key for arm in base.at("cuda").arms].count(base.baseline.key) == 1
    assert base.at("cuda").arms[0] == base.baseline
    for twice in ({"arms": (Arm("a"), Arm("a"))}, {"tasks": (Draws(), Draws())}):
        with pytest.raises(UserError, match=r"two (arms|tasks) are called"):
            replace(made, **twice).at("cpu" if "tasks" in twice else "cuda")
    described = cuda.described()
    assert described["seeds"] == list(cuda.seeds) and described["equal"] == made.equal
    assert described["tasks"]["experiment"]["samples"] == "12" and described["tasks"]["experiment"]["task"]
    assert described["arms"][1]["options"] == dict(made.arms[1 if made.arms[0].key == "full" else 0].options)


def test_rows_and_their_conditions():
    row = Row(task="t", metric="m", arm="a", value=1.0, sample="3")
    assert row.context == "3" and Row(task="t", metric="m", arm="a", value=1.0, sample="3", context="x").context == "x"
    assert row.plain() == {
        "task": "t",
        "metric": "m",
        "arm": "a",
        "value": 1.0,
        "sample": "3",
        "context": "3",
        "seed": 0,
    }
    full = replace(row, bytes=0.0, seconds=2.0, at={"length": 8}, about={"x": 1}, seed=4)
    assert full.plain() == {
        **row.plain(),
        "bytes": 0.0,
        "seconds": 2.0,
        "at": {"length": 8},
        "about": {"x": 1},
        "seed": 4,
    }
    for bad in (float("inf"), float("nan"), -float("inf")):
        with pytest.raises(ValueError, match=r"t\.m of a on 3 is not finite"):
            replace(row, value=bad)
    many = [replace(row, at={"few": i % 12, "many": i, "flag": i > 3}) for i in range(13)]
    assert conditions(many) == {"few": set(range(12)), "flag": {True, False}}  # a dozen at most
    assert conditions(many[:12])["many"] == set(range(12)) and conditions([]) == {}
    assert WorkUnit("t", "n").key == "t/n" and WorkUnit("t", "n").cost == 1.0


def test_what_a_run_keeps():
    made = []

    def make(value):
        return lambda: made.append(value) or value

    run = RunContext(Trainable(), (Arm("full"), Arm("a", "x", 0.5)), seed=7)
    assert [run.kept("k", make(1)), run.kept("k", make(2)), run.kept(("k", 2), make(3))] == [1, 1, 3] and made == [1, 3]
    made.clear()
    assert run.kept_last("slot", "one", make(1)) == run.kept_last("slot", "one", make(2)) == 1
    assert run.kept_last("other", "one", make(5)) == 5
    assert run.kept_last("slot", "two", make(3)) == 3 and run.kept_last("slot", "one", make(4)) == 4
    assert run.kept_last("slot", None, make(6)) == run.kept_last("slot", None, make(7)) == 6 and made == [1, 5, 3, 4, 6]
    assert run.baseline.key == "full" and run.device == torch.device("cpu")
    assert run.arm_of(WorkUnit("t", "n", params={"arm": "a:budget=0.5"})) is run.arms[1]
    again = RunContext(Trainable(), run.arms, seed=7)
    assert (run.rng(a=1).random(3) == again.rng(a=1).random(3)).all()
    assert torch.equal(torch.rand(2, generator=run.torch_rng(a=1)), torch.rand(2, generator=again.torch_rng(a=1)))
    assert (RunContext(Trainable(), run.arms, seed=8).rng(a=1).random(3) != run.rng(a=1).random(3)).all()


@dataclass(frozen=True, kw_only=True)
class Sized(Task):
    metrics: ClassVar[tuple[Metric, ...]] = (Metric("m", "m"), Metric("n", "n"))
    samples: int = 3
    depth: int = 1
    label: str = ""

    def units(self, run):
        return []

    def measure(self, run, unit):
        return []


def test_a_task_names_its_rows():
    task, arm = Sized(label="mine"), Arm("a", "x", 2)
    assert task.key == "mine" and Sized().key == Sized().name == __name__.rpartition(".")[2]
    assert task.metric("n").name == "n"
    with pytest.raises(ValueError, match="mine has no metric 'o'; it has m, n"):
        task.row("o", arm, 1.0, "0")
    assert task.row("m", arm, np.float32(2), "0", seed=3) == Row(
        task="mine", metric="m", arm="a:budget=2", value=2.0, sample="0", seed=3
    )
    about = [{"x": i} for i in range(3)]
    assert [(r.sample, r.value, r.about["x"], r.at) for r in task.each("n", arm, [5, 6, 7], about, at={"d": 1})] == [
        (f"{i}", 5.0 + i, i, {"d": 1}) for i in range(3)
    ]
    assert [r.about for r in task.each("n", arm, [5, 6])] == [{}, {}]
    assert task.sized({"samples": 9, "other.samples": 1, "mine.depth": 4, "x": 0}) == replace(task, samples=9, depth=4)
    assert task.sized({"samples": 9, "mine.samples": 1}).samples == 1  # its own comes after that of all
    assert task.unsupported_reason(None) is None and task.guard(None) is None


def test_units_that_share_follow_each_other():
    units = [WorkUnit("t", f"{i}", shares=s) for i, s in enumerate(("a", "", "b", "a", "", "b"))]
    assert [unit.name for unit in _ordered(units)] == ["0", "3", "1", "2", "5", "4"]


def test_progress_never_passes_a_unit(tmp_path):
    """What a task says of its work is bounded by the unit's cost, and what it does not say comes at its end."""
    told, added, units = [], [], [WorkUnit("t", f"{i}", 4.0, f"unit {i}") for i in range(3)]

    class Says:
        key = "t"

        def measure(self, run, unit):
            for part in {"0": (1.0, 2.0), "1": (3.0, 3.0, 1.0), "2": ()}[unit.name]:
                run.advance(part)
            return []

    journal = SimpleNamespace(has=lambda key: key == "t/2", add=lambda key, rows: added.append(key))
    plan = SimpleNamespace(tasks=(Says(),))
    Serial().run(plan, RunContext(Trainable(), ()), units, journal, lambda *said: told.append(said))
    assert told == [
        (0.0, "unit 0"), (1.0, "unit 0"), (2.0, "unit 0"), (1.0, ""),
        (0.0, "unit 1"), (3.0, "unit 1"), (1.0, "unit 1"), (0.0, "unit 1"), (0.0, ""), (4.0, ""),
    ]  # fmt: skip
    assert added == ["t/0", "t/1"]
    alone = SimpleNamespace(key="u", alone=True)
    first, last = _split(
        SimpleNamespace(tasks=(SimpleNamespace(key="t", alone=False), alone)), [*units, WorkUnit("u", "x")]
    )
    assert first == units and [unit.key for unit in last] == ["u/x"]


def test_a_run_tells_how_far_it_is_and_goes_on_from_there(tmp_path):
    plan, told = experiment(cpu={"samples": 12}).at("cpu"), []
    run_experiment(plan, tmp_path, progress=lambda *said: told.append(said), about={"options": {"x": 1}})
    assert told[-1][:2] == (4.0, 4.0) and [said[0] for said in told] == sorted(said[0] for said in told)
    for unit in sorted((tmp_path / "units").iterdir())[:1]:
        unit.unlink()
    told.clear()
    again = run_experiment(plan, tmp_path, progress=lambda *said: told.append(said))
    assert told[0][:2] == (3.0, 4.0) and told[-1][:2] == (4.0, 4.0)
    assert again.run["options"] == {"x": 1} and again.run["format"] == 2 and again.run["peak_rss_bytes"] > 2**20
    assert again.run["units"] == [f"experiment/{i}" for i in range(4)]
    told.clear()
    run_experiment(plan, tmp_path, progress=lambda *said: told.append(said))
    assert told == []  # finished: it is only read


def test_cudnns_attention_is_off_while_units_run_and_as_it_was_after():
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for was in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(was)
            seen = []

            class Looks:
                key = "t"

                def measure(self, run, unit, seen=seen):
                    seen.append(torch.backends.cuda.cudnn_sdp_enabled())
                    return []

            measure(SimpleNamespace(tasks=(Looks(),)), RunContext(Trainable(), ()), WorkUnit("t", "0"))
            with pytest.raises(KeyError), attention_planned_once():
                raise KeyError
            assert seen == [False] and torch.backends.cuda.cudnn_sdp_enabled() == was
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_subjects_by_name(tmp_path):
    assert isinstance(subject("trainable"), Trainable) and isinstance(subject("machine"), Machine)
    assert isinstance(subject("scenes"), Pipeline) and isinstance(subject("default"), CausalLM)
    (tmp_path / "model_index.json").write_text("{}")
    made = subject(str(tmp_path), "float16")
    assert isinstance(made, Pipeline) and made.dtype == "float16" and subject(made) is made
    assert subject(str(tmp_path / "other")).kind == "causal_lm"
    for one, part in ((CausalLM("x"), "model"), (CausalLM("x"), "tokenizer"), (Pipeline("x"), "pipe")):
        with pytest.raises(RuntimeError, match="load the subject first"):
            getattr(one, part)
    for given in (CausalLM("x", torch.nn.Linear(1, 1)), Pipeline("x", object())):
        with pytest.raises(UserError, match="already loaded cannot be sent"):
            given.__getstate__()
    assert CausalLM("x").__getstate__()["_parts"] is None and Pipeline("x").__getstate__()["_pipe"] is None
    assert subject("scenes").described() == {"kind": "pipeline", "name": "scenes"}


def test_which_strategies_act_on_which_subject():
    strategies = {
        name: parse(name) for name in ("snapkv", "pab", "sag", "softmax", "massive_values", "ablate:heads=0.1")
    }
    acts = {
        "causal_lm": {"snapkv", "massive_values", "ablate:heads=0.1", "sag"}, "machine": set(strategies),
        "pipeline": {"pab", "sag", "massive_values", "ablate:heads=0.1"},
        "trainable": {"softmax", "massive_values", "ablate:heads=0.1", "sag"},
    }  # fmt: skip
    for one in (CausalLM("x"), Machine(), Pipeline("x"), Trainable()):
        fit = {name for name, strategy in strategies.items() if one.unsupported_reason(strategy) is None}
        assert fit == acts[one.kind], one.kind
    said = CausalLM("x").unsupported_reason(strategies["softmax"])
    assert said.startswith("softmax does not act on causal lm: train it")
    for spec, how in (("softmax", "--train --strategies"), ("maelre", "--tasks"), ("tkl_local", "--ranking")):
        assert how in CausalLM("x").unsupported_reason(parse(spec))
    assert "open a pipeline" in CausalLM("x").unsupported_reason(strategies["pab"])
    assert "open a causal language model" in Trainable().unsupported_reason(strategies["snapkv"])


def test_how_many_tokens_a_subject_reads():
    class Model(torch.nn.Module):
        def __init__(self, **config):
            super().__init__()
            self.config = SimpleNamespace(**config)

    for config, most in (
        ({"max_position_embeddings": 77}, 77), ({"n_positions": 55}, 55), ({}, 2**40),
        ({"max_position_embeddings": 0, "n_positions": 9}, 9), ({"max_position_embeddings": None}, 2**40),
    ):  # fmt: skip
        assert CausalLM("x", Model(**config), None).max_context == most
    chat, plain = SimpleNamespace(chat_template="x"), SimpleNamespace(chat_template=None)
    assert CausalLM("x", Model(), chat).chats and not CausalLM("x", Model(), plain).chats
    assert not CausalLM("default").chats and not CausalLM("recall").chats


def test_an_identity_is_that_of_the_weights():
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    one = CausalLM("x", model).identity()
    assert (one["parameters"], one["dtype"], one["class"], one["name"]) == (8, "bfloat16", "Linear", "x")
    assert CausalLM("x", model).identity() == one
    with torch.no_grad():
        model.weight[0, 0] += 1
    other = CausalLM("x", model).identity()
    assert other["weights_sha256"] != one["weights_sha256"] and other["config_sha256"] == one["config_sha256"]


def test_the_run_that_decides_is_the_newest_full_one():
    def ran(size, date, legacy=None):
        return ClaimRun(size=size, device="cpu", tier="scaled", date=date, legacy=legacy)

    runs = (ran("quick", "2031"), ran("cpu", "2029"), ran("cuda", "2030"), ran("cpu", "2032", {"verdict": "holds"}))
    assert ClaimResult(slug="x", statement="", runs=runs).deciding is runs[2]
    assert ClaimResult(slug="x", statement="", runs=runs[::3]).deciding is runs[3]
    assert ClaimResult(slug="x", statement="", runs=runs[:1]).deciding is runs[0]
    assert ClaimResult(slug="x", statement="").deciding is None


def test_the_context_of_a_plan(tmp_path):
    plan = Experiment(subject="trainable", arms=(), tasks=(Sized(),)).at("cpu")
    made = context(plan, 5, "cpu", None, tmp_path)
    assert (made.seed, made.seeds, made.data, made.folder) == (5, (0, 1, 2), {}, tmp_path)
    assert made.subject is plan.subject and made.arms == plan.arms
