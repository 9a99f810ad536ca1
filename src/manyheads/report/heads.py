# SPDX-License-Identifier: Apache-2.0
"""Scores of heads as cards of a page: maps over layers and heads, lines over layers, and the map of every head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formatting import number
from .colours import LEVELS, Scale, colours, data_uri, halved, pixels, plain, scale_of
from .page import Card
from .plots import Heat, Panel, Series, heat, lines
from .table import Column, Table

if TYPE_CHECKING:
    from ..heads import HeadTable

__all__ = ["card_of", "heads_of", "layer_card", "maps_of", "pictures", "script_data"]

_DECADES = 4  # of the logarithmic colours of maps
_MAPS = 430_000  # bytes that all maps may take in the page
_VALUES = 400  # heads whose values are written out


def script_data(
    tables: dict[str, Any], maps: dict[str, str], heads: dict[str, int], cell: tuple[int, int],
    prompts: Sequence[Any] = (), series: Sequence[Any] = (),
) -> dict[str, Any]:  # fmt: skip
    """What ``inspect.js`` works on."""
    return {
        "tables": tables, "maps": maps, "heads": heads, "cell": cell, "decades": _DECADES, "colours": colours(False),
        "prompts": prompts, "series": series, "shown": 0,
    }  # fmt: skip


def heads_shown(made: HeadTable) -> str:
    """The three greatest heads of a table with their values and intervals, in words."""
    mean, (low, high) = made.mean, made.interval()
    said = []
    for head in made.top(3):
        (name,) = made.names([head])
        name = name.partition(".")[0] if mean.shape[1] == 1 else name
        range_ = f" ({number(low[head])} to {number(high[head])})" if math.isfinite(low[head]) else ""
        said.append(f"{name}: {number(mean[head])}{range_}")
    return "; ".join(said)


def card_of(one: HeadTable, name: str, tables: dict[str, Any], sites: Sequence[str]) -> Card | None:
    """The map of a score over layers and heads; its values go to ``tables`` for the script. None where all is NaN."""
    mean, (low, high) = one.mean, one.interval()
    scale, about = scale_of(mean), one.name if one.name != name else ""
    if scale is None:
        return None
    tag = f"t{len(tables)}"
    rows, columns = [str(layer) for layer in one.layers], [str(h) for h in range(mean.shape[1])]
    known = {"low": plain(low), "high": plain(high)} if np.isfinite(low).any() else {}
    tables[tag] = {
        "layers": list(one.layers), "sites": [sites.index(site) for site in one.sites], "columns": mean.shape[1],
        "mean": plain(mean), "rank": plain(one.ranks()), "count": int(np.isfinite(mean).sum()), **known,
    }  # fmt: skip
    if scale.low == scale.high or np.nanmin(mean) == np.nanmax(mean):
        return Card(name, about=about, said=f"{number(float(np.nanmin(mean)))} for every head")
    alt = f"{name} of every head. Greatest: {heads_shown(one)}."
    outlined = _outlined(one)
    picture, log = pictures(mean, rows, columns, alt, ("layer", "head"), tag, outlined)
    values = None
    if mean.size <= _VALUES:
        cells = [[row, *(number(v) for v in part)] for row, part in zip(rows, mean, strict=True)]
        values = Table([Column("layer", text=True), *(Column(name) for name in columns)], cells)
    said = f"greatest: {heads_shown(one)}" + (f"; outlined: {one.about['outlined']['what']}" if outlined else "")
    return Card(name, picture, about, log, said, values)


def pictures(
    values: Any, rows: Sequence[str], columns: Sequence[str], alt: str, axes: tuple[str, str], tag: str,
    outlined: Sequence[tuple[int, int]] = (),
) -> tuple[str, str]:  # fmt: skip
    """A heat map in linear and, where they fit, in logarithmic colours."""
    scales = [scale_of(values), scale_of(values, log=True)]
    drawn = [Heat(values, outlined=outlined)]
    first, second = (heat(drawn, rows, columns, scale=s, alt=alt, axes=axes, tag=tag) if s else "" for s in scales)
    return first, second


def _outlined(one: HeadTable) -> list[tuple[int, int]]:
    """Cells of the heads that the table's ``about`` says are outlined."""
    named = one.about.get("outlined", {}).get("heads", ())
    return [(one.layers.index(int(layer)), int(head)) for layer, _, head in (name.partition(".") for name in named)]


def layer_card(one: HeadTable, name: str) -> Card | None:
    """The line of a score over layers, with its interval. None where all is NaN."""
    mean, (low, high) = one.mean[:, 0], (bound[:, 0] for bound in one.interval())
    known = mean[np.isfinite(mean)]
    if not known.size:
        return None
    band = bool(np.isfinite(low).all())
    log = bool(known.min() > 0 and known.max() > 30 * known.min())
    short, step = name.partition(":")[0], max(1, len(one.layers) // 12)
    ticks = [(float(n), str(n)) for n in one.layers[::step]]
    series = Series(
        name, [float(n) for n in one.layers], mean.tolist(), *((low.tolist(), high.tolist()) if band else ())
    )
    panel = Panel([series], "", "layer", short + (" (log scale)" if log else ""), "y" if log else "", ticks)
    picture = lines([panel], f"{name} by layer: {heads_shown(one)}", height=220)
    about = one.name if one.name != short else ""
    return Card(name, picture, about, said=f"greatest: {heads_shown(one)}", width="lines")


def heads_of(own: Any, sites: Sequence[str]) -> dict[str, int]:
    """Heads of each site that has maps, by its number among ``sites``."""
    table = next(iter(own.tables.values()))
    return {str(sites.index(site)): table.values.shape[2] for site in table.sites}


def maps_of(
    own: Any, sites: Sequence[str], length: int, queries: int | None = None
) -> tuple[dict[str, str], tuple[int, int]]:
    """Pictures of all heads, as large as the page has room for, and the queries and keys of a cell.

    Args:
        own: what :class:`AttentionBreakdown` found.
        sites: their names, in the order of the script's numbers.
        length: keys of a map.
        queries: of it; ``length`` when None.
    """
    table = next(iter(own.tables.values()))
    shown = {
        f"{sites.index(table.sites[row])}.{head}": np.asarray(values, float)
        for (row, head), values in own.maps.items()
        if np.isfinite(values).all()
    }
    if not shown:
        return {}, (1, 1)
    while True:
        made = {}
        for key, values in shown.items():
            top = float(values.max()) or 1.0
            levels = Scale(top * 10**-_DECADES, top, log=True).levels(np.where(values > 0, values, np.nan))
            # Every other colour, as a reader tells no more apart: a fifth fewer bytes.
            made[key] = data_uri(pixels(np.where(levels < LEVELS, levels | 1, levels)))
        high, wide = next(iter(shown.values())).shape
        if sum(map(len, made.values())) <= _MAPS or max(high, wide) <= 16:
            return made, (math.ceil((queries or length) / high), math.ceil(length / wide))
        shown = {key: halved(values) for key, values in shown.items()}
