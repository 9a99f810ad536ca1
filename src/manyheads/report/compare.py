# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads compare`` shows: which sections and which table from the summary of a run."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import formatting
from ..compare.summary import FIGURES, ArmSummary, Summary
from ..formatting import percent
from .colours import Scale
from .page import Details, Figure, Headline, Notes, Page, Section, made
from .plots import Bars, Heat, Panel, apart, bars, heat, lines, of_estimates
from .table import Cell, Column, Estimate, Range, Row, Table, comparison, print_lines, print_table, ratio

if TYPE_CHECKING:
    from rich.console import Console

    from ..compare.bench import Row as Measured

__all__ = ["caveats", "headlines", "page", "print_summary", "table"]

_COLUMNS = {
    "loss": Column("loss Δ", "nats/token", higher=False, relative=True),
    "needle_unseen": Column("needle\nasked after", higher=True, share=True),
    "needle_seen": Column("needle\nasked before", higher=True, share=True),
    "several": Column("one of\nseveral", higher=True, share=True),
    "chained": Column("chained", higher=True, share=True),
}


def page(summary: Summary) -> Page:
    """The page of a run."""
    run = {"seconds": None, "sources": []} | summary.results.run  # what an unfinished run lacks
    settings, model, texts, peak = run["settings"], run["model"], run["texts"], run.get("peak_rss_bytes")
    most = f" The whole process held {formatting.size(peak)} at most." if peak else ""
    pictures = [
        Section("Quality against bytes", [Figure(
            _pareto(summary),
            "Every point is a strategy at a budget, measured after compression on the same contexts as all others; "
            "bars are 95 % intervals, of the paired difference to full on the left and of the share on the right, "
            "where the band is that of full. Points of one budget stand a little apart so that they can be read. Bars "
            "that leave the picture go on: the table has them.",
        )]),
        Section("Recall by depth and length", [Figure(
            _recall(summary),
            "One constant, NAME = 12345, stands at a depth of the context (rows: share of the context before it) of a "
            "length in tokens (columns). The cache is compressed, then the constant is asked for. An answer counts if "
            "every token of it is the likeliest.",
        )]),
        Section("Loss by budget", [Figure(
            _loss(summary),
            "Negative log-likelihood of the text that follows a context, less that of full on the same tokens; bars "
            "are 95 % intervals over contexts.",
        )]),
        Section("Speed and memory", [Figure(
            _costs(summary),
            f"At {settings['lengths'][-1]} tokens; × is the ratio to full in this run, the dashed line is full. Times "
            "are medians, with quartiles as thin lines. Bytes are those really held after compression, bookkeeping "
            f"included.{most}",
        )]),
    ]  # fmt: skip
    about = [
        ("model", model["name"], f"{model['class']}, weights sha256 {model['weights_sha256']}"),
        ("text", f"{texts['files']} files, {texts['characters']:,} characters", f"sha256 {texts['sha256']}"),
        ("seed", settings["seed"], ""),
        ("contexts", f"{settings['samples']} for each task and length, {settings['rounds']} rounds of timing", ""),
    ]
    skipped = [f"The task {task} was skipped: {reason}." for task, reason in run["skipped"].items()]
    how = made(
        run, about,
        "Intervals: Wilson for shares (at the effective sample size where a context has several questions), Newcombe "
        "for their paired differences, percentile bootstrap over contexts, widened for few of them, for losses. The "
        "rows are in rows.jsonl beside this page; manyheads report draws it again.",
        "made through manyheads.compare",
    )  # fmt: skip
    return Page(
        model["name"], "Strategies compared", _short(run), [Headline(line) for line in headlines(summary)],
        [
            *pictures, Section("All figures", [table(summary)]),
            Section("Read with care", [Notes([*caveats(summary), *skipped])]), how, sources(run),
        ],
    )  # fmt: skip


def sources(run: dict[str, Any]) -> Section:
    """The texts that contexts were cut from, folded away."""
    rows = [[one["name"], one["sha256"][:16]] for one in run["sources"]]
    listed = Table([Column("text", text=True), Column("sha256", text=True)], rows)
    return Section("", [Details(f"The {len(rows)} texts that were read", listed)] if rows else [])


def headlines(summary: Summary) -> list[str]:
    """What the figures say, a sentence for each budget and kind of quality; computed, never typed."""
    sentences = []
    budgets = sorted({arm.budget for arm in summary.arms[1:]}, key=lambda b: (isinstance(b, int), b), reverse=True)
    for budget in budgets:
        arms = [arm for arm in summary.arms[1:] if arm.budget == budget]
        parts = [text for name in ("loss", "recall") if (text := _winner(summary, arms, name))]
        if parts:
            sentences.append(f"At a budget of {formatting.budget(budget)}: {'; '.join(parts)}.")
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
            return f"no strategy recalls a planted constant (full: {percent(full.value)})"
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


