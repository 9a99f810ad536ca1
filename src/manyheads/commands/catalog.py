# SPDX-License-Identifier: Apache-2.0
"""The verbs ``manyheads list``, ``find``, ``show`` and ``tasks``."""

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
    """Search papers, baselines and tasks by words: what can be used first, then what is planned, then tasks."""
    ranked = catalog.find(words, limit)
    kinds = [[one for one in ranked if (one[0].state == "planned") is planned] for planned in (False, True)]
    found = [one for kind in kinds for one in kind]
    tasks = _tasks_about(words, limit)
    if as_json:
        papers = [{**paper.row(), "score": round(score, 3)} for paper, score in found]
        print_json([*papers, *({"slug": name, "category": "tasks", "summary": said} for name, _, said in tasks)])
        return
    if not found and not tasks:
        raise UserError(f"nothing matches {words!r}; try other words, `manyheads list` or `manyheads tasks`")
    for kind, title in zip(kinds, ("best first", "planned: a row and no code yet"), strict=True):
        if kind:
            print_table(_papers([paper for paper, _ in kind], title), console(140))
    if tasks:
        print_table(_tasks(tasks, "tasks: manyheads compare --tasks NAME"), console(140))


def list_tasks(
    field: Annotated[str | None, typer.Option(help="Only this field: text, diffusion, lenses, ...")] = None,
    as_json: Json = False,
) -> None:
    """List what can be measured: the tasks of `manyheads compare --tasks NAME`, those that claims have, and the tasks
    of a field, which `manyheads train` trains papers on, with their data.
    """
    from manyheads.tasks import data_of, summaries

    rows = [(name, home, said) for name, (home, said) in summaries().items() if field in (None, home)]
    if not rows:
        fields = sorted({home for home, _ in summaries().values()})
        raise UserError(f"there is no field {field!r}; there are {', '.join(fields)}")
    data = {name: found for name, _, _ in rows if (found := data_of(name)) is not None}
    if as_json:
        print_json([{"task": name, "field": home, "summary": said, **data.get(name, {})} for name, home, said in rows])
        return
    print_table(_tasks(rows, f"{len(rows)} tasks"), console(140))
    if data:
        cells = [[name, found["origin"], found["licence"], found["absent"] or "here"] for name, found in data.items()]
        columns = [Column(name, text=True) for name in ("task", "data", "licence", "where")]
        print_table(Table(columns, cells, "of a field: manyheads train PAPER --task NAME", repeats=True), console(140))


def _tasks_about(words: str, limit: int) -> list[tuple[str, str, str]]:
    """Tasks on text that have at least half of ``words``, or words that begin with them, the most of them first."""
    import re

    from manyheads.tasks import summaries

    def parts(text: str) -> set[str]:
        return set(re.findall(r"[^\W_]+", text.lower()))

    named = {part for name in summaries() for part in parts(name)}
    asked = {word for word in parts(words) if len(word) > 3 or word in named}
    scored = []
    for name, (field, said) in summaries().items():
        own = parts(f"{name} {said}")
        score = sum(any(word.startswith(one) for word in own) for one in asked)
        if field == "text" and score and 2 * score >= len(asked):  # those of other fields belong to claims
            scored.append((-score, name, field, said))
    best = min((score for score, *_ in scored), default=0)
    return [(name, field, said) for score, name, field, said in sorted(scored) if score == best][:limit]


def _tasks(rows: Sequence[tuple[str, str, str]], title: str) -> Table:
    columns = [Column(name, text=True) for name in ("task", "field", "what is measured")]
    return Table(columns, [list(row) for row in rows], title, repeats=True)


def show(slug: Slug, as_json: Json = False) -> None:
    """Show one strategy: what it does, its fields, how to write it, and what its claim gave."""
    slug = catalog.RECOMMENDED if slug == "auto" else slug
    paper = catalog.get(slug)
    results = {name: claims.stored(name) for name in claims.of_paper(paper.slug)}
    row: dict[str, Any] = paper.row() | {
        "doc": None,
        "fields": [],
        "spec": None,
        "claim": [result.plain() for found in results.values() for result in found] or None,
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
    family = f"family {paper.family}: what it costs, `manyheads recommend`" if paper.family else ""
    lines = [paper.title, arxiv, paper.summary, f"needs {needs}; {', '.join(paper.tags)}", family]
    for line in filter(None, lines):
        screen.print(line, markup=False)
    from manyheads.report.claims import print_run

    for part in row.get("parts", [row]) if paper.state != "planned" else []:
        screen.print(f"\n{part['doc']}", markup=False)
        print_table(_fields(part["fields"]), screen)
        screen.print(part["use"], markup=False)
    if paper.state == "planned":
        screen.print("\nIts strategy does not stand yet.")
    if paper.state in ("claim", "checked"):
        screen.print()
        for one in (one for name, found in results.items() for one in stored_runs(name, found)):
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

    from manyheads.recipe import Procedure, Recipe

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
    spec, trained = f"{slug}:{example}" if example else slug, issubclass(strategy, Recipe | Procedure)
    return {
        "strategy": slug,
        "doc": inspect.cleandoc(module.__doc__ or strategy.__doc__ or ""),
        "fields": fields,
        "spec": spec,
        "use": f"manyheads train {spec}" if trained else f'with manyheads.use(model, "{spec}"):',
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
