# SPDX-License-Identifier: Apache-2.0
"""From rows to figures: what every arm reached, with intervals, beside ``full`` on the same samples."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from . import stats
from .bench import Row
from .results import Results
from .stats import Array, Estimate

__all__ = ["FIGURES", "ArmSummary", "Figure", "Summary", "summarise"]


@dataclass(frozen=True)
class Figure:
    """A kind of figure: the rows it is made of and how to read it."""

    title: str
    tasks: tuple[tuple[str, str], ...]  # (task, metric) of its rows
    share: bool  # of right answers; else a mean
    higher: bool  # whether more is better


FIGURES: dict[str, Figure] = {
    "loss": Figure("loss, nats/token", (("loss", "nats"),), share=False, higher=False),
    "needle_unseen": Figure("needle, asked after", (("needle", "unseen"),), share=True, higher=True),
    "needle_seen": Figure("needle, asked before", (("needle", "seen"),), share=True, higher=True),
    "several": Figure("one of several", (("several", "unseen"),), share=True, higher=True),
    "chained": Figure("chained", (("chained", "unseen"),), share=True, higher=True),
    "recall": Figure("recall, asked after", (("needle", "unseen"), ("several", "unseen")), share=True, higher=True),
}


@dataclass(frozen=True)
class ArmSummary:
    """What one arm reached.

    Attributes:
        figures: by name of FIGURES, over all lengths.
        deltas: the same less that of ``full`` on the same samples; empty for ``full`` itself.
        bytes: held after compression at the longest length, per sequence; None if no task looked.
        kept: the same as a share of ``full``.
        prefill, decode: seconds and milliseconds, median and quartiles; None without the speed task.
        peak: bytes allocated at most on a GPU.
    """

    key: str
    label: str
    strategy: str
    budget: int | float
    figures: dict[str, Estimate] = field(default_factory=dict)
    deltas: dict[str, Estimate] = field(default_factory=dict)
    bytes: float | None = None
    kept: float | None = None
    prefill: Estimate | None = None
    decode: Estimate | None = None
    peak: float | None = None

    @property
    def full(self) -> bool:
        return self.strategy == "full"


@dataclass(frozen=True)
class Summary:
    """All arms of a run, ``full`` first, and the rows behind them."""

    results: Results
    arms: list[ArmSummary]

    @property
    def full(self) -> ArmSummary:
        return self.arms[0]

    def best(self, figure: str) -> set[str]:
        """Keys of the arms that are best at their budget by their figure's value; ties share it."""
        sign = 1 if FIGURES[figure].higher else -1
        found: set[str] = set()
        groups: dict[int | float, list[ArmSummary]] = {}
        for arm in self.arms[1:]:
            if figure in arm.figures:
                groups.setdefault(arm.budget, []).append(arm)
        for group in groups.values():
            top = max(sign * arm.figures[figure].value for arm in group)
            found |= {arm.key for arm in group if sign * arm.figures[figure].value == top and len(group) > 1}
        return found

    def part(self, arm: str, figure: str, where: Callable[[Row], bool]) -> Estimate | None:
        """A figure of one arm over the rows that ``where`` picks, None where there are none."""
        rows = [row for row in _rows(self.results.rows, arm, FIGURES[figure]) if where(row)]
        return _estimate(rows, FIGURES[figure], self._seed, f"{arm}/{figure}") if rows else None

    def part_delta(self, arm: str, figure: str, where: Callable[[Row], bool]) -> Estimate | None:
        """The paired difference to ``full`` over the rows that ``where`` picks."""
        kind = FIGURES[figure]
        rows = [r for r in _rows(self.results.rows, arm, kind) if where(r)]
        base = [r for r in _rows(self.results.rows, self.full.key, kind) if where(r)]
        return _difference(rows, base, kind, self._seed, f"{arm}/{figure}") if rows else None

    @property
    def _seed(self) -> int:
        return int(self.results.run["settings"]["seed"])

    def document(self) -> dict[str, Any]:
        """Everything as plain data, for ``--json``."""
        run = self.results.run
        keys = ("command", "settings", "model", "texts", "sources", "environment", "skipped", "started", "seconds")
        best = {name: self.best(name) for name in FIGURES}
        return {
            "folder": str(self.results.folder),
            "report": str(self.results.report),
            "finished": self.results.finished,
            **{key: run.get(key) for key in (*keys, "peak_rss_bytes")},
            "arms": [_plain(arm, self.full, [n for n in FIGURES if arm.key in best[n]]) for arm in self.arms],
        }


