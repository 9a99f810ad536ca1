# SPDX-License-Identifier: Apache-2.0
"""Claims: what may be said, how it is stored, and which run decides."""

import json
import sys
import types
from dataclasses import replace

import pytest

from manyheads import catalog, claims
from manyheads.claims import Claim, Figure, Outcome, Result, Setting
from manyheads.cli import main
from manyheads.errors import UserError

FIGURE = Figure("loss at half the cache", 2.5, 64, 2.4, 2.6, "nats")


def measure(setting: Setting) -> Outcome:
    setting.progress("measuring", 0.5)
    return Outcome("holds", f"{len(setting.seeds)} seeds agree", (FIGURE,))


CLAIM = Claim("hashevict", "It keeps the loss [at half] the cache.", "30-70 % (Llama-3-8B)", measure)


def result(**changes) -> Result:
    base = Result(
        device="cpu",
        quick=False,
        verdict="holds",
        reason="measured",
        figures=(FIGURE,),
        seeds=(0, 1, 2),
        seconds=1.5,
        date="2026-01-02T00:00:00+00:00",
        command="manyheads claims run hashevict",
        environment={"cpu": "some", "cores": 2, "gpu": None},
    )
    return replace(base, **changes)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of claims with one in it, that of hashevict."""
    (tmp_path / "hashevict.py").touch()
    module = types.ModuleType("manyheads.claims.hashevict")
    module.claim = CLAIM
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(claims, "FOLDER", tmp_path)
    return tmp_path


def test_outcome_refuses_other_verdicts_and_empty_hands():
    with pytest.raises(ValueError, match="none of holds"):
        Outcome("works", "because", (FIGURE,))
    with pytest.raises(ValueError, match="needs figures"):
        Outcome("holds", "because", ())
    assert Outcome("not testable here", "needs a robot", ()).figures == ()


def test_figure_reads_well():
    assert str(FIGURE) == "loss at half the cache 2.5 nats [2.4, 2.6], n=64"
    assert str(Figure("recall", 0.25, 8)) == "recall 0.25, n=8"


def test_store_and_read_back(home):
    assert claims.stored("hashevict") is None
    path = claims.store(CLAIM, result())
    assert path == home / "hashevict.json" and claims.stored("hashevict").results == (result(),)
    assert [file.name for file in home.iterdir() if file.suffix != ".py"] == ["hashevict.json"]  # no draft is left


def test_a_run_replaces_its_like_and_keeps_the_others(home):
    for one in (result(), result(quick=True), result(device="cuda"), result(seconds=9.0)):
        claims.store(CLAIM, one)
    stored = claims.stored("hashevict").results
    assert [(r.device, r.quick, r.seconds) for r in stored] == [
        ("cpu", False, 9.0),
        ("cpu", True, 1.5),
        ("cuda", False, 1.5),
    ]


def test_a_quick_run_never_outvotes_a_full_one(home):
    claims.store(CLAIM, result(quick=True, verdict="not testable here"))
    assert claims.stored("hashevict").verdict == "not testable here"
    claims.store(CLAIM, result(verdict="does not hold here"))
    claims.store(CLAIM, result(quick=True, verdict="holds", date="2030-01-01T00:00:00+00:00"))
    assert claims.stored("hashevict").verdict == "does not hold here"
    claims.store(CLAIM, result(device="cuda", verdict="holds", date="2030-01-01T00:00:00+00:00"))
    assert claims.stored("hashevict").verdict == "holds"  # the newest full run


@pytest.mark.parametrize("numbers", [(float("nan"),), (float("inf"),), (1.0, 3, float("nan"), 2.0)])
def test_a_figure_must_be_finite(numbers):
    value, *rest = numbers
    with pytest.raises(ValueError, match="'loss' is not finite"):
        Figure("loss", value, *(rest or [1]))


def test_a_failed_write_leaves_the_old_record(home, monkeypatch):
    claims.store(CLAIM, result())
    before = (home / "hashevict.json").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("manyheads.files.os.fsync", full)
    with pytest.raises(UserError, match="could not be stored: No space left"):
        claims.store(CLAIM, result(seconds=2.0))
    assert (home / "hashevict.json").read_bytes() == before and len(list(home.iterdir())) == 2


@pytest.mark.parametrize("text", ["{", "[]", '{"slug": "hashevict"}', '{"results": [{"device": "cpu"}]}'])
def test_a_damaged_record_is_named(home, text):
    (home / "hashevict.json").write_text(text)
    with pytest.raises(UserError, match=r"hashevict\.json is not a claim record"):
        claims.stored("hashevict")


def test_run_measures_and_describes(home):
    said = []
    found = claims.run("hashevict", Setting(quick=True, progress=lambda message, done: said.append((message, done))))
    assert said == [("measuring", 0.5)] and found.reason == "1 seeds agree" and found.figures == (FIGURE,)
    assert found.command == "manyheads claims run hashevict --quick" and found.seeds == (0,)
    assert {"cpu", "cores", "python", "torch", "transformers", "manyheads"} <= set(found.environment)
    assert claims.run("hashevict").seeds == (0, 1, 2)


def test_no_claim_and_no_gpu(home, monkeypatch):
    with pytest.raises(UserError, match="claims stand for: hashevict"):
        claims.load("pooling")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        claims.run("hashevict", Setting(device="cuda"))


def test_a_claim_file_must_expose_its_claim(home, monkeypatch):
    monkeypatch.setattr(sys.modules["manyheads.claims.hashevict"], "claim", replace(CLAIM, slug="other"))
    with pytest.raises(TypeError, match="must expose `claim`"):
        claims.load("hashevict")


def test_command_line(home, capsys, monkeypatch):
    def cli(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 0
        return capsys.readouterr().out

    row = json.loads(cli("claims", "--json"))[0]
    assert row["slug"] == "hashevict" and row["verdict"] is None and row["statement"] == CLAIM.statement
    assert "not run yet" in cli("claims")
    assert "holds" in cli("claims", "run", "hashevict", "--quick")
    row = json.loads(cli("claims", "--json"))[0]
    assert {"slug", "statement", "verdict", "figures", "environment", "date"} <= set(row)
    assert row["verdict"] == "holds" and row["quick"] and row["figures"][0]["n"] == 64
    assert "[at half]" in cli("claims") and "n=64" in cli("claims")
    assert json.loads(cli("claims", "run", "hashevict", "--json"))["quick"] is False
    assert "n=64" in cli("show", "hashevict")


@pytest.mark.parametrize("slug", claims.slugs())
def test_claims_of_the_library_are_whole(slug):
    claim = claims.load(slug)
    record = claims.stored(slug)
    assert catalog.get(slug) and claim.statement and claim.paper_figure
    if record:
        assert record.slug == slug and record.statement == claim.statement  # else the stored runs checked another claim
