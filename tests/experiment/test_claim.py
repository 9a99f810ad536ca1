# SPDX-License-Identifier: Apache-2.0
"""A claim from its experiment to its stored words."""

import json
from dataclasses import replace

import pytest

from manyheads.errors import UserError
from manyheads.experiment import higher, lower, no_worse
from manyheads.experiment.claim import Claim, ClaimResult, ClaimRun, Reported, read_result, run_claim, store
from oracles.experiment import experiment

CHECKS = (
    lower("loss", "full", than="worse"),
    lower("loss", "worse", than="same"),
    higher("loss", "same", than="full"),
    no_worse("right", "same", than="full", margin=0.5, better="higher"),
)


def claim(**changes):
    given = {
        "slug": "toy", "statement": "It loses [less].", "tier": "scaled", "checks": CHECKS,
        "reported": Reported(value="1.0", setting="theirs", where="Table 1"),
        "experiment": experiment(quick={"samples": 6}, cpu={"samples": 24}),
    }  # fmt: skip
    return Claim(**{**given, **changes})


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_claim(claim(), "cpu", "cpu", tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def full(found, tmp_path_factory):
    """As it is stored."""
    return read_result(store(claim(), found, tmp_path_factory.mktemp("stored"))).runs[0]


def test_figures_are_stored_with_six_digits(found, full):
    for mine, kept in zip(found.checks, full.checks, strict=True):
        assert (kept.check, kept.word) == (mine.check, mine.word)
        assert kept.effect.value == float(f"{mine.effect.value:.6g}")
    assert full.checks[0].effect.value != found.checks[0].effect.value  # which has more of them


def test_a_claim_is_measured_and_judged(full):
    assert [check.word for check in full.checks] == ["holds", "contradicted", "inconclusive", "holds"]
    assert full.line == "scaled: 2 of 4 hold, 1 contradicted, 1 inconclusive"
    assert full.command == "manyheads claims run toy" and full.date and full.seconds > 0 and full.seeds == (0,)
    figures = {(figure["metric"], figure["arm"]): figure for figure in full.figures}
    assert len(figures) == 6 and figures["loss", "worse"]["at"] == {"length": 8}
    assert figures["loss", "worse"]["delta"]["low"] > 0.8 and "delta" not in figures["loss", "full"]
    assert figures["right", "same"]["estimate"]["interval"] == "Wilson, by contexts"


def test_a_proxy_does_not_contradict(full):
    assert replace(full, tier="proxy").line == "proxy: 2 of 4 hold, 1 not shown, 1 inconclusive"


def test_a_quick_run_gives_figures_and_no_word(tmp_path):
    quick = run_claim(claim(), "quick", "cpu", tmp_path)
    assert {check.word for check in quick.checks} == {None} and quick.figures
    assert quick.line == "scaled: quick run of 4 checks, figures only" and quick.command.endswith(" --quick")


def test_a_run_that_goes_nowhere_says_so_before_it_measures(tmp_path):
    for wrong in (lower("loss", "nobody", than="full"), lower("lost", "worse", than="full")):
        with pytest.raises(ValueError, match=r"no arm 'nobody'|names 0 metrics"):
            run_claim(claim(checks=(wrong,)), "cpu", "cpu", tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no check"):
        claim(checks=())
    with pytest.raises(ValueError, match="say the same"):
        claim(checks=CHECKS + CHECKS[:1])


def test_a_report_names_the_figures_that_are_kept(tmp_path):
    found = run_claim(claim(checks=CHECKS[:1], report=("experiment.loss",)), "quick", "cpu", tmp_path)
    assert {figure["metric"] for figure in found.figures} == {"loss"}


def test_runs_are_stored_side_by_side_and_read_back(full, tmp_path):
    quick = replace(full, size="quick", date="2099-01-01")
    for run in (full, quick, replace(full, seconds=9.0)):
        path = store(claim(), run, tmp_path)
    assert path == tmp_path / "toy.cpu.json" and [file.name for file in tmp_path.iterdir()] == ["toy.cpu.json"]
    found = read_result(path)
    assert found == ClaimResult(slug="toy", statement="It loses [less].", runs=(replace(full, seconds=9.0), quick))
    assert found.deciding.size == "cpu" and found.line == full.line
    data = json.loads(path.read_text())
    assert data["reported"] == {"value": "1.0", "setting": "theirs", "where": "Table 1"}
    assert data["runs"][0]["checks"][1]["shown"] == "contradicted" and data["line"] == full.line
    assert read_result(tmp_path / "none.json") is None and ClaimResult(slug="x", statement="").line == "not run yet"


def test_an_interval_without_bounds_is_stored(full, tmp_path):
    check = full.checks[0]
    endless = replace(check, effect=replace(check.effect, low=float("-inf"), high=float("inf")))
    path = store(claim(), replace(full, checks=(endless,)), tmp_path)
    assert read_result(path).runs[0].checks == (endless,)


def test_a_retraction_stays_and_counts_as_long_as_the_word_is_said(full, tmp_path):
    entry = {"check": full.checks[0].check, "word": "holds", "reason": "a fault in the metric", "date": "2026-01-01"}
    path = store(claim(), replace(full, retracted=(entry,)), tmp_path)
    assert read_result(path).line == "scaled: 1 of 4 hold, 1 contradicted, 1 inconclusive, 1 retracted"
    store(claim(), replace(full, date="2099-01-01"), tmp_path)
    again = read_result(path)
    assert again.runs[0].retracted == (entry,) and again.line.endswith("1 retracted")
    other = (replace(full.checks[0], word="inconclusive"), *full.checks[1:])
    store(claim(), replace(full, checks=other), tmp_path)
    assert read_result(path).runs[0].retracted == (entry,)  # not erased
    assert read_result(path).line == "scaled: 1 of 4 hold, 1 contradicted, 2 inconclusive"


def test_a_run_of_before_claims_were_data_stands_behind_a_new_one(full, tmp_path):
    """Results of then carry a verdict in prose and no checks."""
    old = replace(full, size="quick", tier="proxy", checks=(), legacy={"verdict": "holds", "reason": "It loses less."})
    path = store(claim(), old, tmp_path)
    assert read_result(path).line == old.line == "proxy: holds (before claims were data)"
    both = read_result(store(claim(), full, tmp_path))
    assert len(both.runs) == 2 and both.deciding == full and both.runs[1].legacy == old.legacy
    assert ClaimResult(slug="toy", statement="", runs=(old, replace(old, legacy=None, date=""))).deciding.legacy is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 1}', '{"format": 2, "slug": "x", "statement": "", "runs": [{}]}']
)
def test_a_damaged_file_is_said_to_be_one(tmp_path, text):
    path = tmp_path / "toy.cpu.json"
    path.write_text(text)
    with pytest.raises(UserError, match="is no result of a claim"):
        read_result(path)


def test_a_folder_that_cannot_be_written_to_is_said_to_be_one(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be stored"):
        store(claim(), ClaimRun(size="cpu", device="cpu", tier="scaled"), tmp_path / "file")
