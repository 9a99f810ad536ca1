# SPDX-License-Identifier: Apache-2.0
"""The site: its figures come from results, its pages from the catalogue, its notebooks are kept without outputs."""

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from manyheads import catalog, claims

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
MEASURED = re.compile(
    r"\d ?(?:ms|µs|us|s|dB|[KMG]iB|[MGT]B/s|nats|tokens/s|seconds|microseconds)(?![\w/])"
    r"|\d ?(?:x|times) (?:as fast|faster|slower|smaller)",
)


def generator(name: str):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / "_generate" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


measured, pages = generator("measured"), generator("pages")


def typed_figures(text: str) -> list[str]:
    """Lines that state a measurement outside code and outside what is generated."""
    prose = re.sub(r"<!-- measured -->.*?<!-- /measured -->|```.*?```|\{\{.*?\}\}|`[^`\n]*`", "", text, flags=re.DOTALL)
    return [line for line in prose.splitlines() if MEASURED.search(line)]


@pytest.mark.parametrize("path", [*PAGES, ROOT / "README.md"], ids=lambda path: path.name)
def test_no_measurement_is_typed(path):
    assert typed_figures(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("line", ["takes 5.3 ms", "at 30 GB/s", "1.4 times as fast", "loses 0.2 nats", "in 4 s."])
def test_a_typed_measurement_is_found(line):
    assert typed_figures(f"It {line}\n")
    assert not typed_figures(f"It `{line}`\n\n{{{{ {line} }}}}\n\n<!-- measured -->\n{line}\n<!-- /measured -->\n")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_figures_are_found(path):
    text = measured.render(path.read_text(encoding="utf-8"), costs="")
    assert "{{" not in text


def test_a_figure_that_is_not_there_stops_the_site():
    with pytest.raises(LookupError):
        measured.figure("benchmarks/pab.json", "cpu", "rows", {"way": "ours"}, "seconds")  # two rows are so
    with pytest.raises(LookupError):
        measured.table("benchmarks/pab.json", "cpu", "rows", columns={"way": "way"}, where={"way": "nothing"})
    with pytest.raises(LookupError):
        measured.figure("benchmarks/pab.json", "gpu")


def test_figures_are_those_of_the_file():
    rows = json.loads((ROOT / "benchmarks" / "decode.json").read_text())["rows"]
    (row,) = [r for r in rows if (r["batch"], r["keys"], r["attention"]) == (8, 32768, "int4")]
    keys = ("benchmarks/decode.json", "rows", {"batch": 8, "keys": 32768, "attention": "int4"}, "us")
    assert float(measured.figure(*keys, digits=6)) == pytest.approx(row["us"], rel=1e-5)
    assert [measured.number(x) for x in (0.00012345, 1.0, 12.345, 98765.4, None)] == [
        "0.000123", "1", "12.3", "98,765", "–",
    ]  # fmt: skip


def test_every_stored_claim_has_its_line_on_the_page():
    lines = measured.claim_lines("src/manyheads/claims/summary.json").splitlines()[2:]
    stored = [(slug, on, run["line"]) for slug, runs in claims.summary().items() for on, run in runs.items()]
    assert [tuple(line.split(" | ")[1:3]) for line in lines] == [(on, said) for _, on, said in stored]
    assert all(f"[{slug}](" in line for line, (slug, _, _) in zip(lines, stored, strict=True))
    assert {"cpu", "cpu, gemma3-270m"} <= {on for _, on, _ in stored}
    with pytest.raises(TypeError):
        measured.claim_lines("benchmarks/pab.json")  # no summary


def test_a_retracted_word_says_why_on_its_page():
    retracted = [
        (slug, run) for slug in claims.slugs() for one in claims.stored(slug) for run in one.runs if run.retracted
    ]
    assert retracted  # the test looks at something
    for slug, run in retracted:
        assert all(entry["reason"] in pages.claim_section(slug) for entry in run.retracted)
    assert "Retracted" not in pages.claim_section("d2o")  # control


def test_every_strategy_has_its_page():
    made = dict(pages.pages())
    for row in [*catalog.papers(), *catalog.baselines()]:
        path = f"strategies/{row.slug}.md"
        assert (path in made) == (row.state != "planned")
        assert f"`{row.slug}`" in made["strategies/index.md"]
        assert f"`{row.slug}`" in made[f"categories/{row.category.split('/')[0]}.md"]
        if path in made:
            for cls in catalog.strategies(row.slug).values():
                assert all(f"| `{field.name}` |" in made[path] for field in dataclasses.fields(cls))


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+\.md", navigation))
    written = {path.name for path in PAGES} | {f"notebooks/{path.stem}.md" for path in NOTEBOOKS}
    overviews = {path for path, _ in pages.pages() if path.startswith(("categories/", "strategies/index"))}
    assert named == written | overviews


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    for cell in code:
        compile("".join(cell["source"]), path.name, "exec")
