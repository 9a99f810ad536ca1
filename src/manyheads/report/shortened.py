# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads shorten`` shows: programs coloured by the attention that their words receive, cut words struck."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formatting import number
from .page import Details, Headline, Page, Section, Text, Tokens, made
from .table import Column, Table

if TYPE_CHECKING:
    from ..text_reducing import Shortened

__all__ = ["page"]

_SHOWN = 12  # programs
_WORDS = 25  # at either end of the table
_LEVELS = 16  # colours of the style sheet


def _coloured(one: Shortened) -> Tokens:
    levels = np.zeros(len(one.pieces), int)
    if one.weights is not None:
        weights = np.asarray(one.weights)
        levels = np.round(_LEVELS * (weights / np.quantile(weights, 0.98)).clip(0, 1)).astype(int)
    shown = [
        (piece, " ".join(filter(None, [f"p{level}" if level else "", "" if kept else "cut"])))
        for piece, kept, level in zip(one.pieces, one.kept, levels.tolist(), strict=True)
    ]
    return Tokens("attention received, mean of the word" if one.weights is not None else "nothing", shown)


def _tables(weights: Any) -> list[Any]:
    if weights is None:
        return []
    made = []
    for name, table in (("statements by category", weights.statements), ("words", weights.words)):
        rows = sorted(table.items(), key=lambda item: -item[1])
        few = rows if len(rows) <= 2 * _WORDS else [*rows[:_WORDS], *rows[-_WORDS:]]
        cells = [[word, number(value)] for word, value in few]
        columns = [Column(name, text=True), Column("attention", "means of a program")]
        made.append(Details(f"{name}: {len(rows)}", Table(columns, cells, repeats=True)))
    return made


def page(
    names: Sequence[str], found: Sequence[Shortened], sizes: Sequence[Sequence[int]], weights: Any, run: dict[str, Any]
) -> Page:
    """The page of a run: ``sizes`` has the tokens of each program, before and after."""
    before, after = (sum(size[i] for size in sizes) for i in (0, 1))
    sections = [
        Section(f"{name}: {size[1]:,} of {size[0]:,} tokens", [_coloured(one)])
        for name, one, size in zip(names[:_SHOWN], found, sizes, strict=False)
    ]
    more = f" The first {_SHOWN} of {len(names)} are shown." if len(names) > _SHOWN else ""
    said = f"{after:,} of {before:,} tokens are left, {after / max(1, before):.0%}."
    return Page(
        "shortened programs", "What is left of a program?", f"{run['strategy']}, attention of {run['model']}",
        [Headline(said)],
        [
            Section("", [Text(f"Struck words are cut; comments and indentation are gone from all.{more}")]), *sections,
            Section("What attention weighs", _tables(weights)),
            made(run, [("strategy", run["strategy"], ""), ("model", run["model"], "")],
                 "1 is what a token of a program receives on average, from others, mean over heads, last layer.",
                 "made in Python"),
        ],
    )  # fmt: skip
