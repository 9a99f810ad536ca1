# SPDX-License-Identifier: Apache-2.0
"""A run's folder: cut off at any byte, shared by two processes, gone on with, refused for other settings."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from manyheads.errors import UserError
from manyheads.experiment import Results, Row, run
from manyheads.experiment.journal import Journal, folder_for
from oracles.experiment import Draws, experiment

TESTS = Path(__file__).resolve().parents[1]


def row(i, **more):
    return Row(task="t", metric="m", arm="a", value=0.1 + i, sample=f"{i}", **more)


def started(folder, **changes):
    return Journal(folder, {"format": 2, "experiment": {"x": 1}, "units": ["t/0", "t/1"], "options": {}, **changes})


def test_rows_come_back_as_they_were(tmp_path):
    rows = [
        row(0, bytes=0.0, seconds=1e-9, at={"length": 8, "kind": "x", "on": False}, about={"a\u2028b": ["é\n", None]}),
        row(1, seed=3, context="text"),
    ]  # fmt: skip
    journal = started(tmp_path)
    journal.add("t/0", rows)
    journal.add("t/1", [])
    assert Results.read(tmp_path).rows == rows and Results.read(tmp_path).finished
    assert journal.finish(seconds=1.0).run["seconds"] == 1.0


def test_a_unit_that_is_cut_off_at_any_byte_is_not_done(tmp_path):
    journal = started(tmp_path)
    journal.add("t/0", [row(0, about={"é": 1}), row(1)])
    [file] = (tmp_path / "units").iterdir()
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        assert not journal.has("t/0") and Results.read(tmp_path).rows == [], size
    file.write_bytes(whole)
    assert journal.has("t/0") and len(Results.read(tmp_path).rows) == 2


def test_foreign_files_are_not_rows(tmp_path):
    journal = started(tmp_path)
    journal.add("t/0", [row(0)])
    [file] = (tmp_path / "units").iterdir()
    for name, text in (
        ("notes.txt", "x"), ("notes.jsonl", "x"), (f".{file.name}.draft", "half"), ("list.jsonl", "[]\n"),
        ("a copy.jsonl", file.read_text().replace("0.1", "0.7")),
    ):  # fmt: skip
        (tmp_path / "units" / name).write_text(text)
    assert Results.read(tmp_path).rows == [row(0)] and not Results.read(tmp_path).finished
    (tmp_path / "units" / "notes").mkdir()
    assert not journal.has("t/1")


def test_names_of_units_do_not_collide(tmp_path):
    units = ["t/a b", "t/a-b", "t/a_b", "t/" + "x" * 200, "t/" + "x" * 201, "T/a b"]
    journal = started(tmp_path, units=units)
    for i, unit in enumerate(units):
        assert not journal.has(unit)
        journal.add(unit, [row(i)])
    assert [one.sample for one in Results.read(tmp_path).rows] == [f"{i}" for i in range(len(units))]


def test_other_settings_are_refused_and_named(tmp_path):
    started(tmp_path)
    started(tmp_path, started="later")  # what does not decide the rows may differ
    with pytest.raises(UserError, match=r"other settings \(experiment\.x\)"):
        started(tmp_path, experiment={"x": 2})
    with pytest.raises(UserError, match=r"other settings \(units\)"):
        started(tmp_path, units=["t/0"])
    for text, said in (("{", "cannot be read"), ('{"format": 1}', "another version"), ("[]", "another version")):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(UserError, match=said):
            Results.read(tmp_path)
    with pytest.raises(UserError, match="holds no run"):
        Results.read(tmp_path / "units")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="give another folder"):
        started(tmp_path / "file")


def test_a_run_of_other_settings_is_refused(tmp_path):
    run(experiment().at("cpu"), tmp_path)
    for made, seed in ((experiment(), 1), (experiment(shift=2.0), 0), (experiment(Draws(samples=6)), 0)):
        with pytest.raises(UserError, match="other settings"):
            run(made.at("cpu"), tmp_path, seed=seed)


def test_a_run_that_was_cut_off_equals_a_whole_one(tmp_path):
    plan = experiment().at("cpu")
    whole = run(plan, tmp_path / "whole")
    assert len(whole.rows) == 12 * 3 * 2 and whole.finished
    part = experiment(Draws(fails=2)).at("cpu")
    with pytest.raises(UserError, match="not for you"):
        run(part, tmp_path / "part")
    described = json.loads((tmp_path / "part" / "run.json").read_text())
    described["experiment"]["tasks"]["experiment"]["fails"] = "-1"  # the fault is mended
    (tmp_path / "part" / "run.json").write_text(json.dumps(described))
    assert len(Results.read(tmp_path / "part").rows) == 2 * 3 * 3 * 2
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "part" / "units").iterdir()}
    assert run(plan, tmp_path / "part").rows == whole.rows
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "part" / "units").iterdir()}
    assert before.items() < after.items()  # what was done is not done again


def test_twice_gives_the_same_rows_and_a_finished_run_is_only_read(tmp_path):
    plan = experiment().at("cpu")
    first, second = run(plan, tmp_path / "a"), run(plan, tmp_path / "b")
    assert first.rows == second.rows
    assert run(plan, tmp_path / "c", seed=1).rows != first.rows
    text = (tmp_path / "a" / "run.json").read_text()
    assert run(plan, tmp_path / "a").rows == first.rows and (tmp_path / "a" / "run.json").read_text() == text


def test_two_processes_write_into_one_folder_at_once(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "from manyheads.experiment import run\n"
        "from oracles.experiment import Draws, experiment\n"
        f"print(len(run(experiment(Draws(samples=60)).at('cpu'), {str(tmp_path / 'shared')!r}).rows))"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [worker.communicate()[0].strip() for worker in workers]
    assert said == ["360", "360"] and [worker.returncode for worker in workers] == [0, 0]
    alone = run(experiment(Draws(samples=60)).at("cpu"), tmp_path / "alone")
    assert Results.read(tmp_path / "shared").rows == alone.rows
    assert not list((tmp_path / "shared").rglob(".*"))  # no draft is left


def test_where_a_run_goes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert folder_for(None, {"a": 1}) == (Path("manyheads-report"), False)
    started(Path("manyheads-report"), options={"a": 1})
    assert folder_for(None, {"a": 1}) == (Path("manyheads-report"), False)  # goes on
    assert folder_for(None, {"a": 2}) == (Path("manyheads-report-2"), False)
    journal = started(Path("done"), options={"a": 1})
    for unit in ("t/0", "t/1"):
        journal.add(unit, [])
    assert folder_for(Path("done"), {"a": 1}) == (Path("done"), True)
    with pytest.raises(UserError, match="finished run of other options"):
        folder_for(Path("done"), {"a": 2})
