# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads compare --train`` shows: which sections and which table from the summary of trained mixers."""

import math
from typing import TYPE_CHECKING, Any

from .. import formatting
from ..compare.train.summary import FIGURES, Mixer, Trained, bits
from ..formatting import percent
from .page import Code, Details, Figure, Headline, Notes, Page, Section, made
from .plots import Bars, Panel, Series, bars, lines, of_estimates
from .table import Cell, Column, Estimate, Range, Row, Table, comparison, print_lines, print_table, ratio

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["caveats", "headlines", "page", "print_summary", "table"]


def page(summary: Trained) -> Page:
    """The page of a run."""
    run = {"seconds": None, "sources": []} | summary.results.run  # what an unfinished run lacks
    settings, texts, steps = run["settings"], run["texts"], run["steps"]
    winner = next((arm for arm in summary.arms if arm.key in summary.best("loss")), summary.base)
    pictures = [
        Section("Loss by position", [Figure(
            _positions(summary),
            "Mean loss of the bytes of held-out windows, from one tick to the next. A line that falls to the left of "
            f"the dashed one, which marks the training length of {settings['length']} bytes, uses its context; one "
            "that rises beyond it does not extrapolate. All arms are judged on the same bytes; bars on the right are "
            "95 % intervals of the paired difference, over trainings and windows.",
        )]),
        Section("What is remembered", [Figure(
            _recall(summary),
            f"Associative recall: {settings['pairs']} pairs of key and value in {settings['recall_length']} tokens, "
            "then the keys again; models trained for it alone (guessing among the values that stand there gives "
            f"{percent(1 / settings['pairs'])}). Planted constant: NAME = 12345 stands in a held-out window and is "
            "asked for at its end, of the models trained on text; an answer counts if every byte of it is the "
            "likeliest. Lines are 95 % intervals.",
        )]),
        Section("Costs", [
            Figure(
                _costs(summary),
                "Medians with quartiles, one sequence, all arms in turn token by token on the same machine. The state "
                "is what all layers remember of one sequence, keys and values or a recurrent state, bookkeeping "
                "included.",
            ),
            Figure(_speed(summary), "Training at the training length; × is the ratio to softmax."),
        ]),
        Section("Training and tuning", [Figure(
            _training(summary),
            "Left: loss of the training batches, mean of the seeds. Right: validation loss after a short training at "
            "each learning rate; the best one was taken.",
        )]),
    ]  # fmt: skip
    use = Code(
        "from manyheads.models.decoder import Decoder\n"
        f"model = Decoder.load({str(winner.model)!r})\n"
        "logits, state = model(ids)                # ids [B, T]: bytes as numbers\n"
        "logits, state = model(more, state=state)  # goes on from there"
    )
    lengths = sorted(summary.base.decode)
    by_length = Table(
        [Column("mixer", text=True), *(Column(formatting.length(n)) for n in lengths)],
        [[arm.key, *(_at_length(arm, n) for n in lengths)] for arm in summary.arms],
    )
    orders = {row["order"] for row in summary.results.rows if row["task"] == "train" and row["seed"] == 0}
    order = "the same for all arms" if len(orders) == 1 else f"{len(orders)} orders"
    batch = max(1, settings["tokens"] // settings["length"])
    about = [
        ("models", f"{settings['layers']} layers of {settings['dim']} channels, {settings['heads']} heads; "
         "feed-forward width chosen so that parameters match", ""),
        ("budget", f"{settings['budget']:,} tokens per arm: {len(settings['rates'])} tuning runs of {steps['tune']} "
         f"steps, {settings['seeds']} trainings of {steps['text']} steps of {batch} × {settings['length']} bytes, "
         f"{steps['recall']} steps of associative recall",
         f"AdamW, learning rates {', '.join(map(str, settings['rates']))}; order of the bytes: {order}"),
        ("text", f"{texts['files']} files; bytes: {texts['train']:,} to train on, {texts['validation']:,} to tune on, "
         f"{texts['test']:,} held out", f"parted by file; sha256 {texts['sha256']}"),
        ("seed", settings["seed"], ""),
    ]  # fmt: skip
    skipped = [f"The task {task} was skipped: {reason}." for task, reason in run["skipped"].items()]
    return Page(
        run["model"]["name"], "Token mixers trained and compared",
        f"{run['model']['name']} on {settings['device']}: {settings['layers']} layers of {settings['dim']} "
        f"channels, {settings['budget']:,} tokens for each mixer; {texts['files']} text files as bytes; "
        f"training length {settings['length']}; seed {settings['seed']}",
        [Headline(line) for line in headlines(summary)],
        [
            *pictures, Section("All figures", [
                table(summary), Details("State and decoding at every length", by_length) if lengths else None,
            ]),
            Section("Use a trained model", [use]), Section("Read with care", [Notes([*caveats(summary), *skipped])]),
            made(
                run, about,
                "Intervals: losses by bootstraps over trainings and over windows, widened for few of them, squared and "
                "added; shares by Wilson, their paired differences by Newcombe. The rows are in rows.jsonl beside this "
                "page; manyheads report draws it again.",
                "made through manyheads.compare",
            ),
            sources(run),
        ],
    )  # fmt: skip


def headlines(summary: Trained) -> list[str]:
    """What the figures say, computed and never typed."""
    base, said = summary.base, []
    reach = summary.results.run["settings"]["longest"]
    if best := [arm for arm in summary.arms if arm.key in summary.best("loss")]:
        arm = best[0]
        loss = f"{bits(arm.figures['loss']).value:.3f} bits per byte"
        said.append(f"{arm.key} has the lowest loss on held-out text, {loss}{_against(arm, 'loss', arm is base)}.")
    if best := [arm for arm in summary.arms if arm.key in summary.best("beyond")]:
        arm = best[0]
        loss = f"{bits(arm.figures['beyond']).value:.3f} bits per byte"
        said.append(
            f"At up to {reach} times the training length {arm.key} has the lowest, {loss}"
            f"{_against(arm, 'beyond', arm is base)}."
        )
    if "recall" in base.figures:
        shares = ", ".join(
            f"{arm.key} {100 * arm.figures['recall'].value:.0f} %" for arm in summary.arms if "recall" in arm.figures
        )
        said.append(f"Associative recall after one training of equal length: {shares}.")
    if base.decode:
        faster = [f"{arm.key} {crossover_text(arm)} tokens" for arm in summary.arms[1:] if arm.crossover is not None]
        never = [arm.key for arm in summary.arms[1:] if arm.decode and arm.crossover is None]
        last = formatting.length(max(base.decode))
        parts = [f"faster than softmax: {', '.join(faster)}"] if faster else []
        parts += [f"not faster up to {last} tokens: {', '.join(never)}"] if never else []
        if parts:
            said.append(f"Decoding on this machine: {'; '.join(parts)}.")
    return said


def _against(arm: Mixer, name: str, base: bool) -> str:
    if base or name not in arm.deltas:
        return ""
    delta = arm.deltas[name]
    told = "" if delta.excludes_zero else ", not told apart from softmax"
    return f" ({bits(delta).value:+.3f} against softmax, {_range(bits(delta))}{told})"


def caveats(summary: Trained) -> list[str]:
    """What the reader has to know before believing a figure; the ones that this run calls for."""
    run = summary.results.run
    settings = run["settings"]
    said = [
        "These are small models trained briefly on this text. They say which mixer learns fastest here on an equal "
        "number of tokens, not how they rank after long training or at a larger size; papers' figures are others.",
        f"{len(summary.arms)} arms are compared, and the intervals are not widened for that: of twenty true ties, "
        "one is expected to be marked as a difference.",
        "Associative recall is one training per arm: its interval is over sequences and says nothing about luck in "
        "training, which decides whether a model of this size learns the task in time.",
        "Equal tokens are not equal time: see the training speed. Timings are of this machine and of the code here, "
        f"{settings['threads']} thread(s); a mixer without a kernel for this device may be slower than it need be.",
    ]
    steps = run["steps"]
    said.append(
        f"Learning rates were tuned on trainings of {steps['tune']} steps, those that are judged have {steps['text']}: "
        "what is best early may be too large later."
    )
    if settings["seeds"] == 1:
        said.append("One training per arm: intervals of losses are over windows only. --seeds gives more.")
    elif settings["seeds"] < 5:
        said.append(
            f"Losses rest on {settings['seeds']} trainings per arm; --seeds gives more, and narrower intervals."
        )
    if edges := [f"{arm.key} ({arm.rate:g})" for arm in summary.arms if arm.edge]:
        said.append(
            f"The best learning rate was the smallest or largest tried for {', '.join(edges)}: "
            "a wider list might serve them better."
        )
    if "needle" in summary.base.figures and max(a.figures["needle"].value for a in summary.arms) < 0.1:
        costs = ", ".join(f"{a.key} {a.needle_nats:.2f}" for a in summary.arms if a.needle_nats is not None)
        said.append(
            "No model of this size recalls planted constants; nats per byte of the answers, of which a guess at five "
            f"digits costs 2.30: {costs}."
        )
    if any(row.get("diverged") for row in summary.results.rows):
        said.append("Some trainings at the larger learning rates diverged; they count as having learned nothing.")
    if any(row.get("overlaps") for row in summary.results.rows):
        said.append("The held-out text is short: some windows share bytes, and the intervals are too narrow.")
    if run["texts"]["files"] < 10:
        said.append(
            "The text has fewer than ten files: each was cut in three, and held-out parts are of the same files."
        )
    if not summary.results.finished:
        said.append("This run is not finished. Go on with manyheads compare --resume.")
    return said


def _range(found: Estimate) -> str:
    return formatting.interval(found.low, found.high)


def crossover_text(arm: Mixer, training: bool = False) -> str:
    """From which length on decoding, or training, is faster than softmax, in a few words."""
    measured, found = (arm.speeds, arm.train_crossover) if training else (arm.decode, arm.crossover)
    if not measured:
        return ""
    if found is None:
        return f"not up to {formatting.length(max(measured))}"
    return f"from {formatting.length(found)}" + (" or less" if found <= min(measured) else "")


def _at_length(arm: Mixer, length: int) -> Cell:
    if length not in arm.decode:
        return Cell("")
    return Cell(formatting.size(arm.state[length]), f"{arm.decode[length].value:.3g} ms")


def table(summary: Trained) -> Table:
    """One row per mixer, for page and terminal."""
    settings, base = summary.results.run["settings"], summary.base
    known = {
        "loss": Column("held-out loss", "bits/byte", higher=False),
        "beyond": Column(f"loss Δ up to\n{settings['longest']}× length", "bits/byte", higher=False, relative=True),
        "recall": Column("associative\nrecall", higher=True, share=True),
        "needle": Column("planted\nconstant", higher=True, share=True),
    }
    columns = {name: column for name, column in known.items() if name in base.figures}
    longest = formatting.length(max(settings["lengths"]))
    rows = []
    for arm in summary.arms:
        figures, deltas = (
            {name: found if FIGURES[name].share else bits(found) for name, found in of.items()}
            for of in (arm.figures, arm.deltas)
        )
        best = frozenset(name for name in columns if arm.key in summary.best(name))
        rate = Cell("" if arm.rate is None else f"{arm.rate:g}", "", f"{arm.parameters:,} parameters")
        rows.append(Row(arm.key, "", figures, deltas, best, "", [rate], _cost_cells(arm, base)))
    heads = ("training\ntokens/s", f"state\nat {longest}", f"ms/token\nat {longest}",
             "trains faster\nthan softmax", "decodes faster\nthan softmax")  # fmt: skip
    return comparison(
        "mixer", columns, rows, before=[Column("rate")], after=[Column(name) for name in heads],
        note="Below a figure its 95 % interval, on the page then the difference to softmax on the same windows and "
        "seeds; * marks a difference whose interval excludes zero. Loss Δ is that difference (for softmax: the loss). "
        "The best is in colour.",
    )  # fmt: skip


def _cost_cells(arm: Mixer, base: Mixer) -> list[Cell]:
    if arm.speed is None or base.speed is None:
        return [Cell("")] * 5
    last = max(arm.decode)
    costs = (
        (f"{arm.speed.value:,.0f}", arm.speed.value, base.speed.value),
        (formatting.size(arm.state[last]), arm.state[last], base.state[last]),
        (f"{arm.decode[last].value:.3g}", arm.decode[last].value, base.decode[last].value),
    )
    cells = [ratio(text, value, None if arm is base else other) for text, value, other in costs]
    return [*cells, *(Cell("" if arm is base else crossover_text(arm, training)) for training in (True, False))]


def print_summary(summary: Trained, console: "Console") -> None:
    """Print one row per mixer and what has to be known to read it."""
    run, shown = summary.results.run, table(summary)
    settings = run["settings"]
    title = f"{run['model']['name']}, {settings['budget']:,} tokens each"
    print_table(Table(shown.columns, shown.rows, title), console)
    seeds = f"{settings['seeds']} training(s) each, {settings['samples']} windows"
    print_lines(
        [
            f"second line: 95 % interval over {seeds}; loss Δ: less that of softmax; * differs from softmax; "
            "green: best",
            "equal for all: parameters within 2 %, bytes and their order, "
            f"{len(settings['rates'])} learning rates tried",
            *[f"skipped {task}: {reason}" for task, reason in run["skipped"].items()],
            f"seed {settings['seed']}; models: {summary.results.folder / 'models'}; report: {summary.results.report}",
        ],
        console,
    )


def _positions(summary: Trained) -> str:
    """Loss by position in the window, and the same less softmax: does a mixer use context, and beyond its training?"""
    if not all(arm.spans for arm in summary.arms):
        return ""
    length = summary.results.run["settings"]["length"]
    left, right = [], []
    for i, arm in enumerate(summary.arms):
        ends = [last * 1.03 ** (i - len(summary.arms) / 2) for _, last, _, _ in arm.spans]
        left.append(Series(arm.key, ends, [bits(e).value for _, _, e, _ in arm.spans]))
        right.append(of_estimates(arm.key, ends, [bits(delta) for _, _, _, delta in arm.spans]))
    x, ticks = "bytes of context, up to (log scale)", _ticks([last for _, last, _, _ in summary.base.spans])
    mark = [(float(length), "")]
    said = "; ".join(
        f"{arm.key} " + ", ".join(f"{bits(e).value:.2f} up to {last}" for _, last, e, _ in arm.spans)
        for arm in summary.arms
    )
    return lines(
        [
            Panel(left, "loss by position", x, "bits per byte (lower is better)", "x", ticks, marks=mark),
            Panel(right, "the same, less softmax", x, "bits per byte", "x", ticks, marks=mark, fit=True),
        ],
        f"Loss in bits per byte by position; trained on {length} bytes. {said}.", height=400,
    )  # fmt: skip


def _ticks(lengths: list[int]) -> list[tuple[float, str]]:
    return [(float(n), formatting.length(n)) for n in lengths]


def _recall(summary: Trained) -> str:
    """Share of right answers in associative recall, and of planted constants."""
    names = [name for name in ("recall", "needle") if name in summary.base.figures]
    if not names:
        return ""
    panels = []
    for name in names:
        found = [arm.figures.get(name) for arm in summary.arms]
        values = [e and Range(100 * e.value, 100 * e.low, 100 * e.high) for e in found]
        notes = ["" if e is None else percent(e.value) for e in found]
        panels.append(Bars(f"{FIGURES[name].title}, % right", values, notes, top=100))
    said = "; ".join(
        f"{arm.key} " + ", ".join(f"{FIGURES[n].title} {percent(arm.figures[n].value)}" for n in names)
        for arm in summary.arms
        if all(n in arm.figures for n in names)
    )
    return bars([arm.key for arm in summary.arms], panels, f"Right answers. {said}.")


def _costs(summary: Trained) -> str:
    """Decoding time and state against length."""
    if not all(arm.decode for arm in summary.arms):
        return ""
    decode, state = [], []
    for arm in summary.arms:
        lengths = sorted(arm.decode)
        decode.append(of_estimates(arm.key, lengths, [arm.decode[n] for n in lengths]))
        state.append(Series(arm.key, lengths, [arm.state[n] / 1e3 for n in lengths]))
    x, ticks = "tokens so far (log scale)", _ticks(sorted(summary.base.decode))
    said = "; ".join(f"{arm.key}: {crossover_text(arm)}" for arm in summary.arms[1:])
    return lines(
        [
            Panel(decode, "decoding (log scale)", x, "ms/token", "xy", ticks),
            Panel(state, "state (log scale)", x, "kB", "xy", ticks),
        ],
        f"Costs by length. Decoding is faster than softmax: {said}.", height=380,
    )  # fmt: skip


def _speed(summary: Trained) -> str:
    """Training speed, a bar for each mixer."""
    base = summary.base.speed
    if base is None:
        return ""
    speeds = [arm.speed for arm in summary.arms]
    notes = ["" if e is None else f"{e.value:,.0f}  ×{e.value / base.value:.2f}" for e in speeds]
    said = "; ".join(f"{arm.key} {note}" for arm, note in zip(summary.arms, notes, strict=True))
    return bars(
        [arm.key for arm in summary.arms], [Bars("training, tokens/s", speeds, notes, base.value)],
        f"Training speed in tokens per second, and its ratio to softmax. {said}.",
    )  # fmt: skip


def _training(summary: Trained) -> str:
    """Loss while training, and validation loss by learning rate."""
    if not all(arm.curve and arm.tuned for arm in summary.arms):
        return ""
    curve = [
        Series(arm.key, [t / 1000 for t, _ in arm.curve], [y / math.log(2) for _, y in arm.curve])
        for arm in summary.arms
    ]
    rates = sorted(summary.base.tuned)
    tuned = [
        Series(arm.key, sorted(arm.tuned), [arm.tuned[rate] / math.log(2) for rate in sorted(arm.tuned)])
        for arm in summary.arms
    ]
    said = "; ".join(f"{arm.key}: rate {arm.rate:g}" for arm in summary.arms)
    return lines(
        [
            Panel(curve, "loss while training", "thousands of tokens", "bits per byte"),
            Panel(tuned, "tuning: loss by learning rate", "learning rate (log scale)", "bits per byte", "x",
                  [(rate, f"{rate:g}") for rate in rates]),
        ],
        f"Training and tuning. {said}.", height=380,
    )  # fmt: skip


def sources(run: dict[str, Any]) -> Section:
    """The texts that contexts were cut from, folded away."""
    rows = [[one["name"], one["sha256"][:16]] for one in run["sources"]]
    listed = Table([Column("text", text=True), Column("sha256", text=True)], rows)
    return Section("", [Details(f"The {len(rows)} texts that were read", listed)] if rows else [])
