# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads inspect`` shows of images, recordings and translations: maps, and what each word attends to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..formatting import number
from ..inspect.run import WHERE
from ..inspect.signals import Signal
from .colours import Scale, ramp
from .maps import card, sources
from .page import Card, Cards, Overlays, Section, Text
from .plots import Heat, heat
from .token_view import word

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..inspect.run import Inspection

__all__ = ["pictures_of", "queries_of"]

_SHOWN = 4  # images and recordings
_FAR = 8  # times the mean; a greater value asks for logarithmic colours
_LABEL = 6  # characters of a token beside a row


def queries_of(seen: Inspection) -> int | None:
    """Queries of a map where they are not the tokens of the inspection."""
    if seen.run["settings"].get("part") != "cross":
        return None
    return max(p.values["decoder_input_ids"].shape[1] for p in seen.prompts if isinstance(p, Signal))


def pictures_of(seen: Inspection) -> list[Section]:
    """Sections for people who would rather look than read; none where text was read."""
    signals = [p for p in seen.prompts if isinstance(p, Signal)]
    if not signals:
        return []
    if signals[0].grid:
        return [_overlays(seen, signals)]
    cross = seen.others.get("cross", seen)
    found: Any = cross.found[WHERE]
    if not getattr(found, "alignments", None):
        return []
    if signals[0].pieces:
        return [_aligned(cross, found.alignments, signals)]
    cards = list(_alignments(found.alignments, [p for p in cross.prompts if isinstance(p, Signal)]))
    more = "; its heads are in cross.html, those of the encoder in encoder.html" if seen.others else ""
    return [Section("What each token listens to", [
        Text(
            "Cross-attention, mean over layers and heads, by seconds until the recording ends. Each row is divided by "
            f"its greatest value there{more}."
        ), Cards(cards),
    ])]  # fmt: skip


def _overlays(seen: Inspection, signals: list[Signal]) -> Section:
    films = [np.asarray(one.picture)[None] for one in signals[:_SHOWN]]
    drawn, colours, parts = sources(films), ramp(), []
    for n, one in enumerate(signals[:_SHOWN]):
        over = []
        for spec, found in seen.found.items():
            for name, rows in found.series.items():
                title, _, unit = name.partition(", ")
                whole = np.asarray(rows[n], float)
                kind, *more = unit.split(", ")  # of our own series: unit, then which layer and head
                high, wide = one.grid or (0, 0)
                patches = whole[one.prefix : one.prefix + high * wide]
                log = bool(patches.min() > 0 and patches.max() > _FAR * patches.mean())  # else outliers hide the rest
                of = (kind or spec) + (", logarithmic colours" if log else "")
                made = card(patches.reshape(1, high, wide), ", ".join([title, *more]), of, log)
                first = [f"{label} {number(v)}" for label, v in zip(one.labels, whole[: one.prefix], strict=False)]
                over.append({**made, "said": "; ".join([made["said"], *first])})
        size = (films[n].shape[2], films[n].shape[1])
        parts.append(Overlays(n, drawn[n][0], size, over, colours, f"{one.name}, as the model sees it"))
    high, wide = signals[0].grid or (0, 0)
    said = (
        f"A cell is a patch, {high} x {wide} in {signals[0].name}; each map has colours of its own, from its least "
        "to its greatest. Tokens that are no patch are named below it."
    )
    if len(signals) > _SHOWN:
        said += f" The first {_SHOWN} of {len(signals)} images are shown."
    return Section("Over the image", [Text(said), *parts])


def _aligned(cross: Inspection, maps: list[Any], signals: list[Signal]) -> Section:
    """Soft alignments of the sentences that a lens ranks last and first; of the first ones where none does."""
    ranked = [
        (str(name), [int(row["prompt"]) for row in rows])
        for found in cross.found.values()
        for name, rows in found.records.items()
        if rows and all("prompt" in row for row in rows) and len({row["prompt"] for row in rows}) == len(signals)
    ]
    name, order = ranked[0] if ranked else ("", list(range(len(signals))))
    half = _SHOWN // 2
    shown = order if len(order) <= _SHOWN else [*order[:half], *order[-half:]]
    cards = []
    for at in shown:
        one, whole = signals[at], np.asarray(maps[at])
        place = order.index(at) + 1
        title = f"prompt {at}" + (f", place {place} of {len(order)} from the lowest" if name else "")
        best = [one.pieces[min(int(i), len(one.pieces) - 1)] for i in whole.argmax(1)]
        said = "; ".join(f"“{word(row)}” at “{word(piece)}”" for row, piece in zip(one.words, best, strict=False))
        picture = heat(
            [Heat(whole)], [_short(row) for row in one.words], [_short(piece) for piece in one.pieces],
            scale=Scale(0, 1), alt=f"Cross-attention of {one.name}, greatest: {said}.",
            axes=("translation", "sentence"), cell=(max(30.0, min(44.0, 700 / len(one.pieces))), 16.0),
        )  # fmt: skip
        cards.append(Card(title, picture, one.name, said=f"greatest: {said}", width="wide"))
    told = f"; of {len(order)} sentences those that {name} put first and last" if name and len(order) > _SHOWN else ""
    return Section("What each word of a translation attends to", [
        Text(
            f"Cross-attention, mean over layers and heads{told}. Each row is the token that is said, each column one "
            "of the sentence; heads are in cross.html, those of the encoder in encoder.html."
        ), Cards(cards),
    ])  # fmt: skip


def _short(text: str) -> str:
    row = word(text).strip("\n ")
    return row if len(row) <= _LABEL else f"{row[: _LABEL - 1]}…"


def _alignments(maps: list[Any], signals: list[Signal]) -> Iterator[Card]:
    for one, whole in list(zip(signals, maps, strict=True))[:_SHOWN]:
        cell = -(-one.frames // whole.shape[1])  # frames
        heard = whole[:, : max(1, -(-one.heard // cell))]
        shares = heard / np.maximum(heard.max(1, keepdims=True), 1e-30)
        times = [f"{i * cell * one.step:.1f}" for i in range(heard.shape[1])]
        rows = [word(t).strip("\n ") for t in one.words]
        short = [_short(row) for row in one.words]
        best = heard.argmax(1)
        said = "; ".join(f"“{row}” at {times[i]} s" for row, i in zip(rows, best, strict=True))
        alt = f"Cross-attention of {one.name}, greatest at: {said}."
        size = (min(14.0, max(2.6, 700 / len(times))), 15.0)
        picture = heat(
            [Heat(shares)], short, times, scale=Scale(0, 1), alt=alt, axes=("token", "seconds"), cell=size
        )  # fmt: skip
        yield Card(one.name, picture, said=f"greatest at: {said}", width="wide")
