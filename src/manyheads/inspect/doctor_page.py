# SPDX-License-Identifier: Apache-2.0
"""The doctor's page: every check with its figure, its threshold, what it means, and the picture behind it."""

from typing import Any

import numpy as np

from ..heads import HeadTable
from .attention_breakdown import FIRST
from .checks import HealthCheck
from .doctor import Diagnosis
from .figures import Line, colours, lines, markup
from .measures import Measures
from .page import DECADES, card_of, fill, heads_of, layer_card, maps_of

__all__ = ["render"]


def render(found: Diagnosis) -> str:
    """The page as HTML. Names and texts are escaped: they come from anywhere."""
    m = found.measures
    sites = list(dict.fromkeys(site for one in m.found.values() for t in one.tables.values() for site in t.sites))
    tables: dict[str, Any] = {}
    maps, cell = maps_of(m.found["attention"], sites, found.run["settings"]["length"])
    checks = [{"check": check, "cards": [c for c in _cards(check, m, tables, sites) if c]} for check in found.checks]
    levels = [check.level for check in found.checks]
    data = {
        "tables": tables, "maps": maps, "heads": heads_of(m.found["attention"], sites), "cell": cell,
        "decades": DECADES, "colours": colours(False), "prompts": [], "series": [], "shown": 0,
    }  # fmt: skip
    counts = [f"{levels.count(level)} to {level}" for level in ("watch", "note") if level in levels]
    return fill(
        "doctor.html.j2", found.run, data=data, checks=checks, loss=f"{found.loss:.3f}",
        summary=" and ".join(counts) if counts else "nothing unusual",
    )  # fmt: skip


def _cards(check: HealthCheck, m: Measures, tables: dict[str, Any], sites: list[str]) -> list[dict[str, Any] | None]:
    """The pictures of a check."""
    papers, own = m.found, m.found["attention"].tables

    def map_of(made: HeadTable, name: str) -> dict[str, Any] | None:
        return card_of(made, name, tables, sites)

    if check.key == "sinks":
        return [map_of(papers["active_dormant"].tables[name], name) for name in ("sink", "drain")]
    if check.key == "activations":
        shown = papers["refined_massive_activations"].tables
        return [layer_card(shown[name], name) for name in ("max / median", "first / others")]
    if check.key == "float16":
        return [layer_card(papers["refined_massive_activations"].tables["max"], "greatest |h|")]
    if check.key == "channels":
        shown = papers["massive_values"].tables
        return [map_of(shown[f"peak {name}"], f"greatest channel of {name}") for name in "qk"]
    if check.key == "idle":
        cards = [map_of(own["entropy"], "entropy"), map_of(papers["body"].tables["written"], "written")]
        return [*cards, None if m.alone is None else map_of(m.alone, "alone")]
    if check.key == "duplicates":
        first = own[FIRST]
        name = "share of the attention elsewhere than the most similar head's"
        apart = HeadTable(name, first.sites, m.head_distance, layers=first.layers)
        return [map_of(apart, "unlike its double"), map_of(own["previous token"], "previous token")]
    if check.key == "contexts" and len(m.contexts[0]) > 1:
        return [_contexts(m)]
    return []


def _contexts(m: Measures) -> dict[str, Any]:
    """Loss of the same tokens by what was read before."""
    sizes, losses = m.contexts
    places = [float(np.log2(size)) for size in sizes]
    mean = losses.mean(1)
    spread = losses - losses[0]
    low, high = (mean[0] + spread.min(1)).tolist(), (mean[0] + spread.max(1)).tolist()
    one = Line("loss", places, mean.tolist(), low, high)
    marks = [(float(np.log2(m.max_context)), "length of the config")] if m.max_context < 2**40 else []
    picture = lines(
        [one], x="tokens read before", y="loss, nats per token", marks=marks,
        ticks=[(float(np.log2(size)), f"{size:,}") for size in sizes],
        name="Loss of the same tokens by length of context: "
        + ", ".join(f"{size} {value:.3f}" for size, value in zip(sizes, mean, strict=True)),
    )  # fmt: skip
    return {
        "title": "loss by length of the context", "about": "the band holds every prompt's own change from the shortest",
        "picture": markup(picture), "log": None, "top": "", "rows": [], "columns": [], "kind": "lines",
    }  # fmt: skip
