# SPDX-License-Identifier: Apache-2.0
"""The catalogue: its rows are whole, its search finds, and the state of a paper follows from files."""

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import manyheads
from manyheads import catalog
from manyheads.errors import UserError

ROWS = [*catalog.papers(), *catalog.baselines()]


def test_all_papers_are_there():
    assert [paper.id for paper in catalog.papers()] == list(range(1, 120))
    assert {row.slug for row in catalog.baselines()} == {
        "full", "random", "streaming_llm", "snapkv", "keydiff", "knorm", "h2o", "tova", "lagkv", "pyramidkv", "adakv",
        "expected_attention", "hedge", "kivi", "quarot", "kvzip", "fp8",
        "finch", "think", "triattention", "attention_matching", "kvzap", "fastkvzip", "sampling", "green_list",
        "block_diffusion", "vcd", "pai", "structured_pruning", "int4", "kv_merging", "low_rank", "weight_sharing",
        "softmax", "ablate", "head_statistics", "head_temperature", "logit_bias", "token_maps", "tome", "token_pool",
        "slimcode", "fastv", "feature_pool", "silero_vad", "naive_forecast", "tabular_forecast", "tabular_classes",
        "text_match", "peptide_counts", "turn_classes", "wait_k",
    }  # fmt: skip
    assert all(row.baseline for row in catalog.baselines())
    assert len(set(catalog.names())) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.slug)
def test_row_is_whole(row):
    assert row.slug.isidentifier() and row.slug == row.slug.lower()
    assert all(part.isidentifier() for part in row.category.split("/"))
    assert row.title == row.title.strip() != ""
    assert 20 <= len(row.summary) <= 140 and "\n" not in row.summary and not row.summary.endswith(".")
    assert 2 <= len(row.tags) <= 6 and all(tag == tag.strip().lower() for tag in row.tags)
    assert row.training in ("none", "calibration", "required")
    assert row.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", row.arxiv)
    assert row.state in catalog.STATES
    assert json.loads(json.dumps(row.row()))["slug"] == row.slug


def test_no_two_papers_share_an_arxiv_id_or_summary():
    ids = [row.arxiv for row in ROWS if row.arxiv]
    assert len(ids) == len(set(ids)) and len({row.summary for row in ROWS}) == len(ROWS)


def test_get_answers_a_wrong_name_with_the_nearest():
    assert catalog.get("hashevict").id == 24
    with pytest.raises(UserError, match="did you mean hashevict"):
        catalog.get("hashevct")
    with pytest.raises(UserError, match="snapkv"):
        catalog.get("SnapKV")
    with pytest.raises(UserError, match="manyheads list"):
        catalog.get("zzzzzzzz")
    assert catalog.nearest("kv")[0] in catalog.names() and catalog.nearest("") == []


def test_load_gives_the_one_strategy_of_a_file():
    from manyheads.strategy import Strategy

    strategy = catalog.load("hashevict")
    assert issubclass(strategy, Strategy) and strategy.__module__ == "manyheads.caches.hashevict"


def test_load_refuses_what_does_not_stand(tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path)  # nothing stands there
    assert catalog.get("hashevict").state == "planned"
    with pytest.raises(UserError, match="no strategy yet"):
        catalog.load("hashevict")


def ranks(words: str) -> list[str]:
    return [paper.slug for paper, _ in catalog.find(words, limit=len(ROWS))]


