# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads inspect`` shows: which sections and which tables from what the lenses found."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formatting import interval, number
from ..heads import HeadTable
from ..inspect.attention_breakdown import FIRST
from ..inspect.run import WHERE
from .colours import LEVELS, plain, scale_of
from .heads import card_of, heads_of, layer_card, maps_of, pictures, script_data
from .page import Card, Cards, Figure, Headline, Page, Section, Text, Thumbs, made
from .plots import Panel, Series, lines, stacked
from .signals import pictures_of, queries_of
from .table import Cell, Column, Table, print_lines, print_table
from .token_view import token_view

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console

    from ..heads import AblationCurve
    from ..inspect.run import Inspection

__all__ = ["made_of", "page", "print_findings", "read", "rows_of_heads", "run_of"]

_RECORDS = 25
_CELL = 160  # characters of a cell
_TOP = 3
_OUR_OWN = "where the attention of every head goes, by part and distance; not a paper's, always there"


def page(seen: Inspection) -> Page:
    """The page of what was seen."""
    tables: dict[str, Any] = {}
    sites = list(
        dict.fromkeys(site for found in seen.found.values() for t in found.tables.values() for site in t.sites)
    )
    groups, layers, drawn = [], [], dict[str, HeadTable]()
    for spec, found in seen.found.items():
        cards = []
        for name, one in found.tables.items():
            if one.values.shape[2] == 1:
                layers.append(layer_card(one, f"{name}: {spec.partition(':')[0]}"))
            elif _listed(seen, spec, name):
                if (twin := _drawn(one, drawn)) is None:
                    drawn[f"{name} of {spec.partition(':')[0]}"] = one
                    cards.append(card_of(one, name, tables, sites))
                else:
                    cards.append(Card(name, about=one.name if one.name != name else "", said=f"the map of {twin}"))
        groups.append(Cards([card for card in cards if card], spec, _about(spec)))
    own = seen.found[WHERE]
    maps, cell = maps_of(own, sites, max(len(p.ids) for p in seen.prompts), queries_of(seen))
    tokens, plots, prompts, series = token_view(seen)
    first = next((t for f in seen.found.values() for t in f.tables.values() if t.values.shape[2] > 1), None)
    thumbs = [] if first is None else list(_thumbs(first, own, maps, sites))
    channels = [card for spec, found in seen.found.items() for card in rows_of_heads(spec, found, tables)]
    settings = seen.run["settings"]
    rows_are = "the tokens of the response" if any(p.roles for p in seen.prompts) else "all tokens but the first"
    shared = "Parts of the first token and of named roles come first; what is left is shared by distance."
    if FIRST not in own.tables:  # an image or a recording
        rows_are, shared = "all tokens", ""
    unit = count_of(settings)
    flow, said = _flow(seen)
    data = script_data(tables, maps, heads_of(own, sites), cell, prompts, series)
    return Page(
        seen.run["model"]["name"], "What the model looks at", run_of(seen.run),
        [Headline(said), *_headlines(seen)],
        [
            *pictures_of(seen),
            Section("Where the attention goes", [Figure(
                flow, f"Share of the attention of {rows_are} by layer, mean over heads and prompts. {shared}",
            )]),
            Section("Heads", [
                Text(
                    f"Each cell is a head, its mean over {unit}. "
                    "Point at a cell for its value, its 95 % interval over prompts and its rank; click it for "
                    "the head's map.", toggle=True,
                ), *groups,
            ]),
            Section("Maps of some heads", [
                Text(
                    f"The heads that are highest in {first.name if first else ''}. Rows are queries, columns are keys; "
                    f"a cell is a mean over {cell[0]} x {cell[1]} tokens, its colour is logarithmic over four decades. "
                    "With scripts allowed, a click on any cell above shows the map of that head."
                ), Thumbs(thumbs, "attention map of head"),
            ] if thumbs else []),
            Section("Layers", [Cards([card for card in layers if card])]),
            Section("Tokens", [
                Text(
                    f"Tokens of {seen.prompts[0].name}: orange above 0, blue below, strongest at the greatest of the "
                    "values. Peaks are underlined, tokens with a role have a dotted line."
                ) if tokens else None, tokens, Cards(plots),
            ]),
            Section("Curves", [Cards(list(_curves(seen)))]),
            Section("Channels and steps", [Cards(channels)]), Section("Found one by one", list(_records(seen))),
            Section("Ablation", [_curve(*seen.curve) if seen.curve else None]),
            made_of(seen.run, "Intervals are a bootstrap over prompts; with one prompt there are none. A score says "
                  "what a head does on this text, not what it is for: --ablate SCORE takes heads out and measures."),
        ],
        "inspect.js", data,
    )  # fmt: skip


