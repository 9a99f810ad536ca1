# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads doctor`` shows: every check, its figure, its threshold, what it means, and the picture behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..heads import HeadTable
from ..inspect.attention_breakdown import FIRST
from .heads import card_of, heads_of, layer_card, maps_of, script_data
from .inspect import made_of, read, run_of
from .page import Card, Check, Headline, Page, Section, Text
from .plots import Panel, Series, lines
from .table import print_lines

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ..inspect.doctor import Diagnosis
    from ..inspect.measures import Measures

__all__ = ["page", "print_diagnosis"]


def page(found: Diagnosis) -> Page:
    """The page of a diagnosis."""
    m = found.measures
    sites = list(dict.fromkeys(site for one in m.found.values() for t in one.tables.values() for site in t.sites))
    tables: dict[str, Any] = {}
    maps, cell = maps_of(m.found["attention"], sites, found.run["settings"]["length"])
    checks = [Check(one, [card for card in _cards(one.key, m, tables, sites) if card]) for one in found.checks]
    levels = [one.level for one in found.checks]
    counts = [f"{levels.count(level)} to {level}" for level in ("watch", "note") if level in levels]
    summary = " and ".join(counts) if counts else "nothing unusual"
    said = [
        Headline(f"Of {len(checks)} things that were looked for: {summary}. The loss on this text is {found.loss:.3f} "
                 "nats per token."),
        *(Headline(f"{one.figure}. {one.advice}", one.title, one.level) for one in found.checks
          if one.level in ("watch", "note")),
    ]  # fmt: skip
    legend = Text(
        "watch: it can hurt. note: know it before you choose a cache, a number format or a length. fine: looked for, "
        "not found.", toggle=True,
    )  # fmt: skip
    return Page(
        found.run["model"]["name"], "What is unusual in this model", run_of(found.run), said,
        [
            Section("What was looked for", [legend, *checks]),
            made_of(found.run, "Thresholds are rules of thumb, printed so that you can move them. What a head does on "
                    "this text it may not do on another: give yours with --text."),
        ],
        "inspect.js", script_data(tables, maps, heads_of(m.found["attention"], sites), cell),
    )  # fmt: skip


def _cards(key: str, m: Measures, tables: dict[str, Any], sites: list[str]) -> list[Card | None]:
    """The pictures of a check."""
    papers, own = m.found, m.found["attention"].tables

    def map_of(one: HeadTable, name: str) -> Card | None:
        return card_of(one, name, tables, sites)

    if key == "sinks":
        return [map_of(papers["active_dormant"].tables[name], name) for name in ("sink", "drain")]
    if key == "activations":
        shown = papers["refined_massive_activations"].tables
        return [layer_card(shown[name], name) for name in ("max / median", "first / others")]
    if key == "float16":
        return [layer_card(papers["refined_massive_activations"].tables["max"], "greatest |h|")]
    if key == "channels":
        shown = papers["massive_values"].tables
        return [map_of(shown[f"peak {name}"], f"greatest channel of {name}") for name in "qk"]
    if key == "idle":
        cards = [map_of(own["entropy"], "entropy"), map_of(papers["body"].tables["written"], "written")]
        return [*cards, None if m.alone is None else map_of(m.alone, "alone")]
    if key == "duplicates":
        first = own[FIRST]
        name = "share of the attention elsewhere than the most similar head's"
        unlike = HeadTable(name, first.sites, m.head_distance, layers=first.layers)
        return [map_of(unlike, "unlike its double"), map_of(own["previous token"], "previous token")]
    if key == "contexts" and len(m.contexts[0]) > 1:
        return [_contexts(m)]
    return []


def _contexts(m: Measures) -> Card:
    """Loss of the same tokens by what was read before."""
    sizes, losses = m.contexts
    mean, change = losses.mean(1), losses - losses[0]
    series = Series(
        "loss", [float(n) for n in sizes], mean.tolist(), (mean[0] + change.min(1)).tolist(),
        (mean[0] + change.max(1)).tolist(),
    )  # fmt: skip
    panel = Panel(
        [series], "", "tokens read before (log scale)", "loss, nats per token", "x", [(n, f"{n:,}") for n in sizes],
        marks=[(float(m.max_context), "length of the config")] if m.max_context < 2**40 else [],
    )  # fmt: skip
    said = ", ".join(f"{n} {value:.3f}" for n, value in zip(sizes, mean, strict=True))
    return Card(
        "loss by length of the context",
        lines([panel], f"Loss of the same tokens by length of context: {said}", height=240),
        "bars hold every prompt's own change from the shortest", width="lines",
    )  # fmt: skip


def print_diagnosis(found: Diagnosis, place: Path, console: Console) -> None:
    """What is unusual, one line a finding, what to do about it below."""
    from rich.padding import Padding
    from rich.text import Text as Words

    print_lines([read(found.run, found.loss)], console)
    styles = {"watch": "bold yellow", "note": "cyan", "fine": "green", "unknown": "dim"}
    for one in found.checks:
        console.print(Words.assemble((f"{one.level:8}", styles[one.level]), (one.title, "bold"), f": {one.figure}"))
        message = Words(f"{one.message} {one.advice}".strip())
        message.append(f" (threshold: {one.threshold})" if one.threshold else "", "dim")
        console.print(Padding(message, (0, 0, 1, 8)))
    print_lines([f"page: {place}"], console)
