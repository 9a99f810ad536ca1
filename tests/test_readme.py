# SPDX-License-Identifier: Apache-2.0
"""The README says what is true: its links, commands, counts and figures; and it stays short."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import typer.testing

from manyheads import catalog

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
spec = importlib.util.spec_from_file_location("docs_measured", ROOT / "docs" / "_generate" / "measured.py")
measured = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measured)


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def commands(text: str) -> list[list[str]]:
    """Commands of the program, in blocks and in tables, as their words."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(manyheads [^`]+)`", text)
    return [shlex.split(line, comments=True)[1:] for line in lines if re.match(r"(\.venv/bin/)?manyheads ", line)]


def unknown_options(words: list[str]) -> list[str]:
    """Options of a command that its help does not name; a slug or a verb that does not exist is unknown too."""
    from manyheads.cli import app

    verb = words[:2] if words[0] == "claims" and len(words) > 1 else words[:1]
    shown = typer.testing.CliRunner().invoke(app, [*verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    if shown.exit_code:
        return verb
    known = set(re.findall(r"--[\w-]+", re.sub(r"\x1b\[[\d;]*m", "", shown.output)))
    return [word for word in words if word.startswith("--") and word not in known]


@pytest.mark.parametrize("words", commands(README), ids=" ".join)
def test_commands_exist(words):
    assert unknown_options(words) == []
    for given in re.findall(r"--strateg\w+ (\S+)", shlex.join(words).replace("'", "")):
        for slug in re.findall(r"(?:^|,)([a-z]\w*)(?=[:,]|$)", given):
            assert slug == "auto" or catalog.get(slug)


def test_wrong_commands_are_found():
    assert unknown_options(["compare", "--strategy", "snapkv"]) == ["--strategy"]
    assert unknown_options(["probe"]) == ["probe"]


def test_the_commands_of_ci_are_those_of_the_readme():
    """A fresh clone is checked by these: install and run the main job, install and pass the tests."""
    blocks = re.findall(r"```sh\n(python3 -m venv .*?)```", README, re.DOTALL)
    assert [block.splitlines() for block in blocks] == [
        ["python3 -m venv .venv && .venv/bin/pip install -c constraints.txt .", ".venv/bin/manyheads compare"],
        [
            'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[test]"',
            '.venv/bin/pytest -n 2 -m "not gpu and not slow"',
        ],
    ]


def test_counts_are_those_of_the_catalogue():
    counted = {
        name: (int(done), int(every)) for name, done, every in re.findall(r"\*\*(\w+)\*\* (\d+) of (\d+)", README)
    }
    found: dict[str, list[bool]] = {}
    for row in catalog.papers():
        found.setdefault(row.category.split("/")[0], []).append(row.state != "planned")
    assert counted == {name: (sum(done), len(done)) for name, done in found.items()}
    assert set(re.findall(r"(\d+) papers", README)) == {str(len(catalog.papers()))}


def test_costs_are_those_of_the_results():
    """After a benchmark: `python docs/_generate/measured.py README.md`."""
    assert measured.with_costs(README) == README
    block = measured.BLOCK.search(README)
    figure = re.search(r"[\d.]+ ms a token", block[0])
    assert measured.with_costs(README.replace(figure[0], "1 ms a token")) == README