def _drawn(one: HeadTable, drawn: Mapping[str, HeadTable]) -> str | None:
    """The name of a map that looks the same: no cell differs by half a step of its colours."""
    scale = scale_of(one.mean)
    if scale is None or np.nanmin(one.mean) == np.nanmax(one.mean):
        return None  # not a map
    for name, other in drawn.items():
        if other.sites == one.sites and other.mean.shape == one.mean.shape:
            apart = np.abs(one.mean - other.mean)
            nothing = np.isnan(one.mean) & np.isnan(other.mean)
            if bool((nothing | (apart < (scale.high - scale.low) / (2 * LEVELS))).all()):
                return name
    return None


def _listed(seen: Inspection, spec: str, name: str) -> bool:
    """Whether a table is shown: all but the details of our own look."""
    return spec != WHERE or name in seen.parts or name == "entropy"


def _about(spec: str) -> str:
    """What the catalogue says of a lens, nothing of one that it does not know."""
    from .. import catalog

    slug = spec.partition(":")[0]
    if spec == WHERE:
        return _OUR_OWN
    if slug not in catalog.names():
        return ""
    paper = catalog.get(slug)
    return f"{paper.title}" + (f", arXiv {paper.arxiv}" if paper.arxiv else "")


def count_of(settings: dict[str, Any]) -> str:
    """How much was read."""
    what = _read_as(settings) + "(s)"
    frames = settings.get("reads") == "audio" and settings.get("part") in ("cross", "encoder")
    tokens = "frames" if frames else "tokens"
    return f"{settings['samples']} {what} of {settings['length']} {tokens}"


def _read_as(settings: dict[str, Any]) -> str:
    return {"image": "image", "audio": "recording", "sentence": "sentence"}.get(settings.get("reads", ""), "prompt")


def _part(settings: dict[str, Any]) -> str:
    part = settings.get("part", "")
    return f"{'cross-attention' if part == 'cross' else part}, " if part else ""


def run_of(run: dict[str, Any]) -> str:
    """The run in a line."""
    model, settings = run["model"], run["settings"]
    return (
        f"{model['name']} ({model['class']}, {model['parameters'] / 1e6:.1f} million parameters, {model['dtype']}) on "
        f"{settings['device']}; {_part(settings)}{count_of(settings)} at most; "
        f"seed {settings['seed']}; transformers {run['environment']['transformers']}"
    )


def made_of(run: dict[str, Any], care: str) -> Section:
    """How the page was made."""
    model, settings = run["model"], run["settings"]
    about = [
        ("model", model["name"], f"{model['class']}, {model['parameters']:,} parameters, {model['dtype']}"),
        (
            f"{_read_as(settings)}s",
            f"n = {settings['samples']}, of {settings['length']} tokens at most",
            ", ".join(run["sources"]),
        ),
        ("text", f"{run['texts']['files']} files", f"sha256 {run['texts']['sha256']}"),
        ("seed", settings["seed"], ""),
    ]
    return made(run, about, f"{care} All figures are in findings.json beside this page.", "made in Python")


def _headlines(seen: Inspection) -> list[Headline]:
    said = [Headline(" ".join(found.notes), spec) for spec, found in seen.found.items() if found.notes]
    return said + ([Headline(ablated(*seen.curve), "ablation")] if seen.curve else [])


def ablated(score: str, curve: AblationCurve) -> str:
    """What heads taken out do to the loss, in a sentence."""
    others = curve.control[:, -1] - curve.ranked[0]
    worse = curve.ranked[-1] - curve.ranked[0]
    return (
        f"Without the {curve.counts[-1]} heads highest in {score} the loss is {worse:+.3f} "
        f"nats; without as many random heads of the same layers {others.min():+.3f} to {others.max():+.3f}."
    )