def table(summary: Summary) -> Table:
    """One row per arm, for page and terminal."""
    full = summary.full
    columns = {
        name: replace(column, note=f"n = {full.figures[name].n} in {full.figures[name].contexts} contexts")
        for name, column in _COLUMNS.items()
        if name in full.figures
    }
    timed = full.decode is not None
    best = {name: _best(summary, name) for name in columns}
    rows = [
        Row(
            arm.label, formatting.budget(arm.budget), arm.figures, arm.deltas,
            frozenset(name for name in columns if arm.key in best[name]), arm.key, [_held(arm)],
            [_time(arm.prefill, arm, full.prefill), _time(arm.decode, arm, full.decode)] if timed else [],
        )
        for arm in summary.arms
    ]  # fmt: skip
    after = [Column("prefill", "s", page=True), Column("decode", "ms/token")] if timed else []
    return comparison(
        "strategy", columns, rows, before=[Column("cache held")], after=after,
        note="Below a figure its 95 % interval. Loss Δ is the difference to full on the same samples (for full: the "
        "loss). * marks a difference to full whose interval excludes zero; the best of each budget is in colour.",
    )  # fmt: skip


def print_summary(summary: Summary, console: "Console") -> None:
    """Print one row per arm and what has to be known to read it."""
    run = summary.results.run
    settings = run["settings"]
    lengths = ", ".join(map(str, settings["lengths"]))
    shown = table(summary)
    print_table(Table(shown.columns, shown.rows, f"{run['model']['name']}, contexts of {lengths} tokens"), console)
    counts = "; ".join(f"{c.name}: {c.note}".replace("\n", " ") for c in shown.columns if c.note)
    print_lines(
        [
            "second line: 95 % interval; * differs from full; green: best at its budget; loss Δ: less that of full",
            f"samples per arm: {counts}",
            *[f"skipped {task}: {reason}" for task, reason in run["skipped"].items()],
            f"seed {settings['seed']}; report: {summary.results.report}",
        ],
        console,
    )


def _best(summary: Summary, name: str) -> set[str]:
    """Keys of the arms that are best at their budget; none where all of a budget tie."""
    best, found = summary.best(name), set()
    for budget in {arm.budget for arm in summary.arms[1:]}:
        mine = {arm.key for arm in summary.arms[1:] if arm.budget == budget and name in arm.figures}
        found |= best & mine if mine - best else set()
    return found


def _held(arm: ArmSummary) -> Cell:
    if arm.bytes is None:
        return Cell("")
    return Cell(formatting.size(arm.bytes), "" if arm.full or arm.kept is None else f"{100 * arm.kept:.1f} %")


def _time(mine: Estimate | None, arm: ArmSummary, base: Estimate | None) -> Cell:
    return (
        Cell("")
        if mine is None
        else ratio(f"{mine.value:.3g}", mine.value, base.value if base and not arm.full else None)
    )


def _short(run: dict[str, Any]) -> str:
    """The run in one line, for the head of the page."""
    model, settings, texts = run["model"], run["settings"], run["texts"]
    lengths = " and ".join(map(str, settings["lengths"]))
    return (
        f"{model['name']} ({model['class']}, {model['parameters'] / 1e6:.1f} million parameters, {model['dtype']}) "
        f"on {settings['device']}; {texts['files']} text files; contexts of {lengths} tokens; seed {settings['seed']}"
    )


def _pareto(summary: Summary) -> str:
    """Quality against bytes held: one panel for the loss, one for recall, a line per strategy."""
    full = summary.full
    names = [name for name in ("loss", "recall") if name in full.figures]
    if not names or full.kept is None:
        return ""
    kept = apart([round(100 * arm.kept, 1) for arm in summary.arms[1:] if arm.kept])
    panels = []
    for name in names:
        share, series = FIGURES[name].share, []
        for label, arms, step in _stepped(summary):
            known = sorted((arm for arm in arms if name in arm.figures and arm.kept), key=lambda arm: arm.kept or 0)
            found = [arm.figures[name] if share else arm.deltas[name] for arm in known]
            x = [100 * (arm.kept or 0) * step for arm in known]
            series.append(of_estimates(label, x, found, 100 if share else 1))
        base = full.figures[name]
        level = (100 * base.value, 100 * base.low, 100 * base.high, "full") if share else (0.0, 0.0, 0.0, "full")
        title = (
            "recall of planted constants\n(higher is better)"
            if share
            else "loss on the text that follows\n(lower is better)"
        )
        panels.append(Panel(
            series, title, "cache held, % of full (log scale)",
            "right answers, %" if share else "loss more than full, nats/token", "x", [(k, f"{k:g}") for k in kept],
            level, fit=not share, limits=(-4, 104) if share else None,
        ))  # fmt: skip
    said = "; ".join(
        f"{arm.key}: {percent(arm.kept or 0)} of the bytes, "
        + ", ".join(_say(arm, name) for name in names if name in arm.figures)
        for arm in summary.arms
    )
    return lines(panels, f"Quality against bytes held. {said}.", height=400)


