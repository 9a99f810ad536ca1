# SPDX-License-Identifier: Apache-2.0
"""The report: one page that needs no script and no network, drawn from the rows of a run."""

import math
import shlex
from pathlib import Path
from typing import Any

from ..files import write_atomically
from ..html import filled, markup
from . import pictures
from .stats import Estimate
from .summary import FIGURES, ArmSummary, Summary
from .table import budget_text, size_text

__all__ = ["caveats", "headlines", "page", "render", "write_report"]

_TABLE = ("loss", "needle_unseen", "needle_seen", "several", "chained")


def write_report(summary: Summary) -> Path:
    """Write ``report.html`` into the folder of the run and return its path."""
    path = summary.results.report
    write_atomically(path, render(summary))
    return path


def render(summary: Summary) -> str:
    """The page as HTML. Names and texts are escaped: they come from anywhere."""
    run = summary.results.run
    drawn = {
        "pareto": pictures.pareto(summary),
        "recall": pictures.recall_maps(summary),
        "loss": pictures.loss_by_budget(summary),
        "costs": pictures.speed_and_memory(summary),
    }
    return page(
        "report.html.j2",
        run,
        drawn,
        headlines=headlines(summary),
        columns=[FIGURES[name].title for name in _TABLE if name in summary.full.figures],
        counts=[_count(summary, name) for name in _TABLE if name in summary.full.figures],
        rows=[_row(summary, arm) for arm in summary.arms],
        timed=summary.full.decode is not None,
        caveats=caveats(summary),
        short=_short(run),
    )


def page(template: str, run: dict[str, Any], drawn: dict[str, str | None], **given: Any) -> str:
    """``template`` filled with what is known of ``run``, with pictures and all else that is ``given``."""
    return filled(
        template,
        "manyheads.compare",
        run={"seconds": None, "sources": [], "peak_rss_bytes": None} | run,  # what an unfinished run lacks
        pictures={name: markup(svg) if svg else None for name, svg in drawn.items()},
        command=shlex.join(run["command"]) if run["command"] else "made through manyheads.compare",
        size_text=size_text,
        **given,
    )


def headlines(summary: Summary) -> list[str]:
    """What the figures say, a sentence for each budget and kind of quality; computed, never typed."""
    sentences = []
    budgets = sorted({arm.budget for arm in summary.arms[1:]}, key=lambda b: (isinstance(b, int), b), reverse=True)
    for budget in budgets:
        arms = [arm for arm in summary.arms[1:] if arm.budget == budget]
        parts = [text for name in ("loss", "recall") if (text := _winner(summary, arms, name))]
        if parts:
            sentences.append(f"At a budget of {budget_text(budget)}: {'; '.join(parts)}.")
    return sentences


def _winner(summary: Summary, arms: list[ArmSummary], name: str) -> str | None:
    known = [arm for arm in arms if name in arm.figures]
    if not known:
        return None
    kind, full = FIGURES[name], summary.full.figures[name]
    sign = 1 if kind.higher else -1
    best = max(known, key=lambda arm: sign * arm.figures[name].value)
    figure = best.figures[name] if kind.share else best.deltas[name]
    level = [a for a in known if a is not best and a.figures[name].value == best.figures[name].value]
    who = " and ".join(arm.label for arm in (best, *level))
    if kind.share:
        if best.figures[name].value == 0:
            return f"no strategy recalls a planted constant (full: {100 * full.value:.0f} %)"
        return f"{who} recalls the most planted constants, {_words(figure, True)}, full {100 * full.value:.0f} %"
    against = "" if best.deltas[name].excludes_zero else ", not told apart from full"
    return f"{who} loses least on the text that follows, {_words(figure, False)} nats/token{against}"


def _words(figure: Estimate, share: bool) -> str:
    if share:
        return f"{100 * figure.value:.0f} % ({100 * figure.low:.0f} to {100 * figure.high:.0f})"
    if not math.isfinite(figure.low):
        return f"{figure.value:+.3f} (one context, no interval)"
    return f"{figure.value:+.3f} ({figure.low:.3f} to {figure.high:.3f})"


