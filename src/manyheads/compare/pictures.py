# SPDX-License-Identifier: Apache-2.0
"""The pictures of the report, as SVG text. Colours follow the page: ink and paper are CSS variables of it."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .bench import Row
from .drawing import COLOURS, FAINT, INK, PAPER, legend, limit, line, svg
from .stats import Estimate
from .summary import FIGURES, ArmSummary, Summary
from .table import budget_text

__all__ = ["loss_by_budget", "pareto", "recall_maps", "speed_and_memory"]


def pareto(summary: Summary) -> str | None:
    """Quality against bytes held: one panel for the loss, one for recall, a line per strategy, intervals as bars."""
    panels = [name for name in ("loss", "recall") if name in summary.full.figures]
    if not panels or summary.full.kept is None:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, name in zip(axes, panels, strict=True):
            _against_bytes(axis, summary, name)
        legend(figure, axes[0])

    alt = "; ".join(
        f"{arm.key}: {100 * (arm.kept or 0):.0f} % of the bytes, "
        + ", ".join(_say(arm, name) for name in panels if name in arm.figures)
        for arm in summary.arms
    )
    return svg(draw, 10.4 if len(panels) == 2 else 6.2, 4.6, f"Quality against bytes held. {alt}.")


def _against_bytes(axis: Axes, summary: Summary, name: str) -> None:
    kind, full = FIGURES[name], summary.full
    groups = _groups(summary)
    for i, (label, arms) in enumerate(groups.items()):
        known = sorted((arm for arm in arms if name in arm.figures and arm.kept), key=lambda arm: arm.kept or 0)
        shown = [arm.figures[name] if kind.share else arm.deltas[name] for arm in known]
        # Arms of one budget hold nearly the same bytes: a small step apart, so that their intervals can be read.
        x = [100 * (arm.kept or 0) * 1.035 ** (i - (len(groups) - 1) / 2) for arm in known]
        factor = 100 if kind.share else 1
        line(axis, x, shown, factor, i, label)
    if kind.share:
        base = full.figures[name]
        axis.axhspan(100 * base.low, 100 * base.high, color=FAINT, alpha=0.35, linewidth=0)
        axis.axhline(100 * base.value, color=INK, linewidth=1.2)
        axis.set_ylim(-4, 104)
        axis.set_ylabel("right answers, %")
        axis.set_title("recall of planted constants\n(higher is better)")
    else:
        axis.axhline(0, color=INK, linewidth=1.2)
        axis.set_ylabel("loss more than full, nats/token")
        axis.set_title("loss on the text that follows\n(lower is better)")
        limit(axis, [arm.deltas[name] for arm in summary.arms[1:] if name in arm.deltas])
    kept = sorted({round(100 * arm.kept, 1) for arm in summary.arms[1:] if arm.kept})
    axis.set_xscale("log")
    axis.set_xticks(_apart(kept), [f"{k:g}" for k in _apart(kept)])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("cache held, % of full (log scale)")
    level = 100 * full.figures[name].value if kind.share else 0
    axis.text(1.01, level, "full", transform=axis.get_yaxis_transform(), va="center")


def _apart(values: Sequence[float]) -> list[float]:
    """``values`` without those that would print over one another on a log scale."""
    shown: list[float] = []
    for value in values:
        if not shown or value / shown[-1] > 1.25:
            shown.append(value)
    return shown


def loss_by_budget(summary: Summary) -> str | None:
    """Loss by budget, a panel for each length; the line of ``full`` with its interval behind."""
    lengths = summary.results.run["settings"]["lengths"]
    if "loss" not in summary.full.figures:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
        groups = _groups(summary)
        for axis, length in zip(axes, lengths, strict=True):
            every: list[Estimate] = []
            for i, (label, arms) in enumerate(groups.items()):
                fractions = sorted((a for a in arms), key=lambda a: _fraction(a.budget, length))
                found = [(a, summary.part_delta(a.key, "loss", _at(length=length))) for a in fractions]
                known = [(a, e) for a, e in found if e is not None]
                every += [e for _, e in known]
                step = 1.035 ** (i - (len(groups) - 1) / 2)
                line(
                    axis,
                    [100 * _fraction(a.budget, length) * step for a, _ in known],
                    [e for _, e in known],
                    1,
                    i,
                    label,
                )
            base = summary.part(summary.full.key, "loss", _at(length=length))
            axis.axhline(0, color=INK, linewidth=1.2)
            axis.set_title(f"{length} tokens" + (f" (full: {base.value:.2f} nats/token)" if base else ""))
            marks = _apart(sorted({100 * _fraction(a.budget, length) for a in summary.arms[1:]}))
            axis.set_xscale("log")
            axis.set_xticks(marks, [f"{m:.3g}" for m in marks])
            axis.set_xticks([], minor=True)
            axis.set_xlabel("budget, % of the tokens (log scale)")
            limit(axis, every)
        axes[0].set_ylabel("loss more than full, nats/token")
        legend(figure, axes[0])

    lines = "; ".join(f"{arm.key} {arm.deltas['loss'].value:+.2f}" for arm in summary.arms[1:] if "loss" in arm.deltas)
    return svg(draw, max(6.2, 5.2 * len(lengths)), 4.2, f"Loss more than full, in nats per token, by budget. {lines}.")


def recall_maps(summary: Summary) -> str | None:
    """Share of planted constants recalled, by depth and length: one small map for each arm."""
    rows = [r for r in summary.results.rows if (r["task"], r["metric"]) == ("needle", "unseen")]
    if not rows:
        return None
    depths, lengths = sorted({r["depth"] for r in rows}), sorted({r["length"] for r in rows})
    arms = [arm for arm in summary.arms if "needle_unseen" in arm.figures]
    groups = list(_groups(summary).values())
    columns = max(map(len, groups), default=1)
    if columns == 1:  # one budget: several strategies to a line
        columns = 3
        groups = [[arm for (arm,) in groups[i : i + columns]] for i in range(0, len(groups), columns)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(len(groups) + 1, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_visible(False)
        _map(axes[0][0], summary, arms[0], depths, lengths, "full")
        for row, members in zip(axes[1:], groups, strict=True):
            for axis, arm in zip(row, members, strict=False):
                _map(axis, summary, arm, depths, lengths, f"{arm.label}, {budget_text(arm.budget)}")
        axes[0][1].set_visible(True)
        axes[0][1].axis("off")
        axes[0][1].text(
            0,
            0.5,
            "right answers of questions, by depth\nof the constant and length of the\ncontext; asked after compression",
            va="center",
            fontsize=10,
        )

    said = "; ".join(_say(arm, "needle_unseen", arm.key) for arm in arms)
    cell = 0.3 * len(depths) + 0.75
    return svg(
        draw,
        max(3.2, 2.0 + 0.75 * len(lengths)) * columns,
        cell * (len(groups) + 1) + 0.3,
        f"Planted constants recalled by depth and length. {said}.",
    )


def _map(axis: Axes, summary: Summary, arm: ArmSummary, depths: list[float], lengths: list[int], title: str) -> None:
    axis.set_visible(True)
    axis.grid(False)
    for j, length in enumerate(lengths):
        for i, depth in enumerate(depths):
            cell = summary.part(arm.key, "needle_unseen", _at(depth=depth, length=length))
            if cell is None:
                continue
            # From light to the palette's blue, written on in ink or white: the number says what the colour says.
            part = 0.08 + 0.92 * cell.value
            axis.add_patch(_cell(j, i, part))
            right = round(cell.value * cell.n)
            axis.text(
                j + 0.5,
                i + 0.5,
                f"{right}/{cell.n}",
                ha="center",
                va="center",
                fontsize=9,
                color="#ffffff" if part > 0.5 else INK,
            )
    axis.set(xlim=(0, len(lengths)), ylim=(len(depths), 0))
    axis.set_xticks([j + 0.5 for j in range(len(lengths))], [str(n) for n in lengths], fontsize=9)
    axis.set_yticks([i + 0.5 for i in range(len(depths))], [f"{100 * d:.0f} %" for d in depths], fontsize=9)
    axis.tick_params(length=0)
    axis.set_title(title, fontsize=10, fontweight="normal")


def _cell(x: int, y: int, part: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, facecolor=COLOURS[0], alpha=part, edgecolor=PAPER, linewidth=1.5)


def speed_and_memory(summary: Summary) -> str | None:
    """Bars for every arm, with the ratio to ``full``: prefill, decoding of a token, bytes held."""
    full = summary.full
    panels: list[tuple[str, Callable[[ArmSummary], Estimate | None]]] = []
    if full.prefill is not None:
        panels.append(("prefill, s", lambda arm: arm.prefill))
        panels.append(("decode, ms/token", lambda arm: arm.decode))
    if full.bytes is not None:
        panels.append(("cache held, MB", lambda arm: None if arm.bytes is None else _exact(arm.bytes / 1e6)))
    if full.peak is not None:
        panels.append(("GPU peak, MB", lambda arm: None if arm.peak is None else _exact(arm.peak / 1e6)))
    if not panels:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(_groups(summary))}
        for axis, (title, read) in zip(axes, panels, strict=True):
            base = read(full)
            values = [read(arm) for arm in summary.arms]
            top = max(e.high for e in values if e is not None)
            for y, (arm, value) in enumerate(zip(summary.arms, values, strict=True)):
                if value is None or base is None:
                    continue
                axis.barh(y, value.value, height=0.72, color=colours.get(arm.label, "#7F7F7F"), alpha=0.85)
                if value.high > value.low:
                    axis.plot([value.low, value.high], [y, y], color=INK, linewidth=1.2, solid_capstyle="butt")
                note = f"{value.value:.3g}" if arm.full else f"{value.value:.3g}  ×{value.value / base.value:.2f}"
                axis.text(1.6 * top, y, note, ha="right", va="center", fontsize=9)
            if base is not None:
                axis.axvline(base.value, color=INK, linewidth=0.8, linestyle=(0, (2, 2)))
            axis.set(xlim=(0, 1.6 * top), title=title)
            axis.grid(axis="y", visible=False)
            axis.locator_params(axis="x", nbins=4)
        axes[0].set_yticks(range(len(summary.arms)), [_name(arm) for arm in summary.arms])
        axes[0].invert_yaxis()

    said = "; ".join(
        f"{arm.key}: " + ", ".join(f"{title} {e.value:.3g}" for title, read in panels if (e := read(arm)) is not None)
        for arm in summary.arms
    )
    return svg(draw, 3.3 * len(panels) + 1.6, 0.3 * len(summary.arms) + 1.0, f"Speed and memory. {said}.")


def _at(**wanted: Any) -> Callable[[Row], bool]:
    """Picks the rows with these values."""
    return lambda row: all(row[name] == value for name, value in wanted.items())


def _exact(value: float) -> Estimate:
    return Estimate(value, value, value, 1, 1)


def _name(arm: ArmSummary) -> str:
    return arm.label if arm.full else f"{arm.label}, {budget_text(arm.budget)}"


def _groups(summary: Summary) -> dict[str, list[ArmSummary]]:
    """Arms other than ``full`` by strategy, in the order of the run."""
    groups: dict[str, list[ArmSummary]] = {}
    for arm in summary.arms[1:]:
        groups.setdefault(arm.label, []).append(arm)
    return groups


def _fraction(budget: int | float, length: int) -> float:
    return min(1.0, budget / length) if isinstance(budget, int) else budget


def _say(arm: ArmSummary, name: str, who: str = "") -> str:
    figure = arm.figures[name]
    text = f"{100 * figure.value:.0f} %" if FIGURES[name].share else f"{figure.value:.2f} nats per token"
    return f"{who or FIGURES[name].title} {text}"
