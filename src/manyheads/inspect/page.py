# SPDX-License-Identifier: Apache-2.0
"""The page of ``inspect``: one file, no network, drawn from the findings; its only script is named by its hash."""

import math
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..heads import AblationCurve, HeadTable
from ..html import filled
from ..lens import LensResult
from .figures import (
    LEVELS,
    Line,
    Scale,
    bars,
    colours,
    data_uri,
    heat,
    lines,
    markup,
    number,
    pixels,
    plain,
    scale_of,
)  # fmt: skip
from .run import WHERE, Inspection
from .token_view import token_view

__all__ = ["DECADES", "card_of", "fill", "heads_of", "heads_shown", "layer_card", "maps_of", "render"]

DECADES = 4  # of the logarithmic colours of maps
_MAPS = 430_000  # bytes that all maps may take in the page
_VALUES = 400  # heads whose values are written out
_RECORDS = 25
_OUR_OWN = "where the attention of every head goes, by part and distance; not a paper's, always there"


def fill(template: str, run: dict[str, Any], **given: Any) -> str:
    """``template`` with what is known of ``run`` and all else that is ``given``; ``data`` brings the script along."""
    command = shlex.join(run["command"]) if run["command"] else "made in Python"
    return filled(
        template, "manyheads.inspect", script="inspect.js", run=run, command=command, short=_short(run), **given
    )


def render(seen: Inspection) -> str:
    """The page as HTML. Names, tokens and notes are escaped: they come from anywhere."""
    tables: dict[str, Any] = {}
    sites = list(
        dict.fromkeys(site for found in seen.found.values() for t in found.tables.values() for site in t.sites)
    )
    groups, layers = [], []
    for spec, found in seen.found.items():
        cards = []
        for name, made in found.tables.items():
            if made.values.shape[2] == 1:
                layers.append(layer_card(made, f"{name}: {spec.partition(':')[0]}"))
            elif spec != WHERE or name in seen.parts or name == "entropy":
                cards.append(card_of(made, name, tables, sites))
        groups.append({"slug": spec, "about": _about(spec), "notes": found.notes, "cards": [c for c in cards if c]})
    own = seen.found[WHERE]
    maps, cell = maps_of(own, sites, max(len(p.ids) for p in seen.prompts))
    tokens, prompts, series = token_view(seen)
    first = next((t for f in seen.found.values() for t in f.tables.values() if t.values.shape[2] > 1), None)
    thumbs = list(_thumbs(first, own, maps, sites)) if first is not None else []
    channels = [card for spec, found in seen.found.items() for card in _channels(spec, found, tables)]
    data = {
        "tables": tables, "maps": maps, "heads": heads_of(own, sites), "cell": cell, "decades": DECADES,
        "colours": colours(False), "prompts": prompts, "series": series, "shown": tokens["index"] if tokens else 0,
    }  # fmt: skip
    return fill(
        "inspect.html.j2",
        seen.run,
        data=data,
        groups=groups,
        layers=[card for card in layers if card],
        flow=markup(_flow(seen)),
        rows_are="the tokens of the response" if any(p.roles for p in seen.prompts) else "all tokens but the first",
        thumbs=thumbs,
        thumbs_by=first.name if first is not None else "",
        cell=cell,
        token_view=tokens,
        channels=channels,
        records=list(_records(seen)),
        curve=_curve(*seen.curve) if seen.curve else None,
    )


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


def _short(run: dict[str, Any]) -> str:
    model, settings = run["model"], run["settings"]
    return (
        f"{model['name']} ({model['class']}, {model['parameters'] / 1e6:.1f} million parameters, {model['dtype']}) on "
        f"{settings['device']}; {settings['samples']} prompt(s) of {settings['length']} tokens at most; "
        f"seed {settings['seed']}; transformers {run['environment']['transformers']}"
    )


def heads_shown(made: HeadTable, count: int = 3, least: bool = False) -> str:
    """The first heads of a table with their values and intervals, in words."""
    mean, (low, high) = made.mean, made.interval()
    said = []
    for head in made.top(count, least):
        (name,) = made.names([head])
        name = name.partition(".")[0] if mean.shape[1] == 1 else name
        range_ = f" ({number(low[head])} to {number(high[head])})" if math.isfinite(low[head]) else ""
        said.append(f"{name}: {number(mean[head])}{range_}")
    return "; ".join(said)