PART = """
from dataclasses import dataclass
from manyheads.strategy import Residual

@dataclass(frozen=True, kw_only=True)
class {name}(Residual):
    gain: float = 1.0

    def residual(self, site, hidden, memory):
        return hidden
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A paper whose strategies are the modules of a folder; ``made(first=..., ...)`` writes them."""

    def made(shown=None, **parts):
        place = tmp_path / "lenses" / "safety_heads"
        place.mkdir(parents=True)
        names = {part: part.title().replace("_", "") for part in parts}
        for part, name in names.items():
            (place / f"{part}.py").write_text(PART.format(name=name))
        lines = [f"from .{part} import {name}" for part, name in names.items()]
        (place / "__init__.py").write_text("\n".join([*lines, f"__all__ = {shown or sorted(names.values())}"]))

    import manyheads.lenses

    own = [name for name in sys.modules if name.startswith("manyheads.lenses.safety_heads")]
    kept = {name: sys.modules.pop(name) for name in own}
    monkeypatch.setattr(catalog, "PACKAGE", tmp_path)
    monkeypatch.setattr(manyheads.lenses, "__path__", [str(tmp_path / "lenses")])
    yield made
    for name in [name for name in sys.modules if name.startswith("manyheads.lenses.safety_heads")]:
        del sys.modules[name]
    sys.modules.update(kept)


def test_a_paper_of_several_strategies(folder):
    folder(rdsha=1, ahd=1)
    assert list(catalog.strategies("safety_heads")) == ["safety_heads.rdsha", "safety_heads.ahd"]
    assert catalog.load("safety_heads.ahd").__name__ == "Ahd" and catalog.get("safety_heads.ahd").slug == "safety_heads"
    assert manyheads.parse("safety_heads.ahd:gain=2.0").spec == "safety_heads.ahd:gain=2.0"
    for wrong in ("safety_heads", "safety_heads.adh"):
        with pytest.raises(UserError, match=f"{wrong} names no strategy; .* safety_heads.ahd, safety_heads.rdsha"):
            catalog.load(wrong)


def test_the_main_strategy_of_a_folder(folder):
    folder(safety_heads=1, ahd=1)
    assert (
        catalog.load("safety_heads").__name__ == "SafetyHeads" and catalog.load("safety_heads").slug == "safety_heads"
    )
    assert catalog.state_in(catalog.PACKAGE, "lenses", "safety_heads") == "strategy"


def test_the_only_strategy_of_a_folder(folder):
    folder(ahd=1)
    assert catalog.load("safety_heads") is catalog.load("safety_heads.ahd")


def test_a_folder_that_shows_no_strategy(folder):
    folder(shown=["nothing"], ahd=1)
    with pytest.raises(TypeError, match="must show strategies"):
        catalog.load("safety_heads")


def test_find_the_sentence_of_a_user():
    assert "hashevict" in ranks("shrink the cache without training")[:3]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("hallucination in vision language models", {"conscious_gaze", "concentric_attention"}),
        ("KV-cache quantization", {"fireq", "hcattention"}),
        ("attention sinks", {"active_dormant", "streaming_llm"}),
        ("diffusion guidance", {"sag", "headhunter"}),
        ("HashEvict", {"hashevict"}),
        ("prune heads", {"amp"}),
        ("pruning of head", {"amp"}),
        ("minitron", {"minitron"}),
    ],
)
def test_find_ranks_the_obvious_first(words, expected):
    assert expected <= set(ranks(words)[: len(expected) + 2])


def test_find_scores_fall_and_the_limit_holds():
    found = catalog.find("kv cache", limit=4)
    scores = [score for _, score in found]
    assert len(found) == 4 and scores == sorted(scores, reverse=True) and scores[-1] > 0


@pytest.mark.parametrize("words", ["", "   ", '"', "* OR *", "OR(zq, zx", "slug:", "-- ;", "xyzzyplugh"])
def test_find_nothing(words):
    assert catalog.find(words) == []


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_find_takes_any_text(words):
    assert all(paper in ROWS for paper, _ in catalog.find(words))