def _flow(seen: Inspection) -> tuple[str, str]:
    """The picture of where attention goes, and a sentence that says it."""
    own = seen.found[WHERE].tables
    layers = own[seen.parts[0]].layers
    with np.errstate(invalid="ignore"):
        shares = [(part, np.nan_to_num(np.nanmean(own[part].mean, 1)).tolist()) for part in seen.parts]
    means = {part: float(np.mean(values)) for part, values in shares}
    said = "; ".join(f"{part} {mean:.0%}" for part, mean in means.items())
    most = sorted(means, key=lambda part: -means[part])
    whose = " of the transcript, which the model wrote itself" if seen.run["settings"].get("reads") == "audio" else ""
    sentence = (
        f"Of the attention, {100 * means[most[0]]:.0f} % goes to {_place(most[0])}"
        + "".join(f", {100 * means[part]:.0f} % to {_place(part)}" for part in most[1:3])
        + " (mean over layers, heads and prompts)"
        + (f"; the loss is {seen.loss:.3f} nats per token{whose}." if math.isfinite(seen.loss) else ".")
    )
    alt = f"Share of attention by part and layer. Mean over layers: {said}."
    return stacked([str(layer) for layer in layers], shares, alt, "share of the attention (rows: layers)"), sentence


def _place(part: str) -> str:
    """A part as words of a sentence."""
    known = {"itself": "the token itself", "2 to 16 back": "tokens 2 to 16 back", "farther": "tokens farther back"}
    return known.get(part, f"the {part}" if part.endswith("token") else part)