def card_of(made: HeadTable, name: str, tables: dict[str, Any], sites: Sequence[str]) -> dict[str, Any] | None:
    """The map of a score over layers and heads; its values go to ``tables`` for the script. None where all is NaN."""
    mean, (low, high) = made.mean, made.interval()
    scale = scale_of(mean)
    if scale is None:
        return None
    tag, log = f"t{len(tables)}", scale_of(mean, log=True)
    rows, columns = [str(layer) for layer in made.layers], [str(h) for h in range(mean.shape[1])]
    known = {"low": plain(low), "high": plain(high)} if np.isfinite(low).any() else {}
    tables[tag] = {
        "layers": list(made.layers), "sites": [sites.index(site) for site in made.sites], "columns": mean.shape[1],
        "mean": plain(mean), "rank": plain(made.ranks()), "count": int(np.isfinite(mean).sum()), **known,
    }  # fmt: skip
    if scale.low == scale.high or np.nanmin(mean) == np.nanmax(mean):
        same = f"{number(float(np.nanmin(mean)))} for every head"
        return {
            "title": name, "about": made.name if made.name != name else "", "picture": "", "log": None, "top": same,
            "rows": [], "columns": [], "kind": "",
        }  # fmt: skip
    axes = ("layer", "head")
    alt = f"{name} of every head. Greatest: {heads_shown(made)}."
    picture, other = (
        heat(mean, rows, columns, scale=s, name=alt, axes=axes, tag=tag) if s else "" for s in (scale, log)
    )
    few = mean.size <= _VALUES
    return {
        "title": name, "about": made.name if made.name != name else "", "picture": markup(picture),
        "log": markup(other) if other else None, "top": f"greatest: {heads_shown(made)}", "kind": "",
        "columns": columns if few else [],
        "rows": [(row, [number(v) for v in values]) for row, values in zip(rows, mean, strict=True)] if few else [],
    }  # fmt: skip


def layer_card(made: HeadTable, name: str) -> dict[str, Any] | None:
    """The line of a score over layers, with its interval as a band. None where all is NaN."""
    mean, (low, high) = made.mean[:, 0], (bound[:, 0] for bound in made.interval())
    known = mean[np.isfinite(mean)]
    if not known.size:
        return None
    band = bool(np.isfinite(low).all())
    log = bool(known.min() > 0 and known.max() > 30 * known.min())
    line = Line(
        name, list(map(float, made.layers)), mean.tolist(), low.tolist() if band else None,
        high.tolist() if band else None,
    )  # fmt: skip
    picture = lines([line], x="layer", y=name.partition(":")[0], name=f"{name} by layer: {heads_shown(made)}", log=log)
    return {
        "title": name, "about": made.name if made.name != name.partition(":")[0] else "", "picture": markup(picture),
        "log": None, "top": f"greatest: {heads_shown(made)}", "rows": [], "columns": [], "kind": "lines",
    }  # fmt: skip


def _flow(seen: Inspection) -> str:
    own = seen.found[WHERE].tables
    layers = own[seen.parts[0]].layers
    with np.errstate(invalid="ignore"):
        shares = [(part, np.nan_to_num(np.nanmean(own[part].mean, 1)).tolist()) for part in seen.parts]
    said = "; ".join(f"{part} {np.mean(values):.0%}" for part, values in shares)
    return bars(
        [str(layer) for layer in layers], shares, x="layers; share of the attention",
        name=f"Share of attention by part and layer. Mean over layers: {said}.",
    )  # fmt: skip


def heads_of(own: LensResult, sites: Sequence[str]) -> dict[str, int]:
    """Heads of each site that has maps, by its number among ``sites``."""
    table = next(iter(own.tables.values()))
    return {str(sites.index(site)): table.values.shape[2] for site in table.sites}


def _halved(x: Any) -> Any:
    """Means of 2 x 2 cells; an odd last row or column stands for itself."""
    x = np.pad(x, ((0, x.shape[0] % 2), (0, x.shape[1] % 2)), mode="edge")
    return x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2).mean((1, 3))


def maps_of(own: LensResult, sites: Sequence[str], length: int) -> tuple[dict[str, str], int]:
    """Pictures of all heads, as large as the page has room for, and the tokens on a side of a cell."""
    table = next(iter(own.tables.values()))
    shown = {
        f"{sites.index(table.sites[row])}.{head}": np.asarray(values, float)
        for (row, head), values in own.maps.items()
        if np.isfinite(values).all()
    }
    if not shown:
        return {}, 1
    while True:
        made = {}
        for key, values in shown.items():
            top = float(values.max()) or 1.0
            levels = Scale(top * 10**-DECADES, top, log=True).levels(np.where(values > 0, values, np.nan))
            # Every other colour, as a reader tells no more apart: a fifth fewer bytes.
            made[key] = data_uri(pixels(np.where(levels < LEVELS, levels | 1, levels)))
        side = next(iter(shown.values())).shape[0]
        if sum(map(len, made.values())) <= _MAPS or side <= 16:
            return made, math.ceil(length / side)
        shown = {key: _halved(values) for key, values in shown.items()}


