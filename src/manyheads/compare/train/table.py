# SPDX-License-Identifier: Apache-2.0
"""A summary of trained mixers as a table in the terminal."""

import math

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..stats import Estimate
from ..table import size_text
from .summary import FIGURES, Mixer, Trained, bits

__all__ = ["crossover_text", "length_text", "print_summary"]


def length_text(length: float) -> str:
    """``16384`` -> ``16k``."""
    return f"{length / 1024:.3g}k" if length >= 1024 else f"{length:.0f}"


def crossover_text(arm: Mixer, training: bool = False) -> str:
    """From which length on decoding, or training, is faster than softmax, in a few words."""
    measured, found = (arm.speeds, arm.train_crossover) if training else (arm.decode, arm.crossover)
    if not measured:
        return ""
    first, last = min(measured), max(measured)
    if found is None:
        return f"not up to {length_text(last)}"
    return f"from {length_text(found)}" + (" or less" if found <= first else "")


def print_summary(summary: Trained, console: Console) -> None:
    """Print one row per mixer and what has to be known to read it."""
    run = summary.results.run
    settings, base = run["settings"], summary.base
    shown = [name for name in FIGURES if name in base.figures]
    titles = {
        "loss": "held-out loss\nbits/byte", "beyond": f"loss Δ up to\n{settings['longest']}× length",
        "recall": "associative\nrecall", "needle": "planted\nconstant",
    }  # fmt: skip
    table = Table(
        title=f"{run['model']['name']}, {settings['budget']:,} tokens each", box=box.SIMPLE_HEAD, title_justify="left",
        title_style="bold",
    )  # fmt: skip
    table.add_column("mixer", no_wrap=True)
    longest = length_text(max(settings["lengths"]))
    headings = ["rate", *(titles[name] for name in shown)]
    headings += [
        "training\ntokens/s",
        f"state\nat {longest}",
        f"ms/token\nat {longest}",
        "trains faster\nthan softmax",
        "decodes faster\nthan softmax",
    ]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    best = {name: summary.best(name) for name in shown}
    for arm in summary.arms:
        cells = [Text(arm.key), Text("" if arm.rate is None else f"{arm.rate:g}")]
        cells += [_figure(arm, name, arm is base, arm.key in best[name]) for name in shown]
        cells += _costs(arm, base)
        table.add_row(*cells)
    console.print(table)
    seeds = f"{settings['seeds']} training(s) each, {settings['samples']} windows"
    lines = [
        f"second line: 95 % interval over {seeds}, loss Δ: less that of softmax; * differs from softmax; green: best",
        f"equal for all: parameters within 2 %, bytes and their order, {len(settings['rates'])} learning rates tried",
        *[f"skipped {task}: {reason}" for task, reason in run["skipped"].items()],
        f"seed {settings['seed']}; models: {summary.results.folder / 'models'}; report: {summary.results.report}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _figure(arm: Mixer, name: str, base: bool, best: bool) -> Text:
    if name not in arm.figures:
        return Text("")
    share, mark = FIGURES[name].share, "*" if name in arm.deltas and arm.deltas[name].excludes_zero else ""
    style = "bold green" if best else ""
    if share:
        figure = arm.figures[name]
        text = Text(f"{100 * figure.value:.0f} %{mark}", style)
        return text.append(f"\n{100 * figure.low:.0f} … {100 * figure.high:.0f}", "not bold dim")
    figure = bits(arm.figures[name])
    if base or name not in arm.deltas:
        return Text(f"{figure.value:.3f}", style).append("\n" + interval(figure), "not bold dim")
    delta = bits(arm.deltas[name])
    text = Text(f"{figure.value:.3f} " if name == "loss" else "", style)
    return text.append(f"{delta.value:+.3f}{mark}").append("\n" + interval(delta), "not bold dim")


def interval(figure: Estimate) -> str:
    """The interval of a mean in a few letters."""
    return f"{figure.low:.2f} … {figure.high:.2f}" if math.isfinite(figure.low) else "no interval"


def _costs(arm: Mixer, base: Mixer) -> list[Text]:
    if arm.speed is None or base.speed is None:
        return [Text("")] * 5
    last = max(arm.decode)
    pairs = (
        (f"{arm.speed.value:,.0f}", arm.speed.value / base.speed.value),
        (size_text(arm.state[last]), arm.state[last] / base.state[last]),
        (f"{arm.decode[last].value:.2f}", arm.decode[last].value / base.decode[last].value),
    )
    cells = [Text(text).append("" if arm is base else f"\n×{ratio:.3g}", "dim") for text, ratio in pairs]
    return [*cells, *(Text("" if arm is base else crossover_text(arm, training)) for training in (True, False))]