def _thumbs(first: HeadTable, own: Any, maps: dict[str, str], sites: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Maps of the heads that the first score ranks highest."""
    heads = heads_of(own, sites)
    for head in first.top(5):
        site = sites.index(first.sites[head[0]])
        at = head[1] * max(1, heads.get(str(site), 0) // first.values.shape[2])
        if source := maps.get(f"{site}.{at}"):
            yield f"{first.layers[head[0]]}.{at}", number(first.mean[head]), source


def rows_of_heads(spec: str, found: Any, tables: dict[str, Any]) -> Iterator[Card]:
    """Maps of channels or steps: a row for each head, the heads of a layer beside one another."""
    layers = next((t.layers for t in found.tables.values()), ())
    for what, name, values in (
        *(("channel", *item) for item in found.channels.items()), *(("step", *item) for item in found.steps.items())
    ):  # fmt: skip
        x = np.asarray(values, float)
        x = x[:, None] if x.ndim == 2 else x
        flat, heads = x.reshape(-1, x.shape[2]), x.shape[1]
        if scale_of(flat) is None:
            continue
        known = layers if len(layers) == x.shape[0] else tuple(range(x.shape[0]))
        rows = [f"{known[i // heads]}.{i % heads}" for i in range(len(flat))]
        tag = f"c{len(tables)}"
        if flat.size <= 40_000:
            tables[tag] = {"mean": plain(flat), "names": rows}
        alt = f"{name} by head and {what}, from {number(float(np.nanmin(flat)))} to {number(float(np.nanmax(flat)))}"
        columns = [str(i) for i in range(x.shape[2])]
        picture, log = pictures(flat, rows, columns, alt, ("layer.head", what), tag)
        yield Card(f"{name}: {spec.partition(':')[0]}", picture, alt, log, width="wide")


def _curves(seen: Inspection) -> Iterator[Card]:
    """Lines over the first column of each table of numbers."""
    for spec, found in seen.found.items():
        for name, columns in found.curves.items():
            over, *rest = columns
            x, log = columns[over], "x" if min(columns[over], default=0) > 0 else ""
            ends = "; ".join(f"{of} {number(columns[of][0])} to {number(columns[of][-1])}" for of in rest)
            alt = f"{name} by {over}, {number(x[0])} to {number(x[-1])}: {ends}"
            panel = Panel([Series(of, x, columns[of]) for of in rest], "", over, name, log)
            yield Card(f"{name} by {over}: {spec.partition(':')[0]}", lines([panel], alt, width=640), alt, width="wide")


def _records(seen: Inspection) -> Iterator[Table]:
    for spec, found in seen.found.items():
        for name, rows in found.records.items():
            if not rows:
                continue
            rows = [_with_token(row, seen.tokens) for row in rows]
            if seen.run["settings"].get("reads") == "sentence":
                rows = [{**row, "text": seen.prompts[row["prompt"]].name} if "prompt" in row else row for row in rows]
            keys = list(dict.fromkeys(key for row in rows for key in row))
            more = f"{len(rows)} in all" + (f", the first {_RECORDS}" if len(rows) > _RECORDS else "")
            columns = [Column(key, text=any(isinstance(row.get(key), str) for row in rows)) for key in keys]
            cells: list[list[Cell | str]] = [[_cell(row.get(key)) for key in keys] for row in rows[:_RECORDS]]
            yield Table(columns, cells, f"{name}: {spec.partition(':')[0]}", more)


def _with_token(row: dict[str, Any], tokens: Sequence[Sequence[str]]) -> dict[str, Any]:
    """A record with the text of the token that it is about, where it names prompt and column."""
    prompt: Any = row.get("prompt")
    column: Any = row.get("column")
    known = isinstance(prompt, int) and isinstance(column, int) and "token" not in row
    if known and prompt in range(len(tokens)) and column in range(len(tokens[prompt])):
        return {**row, "token": repr(tokens[prompt][column])}
    return row


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    text = re.sub(r"\s+", " ", str("" if value is None else value))
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"


def _curve(score: str, curve: AblationCurve) -> Figure:
    control, counts = curve.control, [float(n) for n in curve.counts]
    picture = lines(
        [Panel(
            [
                Series("heads with the highest score", counts, curve.ranked.tolist()),
                Series(f"random heads of the same layers ({len(control)} draws)", counts, control.mean(0).tolist(),
                       control.min(0).tolist(), control.max(0).tolist()),
            ],
            "", "heads ablated", "loss, nats per token",
        )],
        f"Loss without heads, by {score}: {curve.ranked[0]:.3f} with all, {curve.ranked[-1]:.3f} without "
        f"{curve.counts[-1]}, {control[:, -1].mean():.3f} without as many random ones", width=640, height=300,
    )  # fmt: skip
    return Figure(
        picture,
        f"Heads ablated (by zero) in the order of {score}, highest first: {', '.join(curve.heads[:8])}"
        f"{', ...' if len(curve.heads) > 8 else ''}. {ablated(score, curve)} Bars: the draws of the control.",
    )


def read(run: dict[str, Any], loss: float) -> str:
    """What was read, in a line of the terminal; without a loss where the model predicts nothing."""
    settings = run["settings"]
    return f"{run['model']['name']}: {_part(settings)}{count_of(settings)}, seed {settings['seed']}" + (
        f", loss {loss:.3f} nats/token" if math.isfinite(loss) else ""
    )


def print_findings(seen: Inspection, place: Path, console: Console) -> None:
    """The first heads of every score with their intervals over prompts, the notes, and where the page is."""
    _print_scores(seen, console)
    for other in seen.others.values():
        _print_scores(other, console)
    pages = [place, *(place.with_name(f"{part}.html") for part in seen.others)]
    print_lines([*([ablated(*seen.curve)] if seen.curve else []), f"page: {', '.join(map(str, pages))}"], console)


def _print_scores(seen: Inspection, console: Console) -> None:
    print_lines([read(seen.run, seen.loss)], console)
    columns = [Column("score", text=True), *(Column(name, text=True) for name in ("highest", "second", "third"))]
    for spec, found in seen.found.items():
        rows: list[list[Cell | str]] = [
            [name, *_highest(one), _median(one)] for name, one in found.tables.items() if _listed(seen, spec, name)
        ]
        print_table(Table([*columns, Column("median")], rows, spec), console)
        print_lines([*(f"  {note}" for note in found.notes), *([""] if found.notes else [])], console)
    if seen.run["settings"].get("reads") == "sentence":
        for listed in _records(seen):
            if any(column.name == "text" for column in listed.columns):
                print_table(listed, console)


def _highest(one: HeadTable) -> list[Cell]:
    """Up to three heads (or layers), each with its value and, below, its interval."""
    mean, (low, high) = one.mean, one.interval()
    cells = []
    for head in one.top(_TOP):
        (name,) = one.names([head])
        name = f"layer {name.partition('.')[0]}" if mean.shape[1] == 1 else name
        known = math.isfinite(low[head])
        cells.append(Cell(f"{name}  {number(mean[head])}", interval(low[head], high[head]) if known else ""))
    return cells + [Cell("")] * (_TOP - len(cells))


def _median(one: HeadTable) -> str:
    known = one.mean[np.isfinite(one.mean)]
    return number(float(np.median(known))) if known.size else "–"
