# SPDX-License-Identifier: Apache-2.0
"""The pictures of the report on trained mixers."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..drawing import COLOURS, FAINT, INK, legend, limit, line, svg
from ..stats import Estimate
from .summary import FIGURES, Trained, bits
from .table import crossover_text, length_text

__all__ = ["costs", "positions", "recall", "training"]


def positions(summary: Trained) -> str | None:
    """Loss by position in the window, and the same less softmax: does a mixer use context, and beyond its training?"""
    if not all(arm.spans for arm in summary.arms):
        return None
    length = summary.results.run["settings"]["length"]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for i, arm in enumerate(summary.arms):
            ends = [last * 1.03 ** (i - len(summary.arms) / 2) for _, last, _, _ in arm.spans]
            line(left, ends, [_exact(bits(e).value) for _, _, e, _ in arm.spans], 1, i, arm.key)
            line(right, ends, [bits(delta) for _, _, _, delta in arm.spans], 1, i, arm.key)
        left.set(title="loss by position", ylabel="bits per byte (lower is better)")
        right.set(title="the same, less softmax", ylabel="bits per byte")
        for axis in (left, right):
            _by_length(axis, [last for _, last, _, _ in summary.base.spans], "bytes of context, up to (log scale)")
            axis.axvline(length, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
        limit(right, [bits(delta) for arm in summary.arms[1:] for _, _, _, delta in arm.spans])
        legend(figure, left, 4)

    said = "; ".join(
        f"{arm.key} " + ", ".join(f"{bits(e).value:.2f} up to {last}" for _, last, e, _ in arm.spans)
        for arm in summary.arms
    )
    return svg(draw, 10.4, 4.6, f"Loss in bits per byte by position; trained on {length} bytes. {said}.")


def recall(summary: Trained) -> str | None:
    """Bars: share of right answers in associative recall, and of planted constants."""
    names = [name for name in ("recall", "needle") if name in summary.base.figures]
    if not names:
        return None

    def draw(figure: Figure) -> None:
        for axis, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
            for y, arm in enumerate(summary.arms):
                if name in arm.figures:
                    e = arm.figures[name]
                    axis.barh(y, 100 * e.value, height=0.7, color=COLOURS[y % len(COLOURS)], alpha=0.85)
                    axis.plot([100 * e.low, 100 * e.high], [y, y], color=INK, linewidth=1.2)
                    axis.text(128, y, f"{100 * e.value:.0f} %", ha="right", va="center", fontsize=9)
            axis.set(xlim=(0, 130), xlabel="right answers, %", title=FIGURES[name].title)
            axis.set_xticks(range(0, 101, 25))
            _named(axis, summary)

    said = "; ".join(
        f"{arm.key} " + ", ".join(f"{FIGURES[n].title} {100 * arm.figures[n].value:.0f} %" for n in names)
        for arm in summary.arms
        if all(n in arm.figures for n in names)
    )
    return svg(draw, 3.8 * len(names) + 1.8, 0.32 * len(summary.arms) + 1.3, f"Right answers. {said}.")


def costs(summary: Trained) -> str | None:
    """Decoding time and state against length, and training speed."""
    if not all(arm.decode for arm in summary.arms) or summary.base.speed is None:
        return None
    base = summary.base.speed.value

    def draw(figure: Figure) -> None:
        decode, state, speed = figure.subplots(1, 3)
        for i, arm in enumerate(summary.arms):
            lengths = sorted(arm.decode)
            line(decode, lengths, [arm.decode[n] for n in lengths], 1, i, arm.key)
            line(state, lengths, [_exact(arm.state[n] / 1e3) for n in lengths], 1, i, arm.key)
            if arm.speed is not None:
                speed.barh(i, arm.speed.value, height=0.7, color=COLOURS[i % len(COLOURS)], alpha=0.85)
                speed.plot([arm.speed.low, arm.speed.high], [i, i], color=INK, linewidth=1.2)
                note = f"{arm.speed.value:,.0f}  ×{arm.speed.value / base:.2f}"
                speed.text(0.99, i, note, ha="right", va="center", fontsize=9, transform=speed.get_yaxis_transform())
        decode.set(title="decoding, ms/token", yscale="log")
        state.set(title="state, kB", yscale="log")
        for axis in (decode, state):
            axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
            axis.yaxis.set_minor_formatter("")
            _by_length(axis, sorted(summary.base.decode), "tokens so far (log scale)")
        speed.set(title="training, tokens/s", xlim=(0, 1.9 * max(a.speed.high for a in summary.arms if a.speed)))
        speed.locator_params(axis="x", nbins=3)
        _named(speed, summary, labels=False)
        legend(figure, decode, 4)

    said = "; ".join(f"{arm.key}: {crossover_text(arm)}" for arm in summary.arms[1:])
    return svg(draw, 11.6, 4.4, f"Costs by length. Decoding is faster than softmax: {said}.")


def training(summary: Trained) -> str | None:
    """Loss while training, and validation loss by learning rate."""
    if not all(arm.curve and arm.tuned for arm in summary.arms):
        return None

    def draw(figure: Figure) -> None:
        curve, tuned = figure.subplots(1, 2)
        for i, arm in enumerate(summary.arms):
            colour: Any = {"color": COLOURS[i % len(COLOURS)]}
            curve.plot([t for t, _ in arm.curve], [y / math.log(2) for _, y in arm.curve], linewidth=1.4, **colour)
            rates = sorted(arm.tuned)
            line(tuned, rates, [bits(_exact(arm.tuned[rate])) for rate in rates], 1, i, arm.key)
        curve.set(title="loss while training", xlabel="tokens", ylabel="bits per byte")
        curve.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:,.0f}k")
        tuned.set(title="tuning: loss by learning rate", xlabel="learning rate (log scale)", xscale="log")
        rates = sorted(summary.base.tuned)
        tuned.set_xticks(rates, [f"{rate:g}" for rate in rates])
        tuned.set_xticks([], minor=True)
        legend(figure, tuned, 4)

    said = "; ".join(f"{arm.key}: rate {arm.rate:g}" for arm in summary.arms)
    return svg(draw, 10.4, 4.2, f"Training and tuning. {said}.")


def _exact(value: float) -> Estimate:
    return Estimate(value, value, value, 1, 1)


def _by_length(axis: Axes, lengths: Sequence[int], label: str) -> None:
    axis.set_xscale("log")
    axis.set_xticks(lengths, [length_text(n) for n in lengths])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(label)


def _named(axis: Axes, summary: Trained, labels: bool = True) -> None:
    names = [arm.key if labels else "" for arm in summary.arms]
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.spines["left"].set_color(FAINT)