def caveats(summary: Summary) -> list[str]:
    """What the reader has to know before believing a figure; the ones that this run calls for."""
    run, rows = summary.results.run, summary.results.rows
    said = [
        "These are figures of this model on this text. A small model and short contexts do not reproduce the figures "
        "of a paper, and strategies may rank otherwise on larger ones.",
        f"{len(summary.arms)} arms are compared, and the intervals are not widened for that: of twenty true ties, "
        "one is expected to be marked as a difference.",
        "Strategies that evict at every step read what follows a context in chunks so short that no query sees more "
        "than one slot in fifty beyond the budget; all others are exact.",
    ]
    weak = [
        n
        for n in ("needle_unseen", "several", "chained")
        if n in summary.full.figures and summary.full.figures[n].value < 0.5
    ]
    said += [
        f"The model itself, with a full cache, answers {100 * summary.full.figures[n].value:.0f} % of the questions of "
        f"“{FIGURES[n].title}”: this figure says little about the strategies here."
        for n in weak
    ]
    if not summary.results.finished:
        said.append(
            "This run is not finished: the figures are of the part that is done. Go on with manyheads compare --resume."
        )
    if any(row.get("overlaps") for row in rows):
        said.append(
            "The text is short for so many contexts: some share tokens, and the intervals are too narrow. "
            "Give more text."
        )
    few = min((f.contexts for f in summary.full.figures.values()), default=99)
    if few < 20:
        said.append(f"Some figures rest on {few} contexts; --samples gives more, and narrower intervals.")
    if summary.full.prefill is not None:
        said.append(
            f"Timings are medians with quartiles of this machine, {run['settings']['threads']} thread(s), batch 1; "
            "prefill is the dense forward, shared by all arms of a round, and the arm's own compression after it."
        )
    return said


def _row(summary: Summary, arm: ArmSummary) -> dict[str, Any]:
    """Cells of one arm for the large table."""
    full = summary.full
    cells = []
    for name in _TABLE:
        if name not in full.figures:
            continue
        kind, figure, delta = FIGURES[name], arm.figures[name], arm.deltas.get(name)
        cells.append(
            {
                "value": f"{100 * figure.value:.0f} %" if kind.share else f"{figure.value:.3f}",
                "interval": _range(figure, kind.share),
                "delta": None
                if delta is None
                else f"{100 * delta.value:+.0f}"
                if kind.share
                else f"{delta.value:+.3f}",
                "delta_interval": None if delta is None else _range(delta, kind.share),
                "differs": delta is not None and delta.excludes_zero,
                "best": arm.key in summary.best(name),
            }
        )
    times = [
        None
        if mine is None or base is None
        else {
            "value": f"{mine.value:.3g}",
            "interval": f"{mine.low:.3g} to {mine.high:.3g}",
            "ratio": f"×{mine.value / base.value:.2f}",
        }
        for mine, base in ((arm.prefill, full.prefill), (arm.decode, full.decode))
    ]
    return {
        "label": arm.label, "spec": arm.key, "budget": budget_text(arm.budget), "cells": cells, "times": times,
        "bytes": None if arm.bytes is None else size_text(arm.bytes),
        "kept": None if arm.kept is None else f"{100 * arm.kept:.1f} %",
    }  # fmt: skip


def _range(figure: Estimate, share: bool) -> str:
    if not math.isfinite(figure.low):
        return "no interval"
    return f"{100 * figure.low:.0f} to {100 * figure.high:.0f}" if share else f"{figure.low:.3f} to {figure.high:.3f}"


def _count(summary: Summary, name: str) -> str:
    figure = summary.full.figures[name]
    return f"n = {figure.n} in {figure.contexts} contexts"


def _short(run: dict[str, Any]) -> str:
    """The run in one line, for the head of the page."""
    model, settings, texts = run["model"], run["settings"], run["texts"]
    lengths = " and ".join(map(str, settings["lengths"]))
    return (
        f"{model['name']} ({model['class']}, {model['parameters'] / 1e6:.1f} million parameters, {model['dtype']}) "
        f"on {settings['device']}; {texts['files']} text files; contexts of {lengths} tokens; seed {settings['seed']}"
    )