def _loss(summary: Summary) -> str:
    """Loss by budget, a panel for each length."""
    if "loss" not in summary.full.figures:
        return ""
    panels = []
    for length in summary.results.run["settings"]["lengths"]:
        series = []
        for label, arms, step in _stepped(summary):
            found = [(a, summary.part_delta(a.key, "loss", _at(length=length))) for a in arms]
            known = sorted((100 * _fraction(a.budget, length) * step, e) for a, e in found if e is not None)
            series.append(of_estimates(label, [x for x, _ in known], [e for _, e in known]))
        base = summary.part(summary.full.key, "loss", _at(length=length))
        marks = apart([100 * _fraction(a.budget, length) for a in summary.arms[1:]])
        panels.append(Panel(
            series, f"{length} tokens" + (f" (full: {base.value:.2f} nats/token)" if base else ""),
            "budget, % of the tokens (log scale)", "loss more than full, nats/token", "x",
            [(mark, f"{mark:.3g}") for mark in marks], (0.0, 0.0, 0.0, ""), fit=True,
        ))  # fmt: skip
    said = "; ".join(f"{arm.key} {arm.deltas['loss'].value:+.2f}" for arm in summary.arms[1:] if "loss" in arm.deltas)
    return lines(panels, f"Loss more than full, in nats per token, by budget. {said}.", height=360)


def _recall(summary: Summary) -> str:
    """Share of planted constants recalled, by depth and length: one small map for each arm."""
    rows = [r for r in summary.results.rows if (r["task"], r["metric"]) == ("needle", "unseen")]
    if not rows:
        return ""
    depths, lengths = sorted({r["depth"] for r in rows}), sorted({r["length"] for r in rows})
    arms = [arm for arm in summary.arms if "needle_unseen" in arm.figures]

    def map_of(arm: ArmSummary) -> Heat:
        found = [
            [summary.part(arm.key, "needle_unseen", _at(depth=depth, length=n)) for n in lengths] for depth in depths
        ]
        values = np.array([[math.nan if e is None else e.value for e in row] for row in found])
        texts = [["" if e is None else f"{round(e.value * e.n)}/{e.n}" for e in row] for row in found]
        return Heat(values, _name(arm), texts)

    said = "; ".join(_say(arm, "needle_unseen", arm.key) for arm in arms)
    return heat(
        [map_of(arm) for arm in arms], [percent(d) for d in depths],
        [str(n) for n in lengths], scale=Scale(0, 1), alt=f"Planted constants recalled by depth and length. {said}.",
        axes=("depth of the constant", "tokens of the context; right answers of questions"),
        cell=(max(46.0, 100 / len(lengths)), 20.0),
    )  # fmt: skip


def _costs(summary: Summary) -> str:
    """Bars for every arm, with the ratio to ``full``: prefill, decoding of a token, bytes held."""
    full = summary.full
    kinds: list[tuple[str, Callable[[ArmSummary], Estimate | None]]] = [
        ("prefill, s", lambda arm: arm.prefill), ("decode, ms/token", lambda arm: arm.decode),
        ("cache held, MB", lambda arm: _exact(arm.bytes)), ("GPU peak, MB", lambda arm: _exact(arm.peak)),
    ]  # fmt: skip
    shown = [(title, read) for title, read in kinds if read(full) is not None]
    if not shown:
        return ""
    panels = []
    for title, read in shown:
        base, values = read(full), [read(arm) for arm in summary.arms]
        notes = [
            "" if e is None else f"{e.value:.3g}" + ("" if arm.full or not base else f"  ×{e.value / base.value:.2f}")
            for arm, e in zip(summary.arms, values, strict=True)
        ]
        panels.append(Bars(title, values, notes, base.value if base else None))
    labels = list(dict.fromkeys(arm.label for arm in summary.arms[1:]))
    said = "; ".join(
        f"{arm.key}: " + ", ".join(f"{title} {e.value:.3g}" for title, read in shown if (e := read(arm)) is not None)
        for arm in summary.arms
    )
    tints = [-1 if arm.full else labels.index(arm.label) for arm in summary.arms]
    return bars([_name(arm) for arm in summary.arms], panels, f"Speed and memory. {said}.", tints)


def _exact(count: float | None) -> Estimate | None:
    return None if count is None else Range(*[count / 1e6] * 3)


def _stepped(summary: Summary) -> Iterator[tuple[str, list[ArmSummary], float]]:
    """Arms other than ``full`` by strategy, and the step by which their points stand apart from others'."""
    groups: dict[str, list[ArmSummary]] = {}
    for arm in summary.arms[1:]:
        groups.setdefault(arm.label, []).append(arm)
    for i, (label, arms) in enumerate(groups.items()):
        yield label, arms, 1.035 ** (i - (len(groups) - 1) / 2)


def _at(**wanted: Any) -> Callable[["Measured"], bool]:
    """Picks the rows with these values."""
    return lambda row: all(row[name] == value for name, value in wanted.items())


def _name(arm: ArmSummary) -> str:
    return arm.label if arm.full else f"{arm.label}, {formatting.budget(arm.budget)}"


def _fraction(budget: int | float, length: int) -> float:
    return min(1.0, budget / length) if isinstance(budget, int) else budget


def _say(arm: ArmSummary, name: str, who: str = "") -> str:
    figure = arm.figures[name]
    text = percent(figure.value) if FIGURES[name].share else f"{figure.value:.2f} nats per token"
    return f"{who or FIGURES[name].title} {text}"