def summarise(results: Results) -> Summary:
    """Figures of every arm of ``results``; of an unfinished run as far as it got."""
    run, rows = results.run, results.rows
    seed = int(run["settings"]["seed"])
    base = run["arms"][0]["key"]
    arms = []
    for arm in run["arms"]:
        key = arm["key"]
        figures, deltas = {}, {}
        for name, kind in FIGURES.items():
            mine = _rows(rows, key, kind)
            if mine:
                figures[name] = _estimate(mine, kind, seed, f"{key}/{name}")
                if key != base:
                    deltas[name] = _difference(mine, _rows(rows, base, kind), kind, seed, f"{key}/{name}")
        held, full = _bytes(rows, key), _bytes(rows, base)
        arms.append(
            ArmSummary(
                key, arm["label"], arm["strategy"], arm["budget"], figures, deltas, bytes=held,
                kept=held / full if held and full else None, prefill=_timing(rows, key, "prefill"),
                decode=_timing(rows, key, "decode"), peak=_most(rows, key, "peak"),
            )
        )  # fmt: skip
    return Summary(results, arms)


def _rows(rows: Iterable[Row], arm: str, kind: Figure) -> list[Row]:
    return [row for row in rows if row["arm"] == arm and (row["task"], row["metric"]) in kind.tasks]


def _arrays(rows: list[Row]) -> tuple[Array, Array]:
    values = np.array([row["value"] for row in rows], np.float64)
    return values, np.array([row["context"] for row in rows])


def _estimate(rows: list[Row], kind: Figure, seed: int, name: str) -> Estimate:
    values, contexts = _arrays(rows)
    return stats.share(values, contexts) if kind.share else stats.mean(values, contexts, seed, name)


def _difference(rows: list[Row], base: list[Row], kind: Figure, seed: int, name: str) -> Estimate:
    """``rows`` less ``base``, matched sample by sample."""
    other = {_sample(row): row["value"] for row in base}
    values, contexts = _arrays(rows)
    beside = np.array([other[_sample(row)] for row in rows], np.float64)
    if kind.share:
        return stats.share_difference(values, beside, contexts)
    return stats.mean(values - beside, contexts, seed, name)


def _sample(row: Row) -> tuple[object, ...]:
    return row["task"], row["metric"], row["context"], row["length"], row.get("question")


def _bytes(rows: list[Row], arm: str) -> float | None:
    found = [row for row in rows if row["arm"] == arm and "bytes" in row and row["metric"] != "seen"]
    if not found:
        return None
    longest = max(row["length"] for row in found)
    at = [row for row in found if row["length"] == longest]
    exact = [row["bytes"] for row in at if row["task"] == "memory"] or [row["bytes"] for row in at]
    return float(np.mean(exact))


def _timing(rows: list[Row], arm: str, metric: str) -> Estimate | None:
    values = [r["value"] for r in rows if r["arm"] == arm and (r["task"], r["metric"]) == ("speed", metric)]
    return stats.spread(np.array(values, np.float64)) if values else None


def _most(rows: list[Row], arm: str, metric: str) -> float | None:
    return max(
        (r["value"] for r in rows if r["arm"] == arm and (r["task"], r["metric"]) == ("memory", metric)), default=None
    )


def _plain(arm: ArmSummary, full: ArmSummary, best: list[str]) -> dict[str, Any]:
    figures = {
        name: _numbers(figure)
        | (
            {"delta": _numbers(arm.deltas[name]), "differs_from_full": arm.deltas[name].excludes_zero}
            if name in arm.deltas
            else {}
        )
        for name, figure in arm.figures.items()
    }
    timings = {}
    for name in ("prefill", "decode"):
        mine, base = getattr(arm, name), getattr(full, name)
        if mine is not None and base is not None:
            numbers = {"median": mine.value, "quartiles": [mine.low, mine.high], "n": mine.n}
            timings[{"prefill": "prefill_s", "decode": "decode_ms"}[name]] = numbers | {
                "ratio_to_full": mine.value / base.value
            }
    return {
        "arm": arm.key, "strategy": arm.strategy, "label": arm.label, "budget": arm.budget, "bytes": arm.bytes,
        "kept": arm.kept, "figures": figures, "best_at_its_budget": best, **timings, "peak_bytes": arm.peak,
    }  # fmt: skip


def _numbers(figure: Estimate) -> dict[str, Any]:
    return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in asdict(figure).items()}