def touch(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def result(*sizes: str, line: str = "proxy: 1 of 1 hold", legacy: object = None) -> str:
    runs = [{"size": size, "date": f"2026-01-0{i + 1}", "legacy": legacy} for i, size in enumerate(sizes)]
    return json.dumps({"line": line, "runs": runs})


def test_state_follows_the_files(tmp_path, monkeypatch):
    package = tmp_path / "src" / "manyheads"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def state() -> str:
        return catalog.state_in(package, "domains/vision", "foo")

    assert state() == "planned"
    touch(package / "domains/vision/foo.py")
    assert state() == "strategy"  # installed: there are no tests to look for
    touch(tmp_path / "pyproject.toml")
    touch(tmp_path / "tests/test_bar.py")
    assert state() == "untested"
    touch(tmp_path / "tests/elsewhere/test_foo.py")
    assert state() == "strategy"
    touch(package / "claims/foo.py")
    assert state() == "claim" and catalog.checks_in(package, "foo") == {}
    results = catalog.results_folder(package)
    assert results == tmp_path / "home/.local/share/manyheads/claims"  # no checkout: nothing goes into the package
    touch(results / "foo.cpu.json", result("quick", line="proxy: quick run of 1 checks, figures only"))
    assert state() == "claim"  # figures, and no word
    touch(results / "foo.cpu.json", result("cpu", legacy={"verdict": "holds"}))
    assert state() == "claim"
    touch(results / "foo.cpu.json", result("quick", "cpu"))
    assert state() == "checked"
    assert catalog.checks_in(package, "foo") == {
        "cpu": {"line": "proxy: 1 of 1 hold", "date": "2026-01-02", "full": True}
    }
    (package / "domains/vision/foo.py").unlink()
    assert state() == "planned"


def test_checks_of_a_checkout_and_of_a_package(tmp_path, monkeypatch):
    """Results of one's own come first; without any the package says what stood when it was made."""
    package = tmp_path / "src" / "manyheads"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    touch(tmp_path / "pyproject.toml")
    touch(tmp_path / ".git")
    packed = {device: {"line": f"packed {device}", "date": "2025-01-01", "full": True} for device in ("cpu", "cuda")}
    touch(package / "claims/summary.json", json.dumps({"foo": packed}))
    assert catalog.checks_in(package, "foo") == packed and catalog.checks_in(package, "bar") == {}
    results = tmp_path / "results/claims"
    assert catalog.results_folder(package) == results
    touch(results / "foo.cuda.json", result("cuda", line="mine"))
    assert [found["line"] for found in catalog.checks_in(package, "foo").values()] == ["packed cpu", "mine"]
    monkeypatch.setattr(catalog, "PACKAGE", package)
    assert catalog.get("hashevict").checks == ""
    for damaged in ("{", "[]", '{"runs": 3}', '{"runs": [{}]}'):
        touch(results / "foo.cuda.json", damaged)
        with pytest.raises(UserError, match=r"foo\.cuda\.json is no result of a claim"):
            catalog.checks_in(package, "foo")


def test_claims_of_a_paper_and_of_its_parts(tmp_path, monkeypatch):
    """Both are shown with the paper; a part's results are not the paper's own."""
    package = tmp_path / "src" / "manyheads"
    for place in ("pyproject.toml", ".git", "src/manyheads/caches/hashevict.py", "tests/test_hashevict.py"):
        touch(tmp_path / place)
    results, home = tmp_path / "results/claims", package / "claims/hashevict"
    touch(home / "__init__.py")
    assert catalog.state_in(package, "caches", "hashevict") == "claim"
    touch(results / "hashevict.cpu.json", result("cpu", line="own"))
    touch(results / "hashevict.part.cuda.json", result("cuda", line="of the part"))
    monkeypatch.setattr(catalog, "PACKAGE", package)
    assert catalog.get("hashevict").checks == "own (cpu)"  # control: there is no such part
    touch(home / "part.py")
    assert catalog.get("hashevict").checks == "own (cpu); of the part (part, cuda)"
    assert set(catalog.checks_in(package, "hashevict")) == {"cpu"}


@pytest.mark.parametrize("words", ["vllm", "needle in a haystack", "my GPU runs out of memory"])
def test_what_people_say_finds_caches(words: str) -> None:
    found = [paper for paper, _ in catalog.find(words)]
    assert found and sum(paper.category == "caches" for paper in found) >= len(found) / 2
