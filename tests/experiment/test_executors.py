# SPDX-License-Identifier: Apache-2.0
"""Units in other processes give the rows of a serial run, whatever happens to a worker."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from manyheads.errors import UserError
from manyheads.experiment import Results, executors, run
from manyheads.experiment.executors import Processes, Ray
from oracles.experiment import Draws, Here, experiment

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def serial(tmp_path_factory):
    return run(experiment().at("cpu"), tmp_path_factory.mktemp("serial")).rows


def test_processes_give_what_a_serial_run_gives(tmp_path, serial):
    told = []
    plan = experiment(Draws(), Here(label="here", samples=6)).at("cpu")
    rows = run(plan, tmp_path, executor=Processes(2), progress=lambda *said: told.append(said)).rows
    assert [row for row in rows if row.task != "here"] == serial
    assert {row.value for row in rows if row.task == "here"} == {os.getpid()}  # times are taken here, alone
    assert told[-1][0] == told[-1][1] == 6.0 and [said[0] for said in told] == sorted(said[0] for said in told)


def test_a_worker_that_is_killed_loses_its_unit_only_and_the_run_ends(tmp_path, serial):
    mark = tmp_path / "killed"
    rows = run(experiment(Draws(dies=1, mark=str(mark))).at("cpu"), tmp_path / "run", executor=Processes(2)).rows
    assert mark.exists() and rows == serial


def test_a_unit_that_always_kills_stops_the_run_in_one_line(tmp_path):
    with pytest.raises(UserError, match="a worker died on experiment/3, and another") as caught:
        run(experiment(Draws(dies=3)).at("cpu"), tmp_path, executor=Processes(2))
    assert "\n" not in str(caught.value)
    assert len(Results.read(tmp_path).rows) == 3 * 3 * 3 * 2  # the finished units are kept


def test_what_the_user_can_mend_is_said_as_it_is(tmp_path):
    with pytest.raises(UserError, match=r"^this unit is not for you$"):
        run(experiment(Draws(fails=1)).at("cpu"), tmp_path, executor=Processes(1))
    with pytest.raises(UserError, match="1 or more"):
        Processes(0)


def test_too_little_memory_is_said_with_what_to_do(tmp_path, monkeypatch):
    def measure(task, made, unit):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(Draws, "measure", measure)
    with pytest.raises(UserError, match="the memory of cpu is too small for draws 0: run with fewer workers") as caught:
        run(experiment().at("cpu"), tmp_path)
    assert "\n" not in str(caught.value)


def test_workers_end_by_themselves(tmp_path, monkeypatch):
    """Killed ones leave semaphores behind, which Python then warns of."""
    ended = []
    stop = executors._Worker.stop

    def note(worker):
        stop(worker)
        ended.append(worker._process.exitcode)

    monkeypatch.setattr(executors._Worker, "stop", note)
    run(experiment().at("cpu"), tmp_path, executor=Processes(2))
    assert ended and set(ended) == {0}


def test_without_ray_it_is_said_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'manyheads\[ray\]'"):
        run(experiment().at("cpu"), tmp_path, executor=Ray("local"))


def test_ray_gives_what_a_serial_run_gives(tmp_path, serial, monkeypatch):
    pytest.importorskip("ray", reason="needs the extra [ray]")
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)  # the workers' own
    assert run(experiment().at("cpu"), tmp_path / "a", executor=Ray("local")).rows == serial
    with pytest.raises(UserError, match="this unit is not for you"):
        run(experiment(Draws(fails=1)).at("cpu"), tmp_path / "b", executor=Ray("local"))
    with pytest.raises(UserError, match="a worker died on experiment/3, and another"):
        run(experiment(Draws(dies=3)).at("cpu"), tmp_path / "c", executor=Ray("local"))


def test_what_ray_is_asked_for(tmp_path, serial, monkeypatch):
    """A processor and no GPU a unit, each given out twice at most; a cluster that runs already is not ended."""
    asked, ended = [], []

    class Future:
        def __init__(self, call, given):
            self.call, self.given = call, given

    def remote(**options):
        asked.append(options)
        return lambda call: SimpleNamespace(remote=lambda *given: Future(call, given))

    errors = {name: type(name, (Exception,), {}) for name in ("WorkerCrashedError", "OutOfMemoryError", "RayTaskError")}
    stand_in = SimpleNamespace(
        is_initialized=lambda: True, put=lambda x: x, remote=remote, shutdown=lambda: ended.append(1),
        wait=lambda futures, num_returns: (futures[-num_returns:], futures[:-num_returns]),
        get=lambda future: future.call(*future.given), exceptions=SimpleNamespace(**errors),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    assert run(experiment().at("cpu"), tmp_path, executor=Ray("local")).rows == serial
    assert asked == [{"num_cpus": 1, "num_gpus": 0, "max_retries": 1}] and not ended


@dataclass(frozen=True, kw_only=True)
class Guarded(Draws):
    """Refuses an arm that says it keeps everything and yet shifts the value."""

    def guard(self, run):
        if any(arm.options.get("shift") for arm in run.arms):
            raise UserError("worse keeps everything and yet differs")


@pytest.mark.parametrize("executor", [None, Processes(1)])
def test_an_arm_that_keeps_everything_and_differs_stops_the_run_before_any_unit(tmp_path, executor):
    with pytest.raises(UserError, match="keeps everything and yet differs"):
        run(experiment(Guarded()).at("cpu"), tmp_path / "broken", executor=executor)
    assert not list((tmp_path / "broken" / "units").iterdir())
    assert run(experiment(Guarded(), shift=0.0).at("cpu"), tmp_path / "sound").finished  # the control
