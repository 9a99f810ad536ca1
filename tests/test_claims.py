# SPDX-License-Identifier: Apache-2.0
"""Claims from the command line: several at once, what is stored, what is said, and what the package carries."""

import json
import sys
import types
from dataclasses import replace

import pytest

from manyheads import catalog, claims
from manyheads.cli import main
from manyheads.errors import UserError
from manyheads.experiment import higher, lower, subjects
from manyheads.experiment.claim import Claim, Reported, run_claim, store
from manyheads.report import claims as report
from manyheads.report.page import render
from oracles.experiment import Draws, Nothing, experiment

SIZES = {"quick": {"samples": 6}, "cpu": {"samples": 24}}


class Other(Nothing):
    name = "other"


def claim(slug, *tasks):
    return Claim(
        slug=slug, statement="It loses [less].", tier="scaled", experiment=experiment(*tasks, **SIZES),
        reported=Reported(value="1.0", setting="theirs", where="Table 1"),
        checks=(
            lower("loss", "full", than="worse"), lower("loss", "worse", than="same"),
            higher("loss", "same", than="full"),
        ),
    )  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Claims of two papers, one of which fails when it is run, in a folder of their own."""
    place = tmp_path / "claims"
    place.mkdir()
    for slug, made in {"hashevict": claim("hashevict"), "pab": claim("pab", Draws(fails=1))}.items():
        (place / f"{slug}.py").touch()
        module = types.ModuleType(f"manyheads.claims.{slug}")
        module.claim = made
        monkeypatch.setitem(sys.modules, module.__name__, module)
    results = tmp_path / "results"
    monkeypatch.setattr(claims, "_FOLDER", place)
    monkeypatch.setattr(claims, "SUMMARY", place / "summary.json")
    known = catalog.checks_in
    monkeypatch.setattr(catalog, "checks_in", lambda package, slug: known(tmp_path, slug))  # nothing is packed there
    for module in (claims, catalog):
        monkeypatch.setattr(module, "results_folder", lambda package=None: results)
    monkeypatch.chdir(tmp_path)
    return results


@pytest.fixture
def cli(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        out, err = capsys.readouterr()
        return stop.value.code, out, err

    return run


def test_one_claim(home, cli, tmp_path):
    code, out, err = cli("claims", "run", "hashevict")
    assert code == 0 and "scaled: 1 of 3 hold, 1 contradicted, 1 inconclusive" in out and "[less]" in out, err
    assert (
        "bootstrap over contexts" in out and str(home) in out and (tmp_path / "manyheads-claims/claims.html").exists()
    )
    assert [path.name for path in home.iterdir()] == ["hashevict.cpu.json"]
    assert (tmp_path / "manyheads-claims" / "hashevict.cpu.cpu" / "run.json").exists()
    (found,) = claims.stored("hashevict")
    assert [check.word for check in found.deciding.checks] == ["holds", "contradicted", "inconclusive"]
    code, out, _ = cli("show", "hashevict")
    assert code == 0 and found.line in out and "contradicted" in out and "checked" in out
    row = json.loads(cli("show", "hashevict", "--json")[1])
    assert row["checks"] == f"{found.line} (cpu)" and row["claim"][0]["runs"][0]["checks"][0]["word"] == "holds"


def test_another_subject_has_a_result_of_its_own(home, cli, tmp_path, monkeypatch):
    assert cli("claims", "run", "hashevict", "--json")[0] == 0
    given = str(tmp_path / "other")
    monkeypatch.setattr(subjects, "subject", lambda one: Other() if one == given else one)
    code, out, err = cli("claims", "run", "hashevict", "--model", given, "--json")
    assert code == 0, err
    assert json.loads(out)[0]["run"]["command"].endswith(f"--model {given}")
    assert sorted(path.name for path in home.iterdir()) == ["hashevict.cpu.json", "hashevict.cpu.other.json"]
    runs = [tmp_path / "manyheads-claims" / f"hashevict.cpu.cpu{name}" / "run.json" for name in ("", ".other")]
    assert ['"name": "other"' in run.read_text() for run in runs] == [False, True]
    own, other = claims.stored("hashevict")
    assert (own.deciding.measured, other.deciding.measured) == ("cpu", "cpu, other")
    assert catalog.get("hashevict").checks == f"{own.line} (cpu); {other.line} (cpu, other)"
    assert set(claims.summary()["hashevict"]) == {"cpu", "cpu, other"} and "cpu, other" in cli("claims")[1]


def test_a_subject_of_another_kind_is_refused(home, cli):
    code, _, err = cli("claims", "run", "hashevict", "--model", "scenes")
    assert code == 2 and err.splitlines()[-1] == "error: this is measured on a nothing; scenes is a pipeline"


def test_a_quick_run_gives_no_word(home, cli):
    code, out, err = cli("claims", "run", "hashevict", "--quick", "--json")
    (row,) = json.loads(out)
    assert code == 0 and err == "" and row["line"] == "scaled: quick run of 3 checks, figures only"
    assert {check["word"] for check in row["run"]["checks"]} == {None}
    assert catalog.get("hashevict").state == "claim"


def test_one_that_fails_does_not_stop_the_others(home, cli):
    code, out, err = cli("claims", "run", "pab", "hashevict")
    assert code == 2 and "failed: this unit is not for you" in out and "1 of 3 hold" in out
    assert "error: 1 of 2 claims failed: pab" in err and [path.name for path in home.iterdir()] == [
        "hashevict.cpu.json"
    ]
    rows = json.loads(cli("claims", "run", "--all", "--json")[1])
    assert [(row["slug"], bool(row["error"])) for row in rows] == [("hashevict", False), ("pab", True)]
    code, out, err = cli("claims", "run", "pab")
    assert code == 2 and out == "" and err.splitlines()[-1] == "error: this unit is not for you"


def test_a_file_that_is_no_claim_is_one_that_fails(home, cli, monkeypatch):
    monkeypatch.setattr(sys.modules["manyheads.claims.pab"], "claim", claim("other"))
    code, out, err = cli("claims", "run", "--all", "--quick")
    assert code == 1 and "must expose `claim`" in out and "hashevict" in out and "1 of 2 claims failed" in err


def test_a_run_that_was_cut_off_goes_on(home, cli, tmp_path):
    assert cli("claims", "run", "hashevict", "--json")[0] == 0
    (before,) = claims.stored("hashevict")
    units = sorted((tmp_path / "manyheads-claims/hashevict.cpu.cpu/units").iterdir())
    kept = {unit: unit.stat().st_mtime_ns for unit in units[1:]}
    units[0].unlink()
    assert cli("claims", "run", "hashevict", "--workers", "2", "--json")[0] == 0
    assert {unit: unit.stat().st_mtime_ns for unit in kept} == kept and units[0].exists()
    (after,) = claims.stored("hashevict")
    assert after.deciding.checks == before.deciding.checks


def test_the_list(home, cli, tmp_path):
    assert cli("claims")[1].count("not run yet") == 2
    cli("claims", "run", "hashevict", "--quick")
    cli("claims", "run", "hashevict")
    code, out, _ = cli("claims", "list", "--page", "all.html")
    assert code == 0 and "1 of 3 hold" in out and out.count("not run yet") == 1
    page = (tmp_path / "all.html").read_text()
    assert "bootstrap over contexts" in page and "not run yet" in page and "inconclusive" in page
    rows = json.loads(cli("claims", "--json")[1])
    assert [row["slug"] for row in rows] == ["hashevict", "pab"] and len(rows[0]["results"][0]["runs"]) == 2


def test_the_page_shows_words_effects_and_power(home):
    found = run_claim(claim("hashevict"), "cpu", "cpu", home / "run")
    shown = report.Shown(slug="hashevict", statement="<script>", run=found)
    columns = [column.name for column in report.checks(found).columns]
    cells = [[cell.text for cell in row] for row in report.checks(found).cells]
    assert columns == ["check", "word", "effect", "against", "interval", "detectable", "needed"]
    assert [row[1] for row in cells] == ["holds", "contradicted", "inconclusive"]
    assert all(row[4] == "bootstrap over contexts" and row[5] for row in cells) and cells[2][6] and not cells[0][6]
    text = render(report.page([shown], {"command": []}))
    assert "<script" not in text and "&lt;script&gt;" in text and "1 holds" in text
    proxy = [row[1].text for row in report.checks(replace(found, tier="proxy")).rows]
    assert proxy == ["holds", "not shown", "inconclusive"]  # control: the same run of a proxy


def test_the_summary_is_what_the_results_say(home, tmp_path):
    made = claim("hashevict")
    run = run_claim(made, "cpu", "cpu", tmp_path / "run")
    assert claims.summary() == {}
    store(made, run, home)
    store(made, replace(run, device="cuda", size="cuda"), home)
    found = claims.summary()
    assert list(found) == ["hashevict"] and found["hashevict"] == catalog.checks_in(catalog.PACKAGE, "hashevict")
    assert found["hashevict"]["cuda"] == {"line": run.line, "date": run.date, "full": True}


def test_the_package_carries_what_the_results_say():
    """After new results: `manyheads claims summary`."""
    packed = json.loads(claims.SUMMARY.read_text()) if claims.SUMMARY.exists() else {}
    assert packed == claims.summary()


def test_no_claim_and_no_gpu(home, cli, monkeypatch):
    with pytest.raises(UserError, match="there are claims of: hashevict, pab"):
        claims.load("pooling")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, _, err = cli("claims", "run", "hashevict", "--device", "cuda")
    assert code == 2 and "no GPU" in err


def test_results_of_a_damaged_file_are_named(home):
    home.mkdir()
    (home / "hashevict.cpu.json").write_text("{")
    with pytest.raises(UserError, match=r"hashevict\.cpu\.json is no result of a claim"):
        claims.stored("hashevict")
