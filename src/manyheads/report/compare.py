# SPDX-License-Identifier: Apache-2.0
"""What an experiment shows: page and terminal table of any run, whatever its tasks measure."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .. import formatting
from ..experiment.arms import BASELINE
from ..experiment.estimates import QUARTILES
from .compare_plots import pictures
from .page import Headline, Notes, Page, Section, made
from .table import Cell, Column, Table, print_lines, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from ..experiment import Arm, Estimate
    from .summary import Measured, Summary

__all__ = ["caveats", "explained", "headlines", "page", "print_summary", "table"]

_FEW = 20  # contexts below which a note is made of them
_NAMED = 3  # arms that a sentence names


def page(summary: Summary) -> Page:
    """The page of a run."""
    run, experiment = summary.results.run, summary.experiment
    model, texts = run["model"], run["texts"]
    about: list[tuple[str, Any, str]] = [("model", model["name"], _identity(model))]
    if texts:
        about.append(
            ("text", f"{texts['files']} files, {texts['characters']:,} characters", f"sha256 {texts['sha256']}")
        )
    about += [(f"task {key}", _fields(fields), "") for key, fields in experiment["tasks"].items()]
    about += [("seed", experiment["seed"], f"of {len(experiment['seeds'])} training(s) or draw(s)")]
    skipped = [f"The task {task} was skipped: {reason}." for task, reason in run["skipped"].items()]
    return Page(
        model["name"], "Strategies compared", _short(run), [Headline(line) for line in headlines(summary)],
        [
            Section("What is compared", [Notes(explained(summary))]), *pictures(summary),
            Section("All figures", _tables(summary)),
            Section("Read with care", [Notes([*caveats(summary), *skipped])]),
            made(
                run, about,
                f"Intervals: {'; '.join(_intervals(summary))}. The rows are in the folder units beside this page; "
                "manyheads report draws it again.", "made in Python",
            ),
        ],
    )  # fmt: skip


def _fields(fields: dict[str, str]) -> str:
    """The sizes of a task in words; those that are not set, and other tasks that it names, are left out."""
    shown = {name: value.strip("'") for name, value in fields.items() if name != "task" and value != "None"}
    tasks = {name for name, value in shown.items() if value[:1].isupper() and value.endswith(")")}
    return ", ".join(f"{name} {value}" for name, value in shown.items() if value and name not in tasks)


def explained(summary: Summary) -> list[str]:
    """What the baseline, a budget and each metric are, for a reader who knows none of them."""
    base, equal = summary.base, summary.experiment["equal"]
    budgets = any(arm.budget is not None for arm in summary.arms)
    what = ", the model as it is, which keeps all that it has read," if budgets and base.name == BASELINE else ""
    said = [f"All others are compared with {base.name}{what} on the same samples."]
    if budgets:
        said.append(
            f"Budget: how much a strategy may keep of that{'' if equal == 'none' else f', equal {equal} for all'}."
        )
    return [*said, *(f"{_capital(one.name)}: {one.metric.what}." for one in summary.measured if one.metric.what)]


def headlines(summary: Summary) -> list[str]:
    """What the figures say, a sentence for each metric that arms are ranked by; computed, never typed."""
    weak = [f"{_capital(one.name)}: {one.weak}." for one in summary.measured if one.weak]
    return weak + [_sentence(summary, one) for one in summary.measured if one.ranks]


def _sentence(summary: Summary, one: Measured) -> str:
    base = summary.estimate(one, summary.base)
    parts = []
    for budget, arms in summary.groups.items():
        known = [arm for arm in arms if arm.key in one.rows]
        best = summary.best(one, known)
        at = "" if budget is None else f"at a budget of {_budget(budget, summary)} "
        if len(known) == 1:
            parts.append(f"{at}{known[0].name} {_words(summary, one, known[0])}")
        elif best:
            more = f" and {len(best) - _NAMED} more, not told apart" if len(best) > _NAMED else ""
            who = " and ".join(arm.name for arm in best[:_NAMED]) + more
            parts.append(f"{at}{who} {'is' if len(best) == 1 else 'are'} best, {_words(summary, one, best[0])}")
        elif known and (top := summary.top(one, known)) is not None and summary.fails(one, top):
            closest = f" ({top.name} comes closest, {_words(summary, one, top)})"
            some = summary.estimate(one, top)
            more = closest if some is not None and some.value > 0 else ""
            parts.append(f"{at}no strategy exceeds {formatting.percent(one.metric.floor or 0.0)}{more}")
        elif known:
            parts.append(f"{at}no strategy is told apart from the others")
    than = "" if base is None else f", {summary.base.name} {_value(one, base)}"
    better = "higher" if one.metric.higher else "lower"
    return f"{_capital(one.name)} ({better} is better{than}): {'; '.join(parts) or 'nothing to compare'}."


def _words(summary: Summary, one: Measured, arm: Arm) -> str:
    """A figure with its interval; as difference to the baseline where that is the sharper way to say it."""
    found, delta = summary.estimate(one, arm), summary.delta(one, arm)
    if found is None:
        return "not measured"
    if one.metric.kind == "share" or one.fixed or delta is None:
        return f"{_value(one, found)}{_range(one, found)}"
    apart = "" if delta.excludes_zero else f", not told apart from {summary.base.name}"
    return f"{_value(one, delta, True)} {one.metric.unit}{_range(one, delta)}{apart}".replace("  ", " ")


def _value(one: Measured, found: Estimate, signed: bool = False) -> str:
    if one.metric.kind == "share":
        return formatting.percent(found.value, signed)
    return f"{found.value:+.3g}" if signed else formatting.number(found.value)


def _range(one: Measured, found: Estimate) -> str:
    if not found.bounded:
        return " (one context, no interval)"
    return f" ({formatting.interval(found.low, found.high, one.metric.kind == 'share')})"


def caveats(summary: Summary) -> list[str]:
    """What the reader has to know before believing a figure; the ones that this run calls for."""
    run, rows = summary.results.run, summary.results.rows
    said = [
        "These are figures of this model on these samples. A small model and short contexts do not reproduce the "
        "figures of a paper, and strategies may rank otherwise on larger ones.",
    ]
    if len(summary.arms) > 2:
        said.append(
            f"{len(summary.arms)} arms are compared, and the intervals are not widened for that: of twenty true ties, "
            "one is expected to be marked as a difference."
        )
    if not summary.results.finished:
        said.append(
            "This run is not finished: the figures are of the part that is done. Go on with manyheads "
            f"{'train' if run.get('kind') == 'field' else 'compare'} --resume."
        )
    if any(row.about.get("overlaps") for row in rows):
        said.append(
            "The text is short for so many contexts: some share tokens, and the intervals are too narrow. "
            "Give more text."
        )
    few = [found.groups for one in summary.measured if not one.cost and (found := _of_base(summary, one))]
    if few and min(few) < _FEW:
        said.append(f"Some figures rest on {min(few)} contexts; --samples gives more, and narrower intervals.")
    if any(one.metric.kind == "time" for one in summary.measured):
        said.append(
            f"Timings are medians with quartiles of this machine, {run['threads']} thread(s); every arm is timed in "
            "every round, and ratios are those of the same round."
        )
    return said


def _tables(summary: Summary) -> list[Table]:
    """Quality and costs apart, so that neither is wider than a page."""
    parts = ([one for one in summary.measured if one.cost is costs] for costs in (False, True))
    first, *more = (table(summary, part) for part in parts if part)
    return [first, *(dataclasses.replace(each, note="") for each in more)]  # one note is for both


def table(summary: Summary, measured: Sequence[Measured] | None = None) -> Table:
    """One row per arm and a column for each of ``measured``, all when None."""
    chosen = summary.measured if measured is None else measured
    sized = any(one.metric.unit == "bytes" for one in summary.measured)  # a task has looked more closely
    held = {} if sized else {arm.key: value for arm in summary.arms if (value := summary.held(arm)) is not None}
    base = held.get(summary.base.key)
    best = {one.key: {arm.key for arms in summary.groups.values() for arm in summary.best(one, arms)} for one in chosen}
    budgets = any(arm.budget is not None for arm in summary.arms)
    rows = []
    for arm in summary.arms:
        row = [Cell(arm.name, title=arm.key)]
        if budgets:
            row.append(Cell("" if arm.budget is None else _budget(arm.budget, summary)))
        if held:
            row.append(_held(held.get(arm.key), None if arm == summary.base else base))
        rows.append(row + [_cell(summary, one, arm, arm.key in best[one.key]) for one in chosen])
    equal = summary.experiment["equal"]
    columns = [
        Column("strategy", text=True), *([Column("budget", f"equal {equal}" if equal != "none" else "")] * budgets),
        *([Column("cache held")] if held else []), *(_column(summary, one) for one in chosen),
    ]  # fmt: skip
    return Table(
        columns, rows, labels=1 + budgets,
        note="Below a figure its 95 % interval, for means the paired difference to "
        f"{summary.base.name} with its interval, for times and sizes the ratio. * marks a difference to "
        f"{summary.base.name} whose interval excludes zero; the best (of each budget), and those that are not told "
        "apart from it, are in colour.",
    )  # fmt: skip


def _column(summary: Summary, one: Measured) -> Column:
    found = _of_base(summary, one)
    note = "" if found is None else _counts(found)
    unit = "" if one.metric.unit == "bytes" else one.metric.unit
    return Column(one.name, "not discriminative" if one.weak else unit, note)


def _cell(summary: Summary, one: Measured, arm: Arm, best: bool) -> Cell:
    found, delta, share = summary.estimate(one, arm), summary.delta(one, arm), one.metric.kind == "share"
    if found is None:
        return Cell("")
    if one.cost:
        text = formatting.size(found.value) if one.metric.unit == "bytes" else formatting.number(found.value)
        return Cell(text, "" if delta is None else f"×{delta.value:.3g}", _quartiles(one, found))
    text, within = _value(one, found), formatting.interval(found.low, found.high, share)
    if one.weak or delta is None:
        return Cell(text, within, best=best and not one.weak)  # what is weak is neither marked nor ranked
    mark = "*" if delta.excludes_zero else ""
    if one.fixed or share:
        range_ = formatting.interval(delta.low, delta.high, share)
        return Cell(text + mark, within, f"{_value(one, delta, share)} ({range_})", best)
    change = f"{delta.value:+.3g}" + (_range(one, delta) if delta.bounded else "")
    return Cell(text + mark, change, within, best)


def _quartiles(one: Measured, found: Estimate) -> str:
    return formatting.interval(found.low, found.high) if one.metric.kind == "time" else ""


def _held(bytes_: float | None, base: float | None) -> Cell:
    if bytes_ is None:
        return Cell("")
    return Cell(formatting.size(bytes_), "" if not base else f"{100 * bytes_ / base:.1f} %")


def print_summary(summary: Summary, console: Console) -> None:
    """Print one row per arm and what has to be known to read it."""
    run, base = summary.results.run, summary.base.name
    of_budget = " at its budget" if any(arm.budget is not None for arm in summary.arms) else ""
    shown = table(summary)
    for one in summary.measured:
        if one.weak:
            console.print(f"warning: {one.name}: {one.weak}", style="yellow", markup=False, soft_wrap=True)
    print_table(dataclasses.replace(shown, title=_short(run), note=""), console)
    print_lines(
        [
            f"second line: 95 % interval, for means the difference to {base}, for times and sizes the ratio to it; "
            f"* differs from {base}; green: best{of_budget}, or not told apart from it and above 0",
            *(f"{one.name}: {one.metric.what}" for one in summary.measured if one.metric.what),
            f"intervals: {'; '.join(_intervals(summary))}",
            *_trained(run),
            *_floors(summary),
            *_protected(summary),
            *[f"skipped {task}: {reason}" for task, reason in run["skipped"].items()],
            f"seed {summary.experiment['seed']}; report: {summary.results.report}",
        ],
        console,
    )


def _trained(run: dict[str, Any]) -> list[str]:
    """What every arm of a training has read; the budget holds the choice of a learning rate and the recall too."""
    if not (size := run.get("training")):
        return []
    steps, step = size["steps"], max(1, size["tokens"] // size["length"]) * size["length"]
    recall = steps["recall"] * size["recall_batch"] * size["recall_length"]
    return [
        f"every arm: {steps['text'] * step:,} bytes of text in {steps['text']} steps, for each of {size['seeds']} "
        f"seeds; {steps['tune'] * step:,} for each of {len(size['rates'])} learning rates; {recall:,} tokens of recall"
    ]


def _protected(summary: Summary) -> list[str]:
    arms = [arm.key for arm in summary.arms if "protect=" in arm.key]
    said = "a budget is a target there, which protected tokens may exceed: see the bytes that are held"
    return [f"{', '.join(arms)}: {said}"] if arms else []


def _floors(summary: Summary) -> list[str]:
    floors = [
        f"{one.name} {'' if one.metric.higher else 'at most '}{formatting.percent(one.metric.floor)}"
        for one in summary.measured
        if one.metric.floor is not None
    ]
    return [f"what full has to be better than, or the task tells nothing: {', '.join(floors)}"] if floors else []


def _intervals(summary: Summary) -> list[str]:
    """For each kind of interval, in words, which figures have it and of how many samples they are."""
    kinds: dict[str, list[str]] = {}
    for one in summary.measured:
        if (found := _of_base(summary, one)) is None or (one.cost and not found.bounded):
            continue
        count = f" (n = {found.n})" if found.groups == found.n else f" (n = {found.n} in {found.groups} contexts)"
        kinds.setdefault(found.interval, []).append(one.name + count)
        deltas = [delta for arm in summary.arms[1:] if (delta := summary.delta(one, arm)) is not None and delta.bounded]
        if deltas and deltas[0].interval != found.interval:
            (kind, _), *_ = Counter(delta.interval for delta in deltas).most_common(1)
            kinds.setdefault(kind, []).append(f"{'ratio' if one.cost else 'difference'} of {one.name}")
    return [f"{kind}: {', '.join(names)}" for kind, names in kinds.items()]


def _of_base(summary: Summary, one: Measured) -> Estimate | None:
    return summary.estimate(one, summary.base)


def _counts(found: Estimate) -> str:
    if found.interval == QUARTILES:
        return f"n = {found.n}; {found.interval}"
    return f"n = {found.n} in {found.groups} contexts; {found.interval}"


def _budget(value: int | float, summary: Summary) -> str:
    """A budget in the unit that the arms share."""
    equal = summary.experiment["equal"]
    return formatting.budget(value) if equal == "slots" or (isinstance(value, float) and value <= 1) else f"{value:g}"


def _short(run: dict[str, Any]) -> str:
    """The run in one line."""
    experiment, texts = run["experiment"], run["texts"]
    named = {task["text"].strip("'") for task in experiment["tasks"].values() if "text" in task}
    read = f"; {texts['files']} text files" if texts else "".join(f"; text: {name}" for name in sorted(named))
    tasks = ", ".join(experiment["tasks"])
    model = run["model"]
    return (
        f"{model['name']} ({_identity(model, short=True)}) on {experiment['device']}{read}; {tasks}; seed "
        f"{experiment['seed']}"
    )


def _identity(model: dict[str, Any], short: bool = False) -> str:
    """What a model is: class and size of a loaded one, else its kind."""
    if "parameters" not in model:
        return str(model.get("kind", "")).replace("_", " ")
    size = f"{model['parameters'] / 1e6:.1f} million parameters, {model['dtype']}"
    return f"{model['class']}, {size}" + ("" if short else f", weights sha256 {model['weights_sha256']}")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
