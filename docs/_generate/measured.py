# SPDX-License-Identifier: Apache-2.0
"""Figures for pages, read from JSON files of results: no page states a measured figure that it does not take from here.

In a page, ``{{ figure("benchmarks/pab.json", "cpu", "overhead", "calls") }}`` is one figure. A path into a file is a
sequence of keys; a dict among them picks the one entry of a list whose fields are as given. ``table`` and ``pivot``
make tables of rows, ``machine`` says what a file was measured on and when, ``claim_lines`` what stored runs of all
claims say.

    python docs/_generate/measured.py README.md    # writes the block of measured costs again
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(<!-- measured -->\n).*?(<!-- /measured -->)", re.DOTALL)
COSTS = ROOT / "docs" / "_generate" / "costs.md"  # what README and the page of costs say


@cache
def _read(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def _pick(rows: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> Any:
    found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows with {wanted}, one is needed")
    return found[0]


def value(path: str, *keys: Any) -> Any:
    """What stands in a file at a path of keys.

    Raises:
        LookupError: nothing does, or several entries are as a dict asks.
    """
    node = _read(path)
    for key in keys:
        node = _pick(node, key) if isinstance(key, Mapping) else node[key]
    return node


def number(x: Any, digits: int = 3) -> str:
    """A value as pages write it: significant digits, thousands apart, a dash where there is none."""
    if x is None or isinstance(x, str):
        return x or "–"
    if isinstance(x, bool):
        return "yes" if x else "no"
    if isinstance(x, int) or abs(x) >= 10**digits:
        return f"{round(x):,}"
    text = f"{x:.{digits}g}"
    return f"{x:.{digits}f}" if "e" in text else text


def figure(path: str, *keys: Any, scale: float = 1, digits: int = 3) -> str:
    """One figure, times ``scale``."""
    found = value(path, *keys)
    return number(found * scale if scale != 1 else found, digits)


def _field(row: Mapping[str, Any], dotted: str) -> Any:
    node: Any = row
    for name in dotted.split("."):
        node = node.get(name) if isinstance(node, Mapping) else None
    return node


def _matching(path: str, keys: Sequence[Any], where: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Rows whose fields are as given; a list of values means any of them."""
    rows = [
        row
        for row in value(path, *keys)
        if all(_field(row, name) in (v if isinstance(v, list) else [v]) for name, v in where.items())
    ]
    if not rows:
        raise LookupError(f"{path} has no row with {where}")
    return rows


def _grid(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table(path: str, *keys: Any, columns: Mapping[str, str], where: Mapping[str, Any] | None = None) -> str:
    """Rows of a file: ``columns`` gives headings by field, whose name may be dotted."""
    rows = _matching(path, keys, where or {})
    return _grid(list(columns.values()), [[number(_field(row, name)) for name in columns] for row in rows])


def pivot(
    path: str, *keys: Any, rows: Mapping[str, str], across: str, cell: str, where: Mapping[str, Any] | None = None,
    scale: float = 1,
) -> str:  # fmt: skip
    """One field of many rows: a line for each combination of the fields ``rows``, a column for each of ``across``."""
    found = _matching(path, keys, where or {})
    heads = list(dict.fromkeys(row[across] for row in found))
    cells = {(tuple(row.get(name) for name in rows), row[across]): _field(row, cell) for row in found}
    body = [
        [*map(number, line), *(number(None if (x := cells.get((line, h))) is None else x * scale) for h in heads)]
        for line in dict.fromkeys(line for line, _ in cells)
    ]
    return _grid([*rows.values(), *map(str, heads)], body)


def claim_lines(path: str) -> str:
    """What the deciding run of each claim says on each device and subject: the summary that the package has."""
    body = [
        [f"[{slug}](strategies/{slug.partition('.')[0]}.md)", on, line["line"], line["date"][:10]]
        for slug, lines in value(path).items()
        for on, line in lines.items()
    ]
    return _grid(["claim", "measured on", "checks", "date"], body)


def machine(path: str, *keys: Any, date: Sequence[Any] = ("date",)) -> str:
    """What a file was measured on, in words, and when."""
    found = value(path, *(keys or ("environment",)))
    processor = found["gpu"] or f"{found['cores']} cores of {found['cpu']}"
    versions = [f"{name} {found[name]}" for name in ("torch", "transformers", "triton") if found.get(name)]
    return f"{processor}, {', '.join(versions)}, {value(path, *date)}"


def render(text: str, **more: Any) -> str:
    """A page with its figures put in.

    Raises:
        LookupError, jinja2.TemplateError: a figure that is not there.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    names = {"figure": figure, "table": table, "pivot": pivot, "machine": machine, "claim_lines": claim_lines}
    return environment.from_string(text).render(**names, **more)


def with_costs(text: str) -> str:
    """``text`` with its block of measured costs made anew."""
    block = render(COSTS.read_text(encoding="utf-8"))
    return BLOCK.sub(lambda found: found[1] + block + found[2], text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(with_costs(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
