# SPDX-License-Identifier: Apache-2.0
"""The report on trained mixers: one page that needs no script and no network, drawn from the rows of a run."""

from pathlib import Path
from typing import Any

from ...files import write_atomically
from ..report import page
from ..table import size_text
from . import pictures
from .summary import FIGURES, Mixer, Trained, bits
from .table import crossover_text, interval, length_text

__all__ = ["caveats", "headlines", "render", "write_report"]


def write_report(summary: Trained) -> Path:
    """Write ``report.html`` into the folder of the run and return its path."""
    path = summary.results.report
    write_atomically(path, render(summary))
    return path


def render(summary: Trained) -> str:
    """The page as HTML. Names and texts are escaped: they come from anywhere."""
    run = summary.results.run
    settings, lengths = run["settings"], sorted(summary.base.decode)
    drawn = {
        "positions": pictures.positions(summary), "recall": pictures.recall(summary),
        "costs": pictures.costs(summary), "training": pictures.training(summary),
    }  # fmt: skip
    shown = [name for name in FIGURES if name in summary.base.figures]
    winner = next((arm for arm in summary.arms if arm.key in summary.best("loss")), summary.base)
    orders = {row["order"] for row in summary.results.rows if row["task"] == "train" and row["seed"] == 0}
    return page(
        "train.html.j2", run, drawn,
        headlines=headlines(summary),
        caveats=caveats(summary),
        columns=[FIGURES[name].title for name in shown],
        rows=[_row(summary, arm, shown, lengths) for arm in summary.arms],
        lengths=[length_text(n) for n in lengths],
        longest=length_text(max(settings["lengths"])),
        batch=max(1, settings["tokens"] // settings["length"]),
        orders="the same for all arms" if len(orders) == 1 else f"{len(orders)} orders",
        winner=str(winner.model),
        short=f"{run['model']['name']} on {settings['device']}: {settings['layers']} layers of {settings['dim']} "
        f"channels, {settings['budget']:,} tokens for each mixer; {run['texts']['files']} text files as bytes; "
        f"training length {settings['length']}; seed {settings['seed']}",
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
        last = length_text(max(base.decode))
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
    return f" ({bits(delta).value:+.3f} against softmax, {interval(bits(delta))}{told})"


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


def _row(summary: Trained, arm: Mixer, shown: list[str], lengths: list[int]) -> dict[str, Any]:
    """Cells of one arm for the large table."""
    base = summary.base
    cells: list[dict[str, Any] | None] = []
    for name in shown:
        figure, delta, share = arm.figures.get(name), arm.deltas.get(name), FIGURES[name].share
        if figure is None:
            cells.append(None)
            continue
        if not share:
            figure, delta = bits(figure), None if delta is None else bits(delta)

        def percent(x: float, share: bool = share, sign: str = "") -> str:
            return f"{100 * x:{sign}.0f}" if share else f"{x:{sign}.3f}"

        cells.append(
            {
                "value": percent(figure.value) + (" %" if share else ""),
                "interval": f"{percent(figure.low)} to {percent(figure.high)}",
                "delta": None if delta is None else percent(delta.value, sign="+"),
                "delta_interval": None if delta is None else f"{percent(delta.low)} to {percent(delta.high)}",
                "differs": delta is not None and delta.excludes_zero,
                "best": arm.key in summary.best(name),
            }
        )
    costs: list[tuple[str, str]] = [("", "")] * 3
    if arm.speed is not None and base.speed is not None:
        last = lengths[-1]
        costs = [
            (f"{arm.speed.value:,.0f}", f"×{arm.speed.value / base.speed.value:.2f}"),
            (size_text(arm.state[last]), f"×{arm.state[last] / base.state[last]:.3g}"),
            (f"{arm.decode[last].value:.3g}", f"×{arm.decode[last].value / base.decode[last].value:.2f}"),
        ]
    return {
        "key": arm.key, "parameters": arm.parameters, "rate": "" if arm.rate is None else f"{arm.rate:g}",
        "cells": cells, "costs": costs, "crossover": "" if arm is base else crossover_text(arm),
        "train_crossover": "" if arm is base else crossover_text(arm, training=True),
        "by_length": [f"{size_text(arm.state[n])}, {arm.decode[n].value:.3g} ms" for n in lengths if n in arm.decode],
    }  # fmt: skip