def _thumbs(first: HeadTable, own: LensResult, maps: dict[str, str], sites: Sequence[str]) -> Iterator[dict[str, str]]:
    """Maps of the heads that the first score ranks highest."""
    heads = heads_of(own, sites)
    for head in first.top(5):
        site = sites.index(first.sites[head[0]])
        group = max(1, heads.get(str(site), 0) // first.values.shape[2])
        if source := maps.get(f"{site}.{head[1] * group}"):
            yield {
                "name": f"{first.layers[head[0]]}.{head[1] * group}", "value": number(first.mean[head]), "src": source,
            }  # fmt: skip


def _channels(spec: str, found: LensResult, tables: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Maps of channels: a row for each head, the heads of a layer beside one another."""
    layers = next((t.layers for t in found.tables.values()), ())
    for name, values in found.channels.items():
        x = np.asarray(values, float)
        x = x[:, None] if x.ndim == 2 else x
        flat = x.reshape(-1, x.shape[2])
        scale, log = scale_of(flat), scale_of(flat, log=True)
        if scale is None:
            continue
        heads = x.shape[1]
        known = layers if len(layers) == x.shape[0] else tuple(range(x.shape[0]))
        rows = [f"{known[i // heads]}.{i % heads}" for i in range(len(flat))]
        columns = [str(i) for i in range(x.shape[2])]
        tag = f"c{len(tables)}"
        if flat.size <= 40_000:
            tables[tag] = {"mean": plain(flat), "names": rows}
        alt = f"{name} by head and channel, from {number(float(np.nanmin(flat)))} to {number(float(np.nanmax(flat)))}"
        axes = ("layer.head", "channel")
        pictures = [
            markup(heat(flat, rows, columns, scale=s, name=alt, axes=axes, tag=tag)) if s else None
            for s in (scale, log)
        ]
        yield {
            "title": f"{name}: {spec.partition(':')[0]}", "about": alt, "picture": pictures[0], "log": pictures[1],
            "top": "", "rows": [], "columns": [], "kind": "wide",
        }  # fmt: skip


def _records(seen: Inspection) -> Iterator[dict[str, Any]]:
    for spec, found in seen.found.items():
        for name, rows in found.records.items():
            if not rows:
                continue
            rows = [_with_token(row, seen.tokens) for row in rows]
            keys = list(dict.fromkeys(key for row in rows for key in row))
            shown = [[_cell(row.get(key)) for key in keys] for row in rows[:_RECORDS]]
            more = f"{len(rows)} in all" + (f", the first {_RECORDS}" if len(rows) > _RECORDS else "")
            yield {"name": f"{name}: {spec.partition(':')[0]}", "about": more, "columns": keys, "rows": shown}


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
    return re.sub(r"\s+", " ", str("" if value is None else value))[:80]


def _curve(score: str, made: AblationCurve) -> dict[str, Any]:
    control = made.control
    counts = list(map(float, made.counts))
    picture = lines(
        [
            Line("heads with the highest score", counts, made.ranked.tolist()),
            Line(
                f"random heads of the same layers ({len(control)} draws)", counts, control.mean(0).tolist(),
                control.min(0).tolist(), control.max(0).tolist(),
            ),
        ],
        x="heads ablated", y="loss, nats per token", width=620, height=280,
        name=f"Loss without heads, by {score}: {made.ranked[0]:.3f} with all, {made.ranked[-1]:.3f} without "
        f"{made.counts[-1]}, {control[:, -1].mean():.3f} without as many random ones",
    )  # fmt: skip
    worse, others = made.ranked[-1] - made.ranked[0], control[:, -1] - made.ranked[0]
    caption = (
        f"Heads ablated (by zero) in the order of {score}, highest first: {', '.join(made.heads[:8])}"
        f"{', ...' if len(made.heads) > 8 else ''}. Without {made.counts[-1]} of them the loss is {worse:+.3f} nats, "
        f"without as many random heads of the same layers {others.min():+.3f} to {others.max():+.3f}. Band: the draws "
        "of the control."
    )
    return {"picture": markup(picture), "caption": caption}
