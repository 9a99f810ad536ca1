# SPDX-License-Identifier: Apache-2.0
"""The verbs ``manyheads list``, ``find`` and ``show``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads import catalog, claims
from manyheads.errors import UserError
from manyheads.report.table import Column, Table, print_table

from .claims import stored_runs
from .options import Json, Slug, console, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manyheads.strategy import Strategy

Category = Annotated[str | None, typer.Option(help="Only this category: caches, mixers, domains/vision, domains ...")]
State = Annotated[str | None, typer.Option(help=f"Only this state: {', '.join(catalog.STATES)}.")]


def list_papers(
    category: Category = None,
    state: State = None,
    as_json: Json = False,
) -> None:
    """List the papers and what stands of each."""
    papers = _select(catalog.papers(), category, state)
    if as_json:
        print_json([paper.row() for paper in papers])
        return
    screen = console(140)
    print_table(_papers(papers, f"{len(papers)} papers"), screen)
    if baselines := _select(catalog.baselines(), category, state):
        print_table(_papers(baselines, f"{len(baselines)} baselines, to measure them against"), screen)


def find(
    words: Annotated[str, typer.Argument(help='What you look for, as "shrink the cache without training".')],
    limit: Annotated[int, typer.Option(min=1, help="The most rows to show.")] = 10,
    as_json: Json = False,
) -> None:
    """Search papers and baselines by words: what can be used first, then what is planned."""
    ranked = catalog.find(words, limit)
    kinds = [[one for one in ranked if (one[0].state == "planned") is planned] for planned in (False, True)]
    found = [one for kind in kinds for one in kind]
    if as_json:
        print_json([{**paper.row(), "score": round(score, 3)} for paper, score in found])
        return
    if not found:
        raise UserError(f"nothing matches {words!r}; try other words, or `manyheads list`")
    for kind, title in zip(kinds, ("best first", "planned: a row and no code yet"), strict=True):
        if kind:
            print_table(_papers([paper for paper, _ in kind], title), console(140))


def show(slug: Slug, as_json: Json = False) -> None:
    """Show one strategy: what it does, its fields, how to write it, and what its claim gave."""
    slug = catalog.RECOMMENDED if slug == "auto" else slug
    paper = catalog.get(slug)
    results = claims.stored(paper.slug)
    row: dict[str, Any] = paper.row() | {
        "doc": None,
        "fields": [],
        "spec": None,
        "claim": [result.plain() for result in results] or None,
    }
    if paper.state != "planned":
        named = catalog.strategies(slug) if slug == paper.slug else {slug: catalog.load(slug)}
        parts = [_strategy_row(name, strategy) for name, strategy in named.items()]
        row |= parts[0] if len(parts) == 1 else {"parts": parts}
    if as_json:
        print_json(row)
        return
    screen = console(140)
    number = "baseline" if paper.baseline else f"paper {paper.id}"
    screen.print(f"[bold]{slug}[/] ({number}, {paper.category}, {paper.state})")
    arxiv = f"https://arxiv.org/abs/{paper.arxiv}" if paper.arxiv else ""
    needs = {"none": "no training", "calibration": "a calibration pass", "required": "training"}[paper.training]
    lines = [paper.title, arxiv, paper.summary, f"needs {needs}; {', '.join(paper.tags)}"]
    for line in filter(None, lines):
        screen.print(line, markup=False)
    from manyheads.report.claims import print_run

    for part in row.get("parts", [row]) if paper.state != "planned" else []:
        screen.print(f"\n{part['doc']}", markup=False)
        print_table(_fields(part["fields"]), screen)
        screen.print(f'with manyheads.use(model, "{part["spec"]}"):', markup=False)
    if paper.state == "planned":
        screen.print("\nIts strategy does not stand yet.")
    if paper.state in ("claim", "checked"):
        screen.print()
        for one in stored_runs(paper.slug, results):
            print_run(one, screen)


def _select(papers: list[catalog.Paper], category: str | None, state: str | None) -> list[catalog.Paper]:
    """Return the rows of a category (or of all below it) and of a state."""
    categories = catalog.categories()
    if category is not None and not any(f"{known}/".startswith(f"{category.rstrip('/')}/") for known in categories):
        close = catalog.nearest(category, categories)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(categories)}"
        raise UserError(f"unknown category {category!r}: {hint}")
    if state is not None and state not in catalog.STATES:
        raise UserError(f"unknown state {state!r}; there are {', '.join(catalog.STATES)}")
    return [
        paper
        for paper in papers
        if (category is None or f"{paper.category}/".startswith(f"{category.rstrip('/')}/"))
        and state in (None, paper.state)
    ]


def _strategy_row(slug: str, strategy: type[Strategy]) -> dict[str, Any]:
    """Return slug, docstring, fields and spec example of a strategy that stands."""
    import dataclasses
    import inspect

    module = sys.modules[strategy.__module__]
    fields = [
        {
            "name": field.name,
            "type": field.type if isinstance(field.type, str) else getattr(field.type, "__name__", str(field.type)),
            "default": None if field.default is dataclasses.MISSING else field.default,
            "help": field.metadata.get("help", ""),
        }
        for field in dataclasses.fields(strategy)
    ]
    example = next((f"{f['name']}={f['default']}" for f in fields if f["default"] is not None), "")
    return {
        "strategy": slug,
        "doc": inspect.cleandoc(module.__doc__ or strategy.__doc__ or ""),
        "fields": fields,
        "spec": f"{slug}:{example}" if example else slug,
    }


def _papers(papers: Sequence[catalog.Paper], title: str) -> Table:
    names = ("slug", "category", "state", "needs training", "what it does")
    rows = [
        ["" if row.id is None else str(row.id), row.slug, row.category, row.state, row.training, row.summary]
        for row in papers
    ]
    return Table([Column("id"), *(Column(name, text=True) for name in names)], rows, title, repeats=True)


def _fields(fields: list[dict[str, Any]]) -> Table:
    rows = [[field["name"], str(field["default"]), field["help"]] for field in fields]
    return Table([Column(name, text=True) for name in ("field", "default", "meaning")], rows)
