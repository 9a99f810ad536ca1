# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, and how it fails."""

import json
import subprocess
import sys

import pytest

from manyheads import __version__, catalog, comparison
from manyheads.cli import main


@pytest.fixture
def cli(capsys):
    """Run the command line; return exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def test_list_json_has_every_paper(cli):
    code, out, _ = cli("list", "--json")
    rows = json.loads(out)
    assert code == 0 and len(rows) == 119
    assert {"id", "slug", "category", "title", "state", "checks", "tags", "summary", "training", "arxiv"} <= set(
        rows[0]
    )
    assert next(row for row in rows if row["id"] == 24)["slug"] == "hashevict"


def test_python_m_is_the_same(cli):
    done = subprocess.run([sys.executable, "-m", "manyheads", "list", "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and len(json.loads(done.stdout)) == 119


def test_list_shows_baselines_apart(cli):
    code, out, _ = cli("list")
    papers, _, baselines = out.partition("baselines")
    assert code == 0 and "hashevict" in papers and "streaming_llm" in baselines and "snapkv" not in papers


def test_list_filters(cli):
    rows = json.loads(cli("list", "--category", "caches", "--json")[1])
    assert rows and {row["category"] for row in rows} == {"caches"}
    rows = json.loads(cli("list", "--category", "domains", "--json")[1])
    assert {"domains/vision", "domains/speech"} <= {row["category"] for row in rows}
    rows = json.loads(cli("list", "--state", "planned", "--json")[1])
    assert {row["state"] for row in rows} <= {"planned"}


def test_tasks_are_listed_and_found(cli):
    rows = json.loads(cli("tasks", "--json")[1])
    from manyheads.tasks import load, names

    assert [row["task"] for row in rows] == names() and {"ruler.vt", "chat.qa", "longbench"} <= set(names())
    assert all(load(row["task"])().name == row["task"] and row["summary"][-1] in ".?" for row in rows)
    assert {row["field"] for row in json.loads(cli("tasks", "--field", "text", "--json")[1])} == {"text"}
    code, _, err = cli("tasks", "--field", "nothing")
    assert code == 2 and "there are agents, diffusion" in err
    for words, task in (("needle in a haystack", "niah_single"), ("variable tracking", "ruler.vt"), ("vt", "ruler.vt")):
        found = [row["slug"] for row in json.loads(cli("find", words, "--json")[1]) if row["category"] == "tasks"]
        assert task in found and "memory" not in found


def test_find(cli):
    code, out, _ = cli("find", "shrink the cache without training", "--json", "--limit", "3")
    rows = json.loads(out)
    assert code == 0 and "hashevict" in [row["slug"] for row in rows] and len(rows) == 3
    assert "hashevict" in cli("find", "shrink the cache without training")[1]


def test_show_a_strategy(cli):
    code, out, _ = cli("show", "hashevict")
    assert code == 0 and "2412.16187" in out and "budget" in out and "manyheads.use(model" in out
    row = json.loads(cli("show", "hashevict", "--json")[1])
    assert "budget" in {field["name"] for field in row["fields"]} and row["doc"]
    from manyheads.spec import parse

    assert parse(row["spec"]).slug == "hashevict"


@pytest.mark.parametrize("row", [row for row in [*catalog.papers(), *catalog.baselines()] if row.state != "planned"])
def test_every_field_of_a_strategy_is_explained(cli, row):
    fields = json.loads(cli("show", row.slug, "--json")[1])["fields"]
    assert not [field["name"] for field in fields if not field["help"]]


def test_show_a_planned_paper(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path)  # nothing stands there
    code, out, _ = cli("show", "hashevict")
    assert code == 0 and "HashEvict" in out and "does not stand yet" in out
    row = json.loads(cli("show", "hashevict", "--json")[1])
    assert row["state"] == "planned" and row["fields"] == [] and row["spec"] is None


def test_version_and_help(cli):
    assert cli("--version") == (0, f"manyheads {__version__}\n", "")
    code, out, _ = cli("--help")
    assert code == 0 and all(verb in out for verb in ("list", "show", "find", "claims", "compare", "report"))
    assert cli() == (0, out, "")


def test_help_names_the_defaults(cli):
    """As they are in the code, and not taken for markup."""
    code, out, _ = cli("compare", "--help")
    said = "".join(line.strip(" │") for line in out.splitlines()).replace(" ", "")
    assert code == 0 and f"[default:{','.join(comparison.STRATEGIES)}]" in said
    assert all(f"[default:{','.join(map(str, values))}]" in said for values in (comparison.BUDGETS, comparison.LENGTHS))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["show", "hashevct"], "did you mean hashevict"),
        (["lst"], "list"),
        (["list", "--nope"], "--nope"),
        (["list", "--category", "cahces"], "did you mean caches"),
        (["list", "--state", "done"], "planned"),
        (["find", "xyzzyplugh"], "nothing matches"),
        (["find"], "words"),
        (["find", "cache", "--limit", "0"], "limit"),
        (["find", "cache", "--limit", "many"], "many"),
        (["claims", "run", "hashevct"], "did you mean hashevict"),
        (["claims", "run", "full"], "no claim yet"),
        (["claims", "run", "hashevict", "--device", "tpu"], "cuda"),
        (["claims", "run"], "--all"),
        (["claims", "run", "hashevict", "--all"], "--all"),
        (["claims", "run", "hashevict", "--workers", "0"], "workers"),
        (["compare", "--workers", "2", "--ray", "local"], "not both"),
    ],
)
def test_mistakes_cost_a_line_or_two(cli, arguments, said):
    code, out, err = cli(*arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and said.lower() in err.lower()
    assert len(err.splitlines()) <= 2 and "Traceback" not in err


def broken(*_, **__):
    raise RuntimeError("two\nlines")


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_a_defect_shows_its_traceback_on_request_only(cli, monkeypatch):
    monkeypatch.setattr(catalog, "find", broken)
    code, _, err = cli("find", "cache")
    assert code == 1 and err.startswith("error: RuntimeError: two lines") and len(err.splitlines()) == 1
    for arguments in (["--debug", "find", "cache"], ["find", "cache", "--debug"]):
        with pytest.raises(RuntimeError):
            main(arguments)


def test_interruption(cli, monkeypatch):
    monkeypatch.setattr(catalog, "find", interrupted)
    assert cli("find", "cache") == (130, "", "interrupted\n")


def test_a_closed_pipe_is_quiet():
    reader = subprocess.Popen([sys.executable, "-c", "pass"], stdin=subprocess.PIPE)
    reader.wait()
    writer = subprocess.run(
        [sys.executable, "-m", "manyheads", "list", "--json"], stdout=reader.stdin, stderr=subprocess.PIPE, text=True
    )
    reader.stdin.close()
    assert writer.stderr == "" and writer.returncode != 0


def test_a_claim_is_shown_with_its_checks_and_listed_with_one_device(cli):
    code, out, _ = cli("claims", "show", "hashevict")
    assert code == 0 and out.startswith("hashevict: ")
    code, _, err = cli("claims", "show", "hashevikt")
    assert code == 2 and "did you mean hashevict?" in err
    listed = cli("claims")[1]
    assert "cpu, cpu" not in listed and "cuda, cuda" not in listed and "cpu" in listed


def test_time_left(capsys, monkeypatch):
    from manyheads import progress

    assert progress.time_left(30, 0.25) == "about 1:30 left" and progress.time_left(3600, 0.5) == "about 1:00:00 left"
    assert progress.time_left(7, 0.5) == "about 0:07 left"
    assert progress.time_left(1, 0.5) == progress.time_left(30, 0) == progress.time_left(30, 1) == ""
    assert progress.time_left(2.9, 0.5) == "" != progress.time_left(3, 0.5)
    # A thousandth says nothing of the rest: it would be "about 1:06:36 left".
    assert progress.time_left(4, 0.001) == "" and progress.time_left(4, 0.02) == "about 3:16 left"
    pace = progress._Pace(100.0)
    assert pace.left(100.0, 50, 100) == "" and pace.left(104.0, 50, 100) == ""  # what an earlier run did is no pace
    assert pace.left(110.0, 60, 100) == "about 0:40 left" != progress.time_left(10, 0.6)
    clock = iter([0.0, 0.5, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.shown(False) as say:
        say(0, 4, "first")
        say(1, 4, "second")
    assert capsys.readouterr().err.splitlines() == ["  0% first", " 25% second (about 1:30 left)"]
