# SPDX-License-Identifier: Apache-2.0
"""From rows to figures: what every mixer reached, with intervals, beside softmax on the same windows and seeds."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .. import stats
from ..results import Results, Row
from ..stats import Array, Estimate
from .tasks import model_folder, rate_of, spans

__all__ = ["FIGURES", "Figure", "Mixer", "Trained", "bits", "crossover", "summarise"]


@dataclass(frozen=True)
class Figure:
    """A kind of figure: the rows it is made of and how to read it."""

    title: str
    task: str
    metric: str
    share: bool = False  # of right answers; else nats per byte


FIGURES: dict[str, Figure] = {
    "loss": Figure("held-out loss, bits/byte", "judge", "nats"),
    "beyond": Figure("loss far beyond the training length, bits/byte", "judge", "span"),
    "recall": Figure("associative recall", "recall", "right", share=True),
    "needle": Figure("planted constant", "judge", "needle", share=True),
}


@dataclass(frozen=True)
class Mixer:
    """What one arm reached.

    Attributes:
        rate: learning rate found by tuning.
        edge: whether it is the smallest or largest of those tried.
        figures: by name of FIGURES; losses in nats per byte.
        deltas: the same less that of softmax, paired; empty for softmax.
        spans: loss by part of the held-out windows, ``(first, last, figure, delta to softmax)``.
        curve: loss by training tokens, mean over seeds.
        tuned: validation loss by learning rate.
        speed: training tokens per second at the trained length, and speeds: by length.
        state: bytes, and decode: milliseconds of a token, by length.
        crossover: the length from which on decoding is faster than that of softmax; None if there is none.
        train_crossover: likewise of training.
        model: folder of the first training's model.
    """

    key: str
    strategy: str
    parameters: int
    rate: float | None
    edge: bool
    model: Path
    figures: dict[str, Estimate] = field(default_factory=dict)
    deltas: dict[str, Estimate] = field(default_factory=dict)
    spans: list[tuple[int, int, Estimate, Estimate]] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    tuned: dict[float, float] = field(default_factory=dict)
    speed: Estimate | None = None
    state: dict[int, float] = field(default_factory=dict)
    decode: dict[int, Estimate] = field(default_factory=dict)
    crossover: float | None = None
    speeds: dict[int, Estimate] = field(default_factory=dict)
    train_crossover: float | None = None
    needle_nats: float | None = None


@dataclass(frozen=True)
class Trained:
    """All arms of a run, softmax first, and the rows behind them."""

    results: Results
    arms: list[Mixer]

    @property
    def base(self) -> Mixer:
        return self.arms[0]

    def best(self, figure: str) -> set[str]:
        """Keys of the arms whose figure is the best; ties share it, and nothing is best where all tie."""
        known = {arm.key: arm.figures[figure].value for arm in self.arms if figure in arm.figures}
        if len(set(known.values())) < 2:
            return set()
        top = (max if FIGURES[figure].share else min)(known.values())
        return {key for key, value in known.items() if value == top}

    def document(self) -> dict[str, Any]:
        """Everything as plain data, for ``--json``."""
        run = self.results.run
        keys = ("kind", "command", "settings", "steps", "model", "texts", "sources", "environment", "skipped")
        best = {name: self.best(name) for name in FIGURES}
        return {
            "folder": str(self.results.folder),
            "report": str(self.results.report),
            "finished": self.results.finished,
            **{key: run.get(key) for key in (*keys, "started", "seconds", "peak_rss_bytes")},
            "arms": [_plain(arm, self.base, [name for name in FIGURES if arm.key in best[name]]) for arm in self.arms],
        }


def bits(figure: Estimate) -> Estimate:
    """Nats as bits."""
    value, low, high = (x / math.log(2) for x in (figure.value, figure.low, figure.high))
    return Estimate(value, low, high, figure.n, figure.contexts)


def summarise(results: Results) -> Trained:
    """Figures of every arm of ``results``; of an unfinished run as far as it got."""
    run = results.run
    base = run["arms"][0]["key"]
    rates = run["settings"]["rates"]
    arms: list[Mixer] = []
    for described in run["arms"]:
        key = described["key"]
        rows = [row for row in results.rows if row["arm"] == key]
        rate = rate_of(rows, key)
        figures, deltas = _figures(results, key, base)
        decode = {n: stats.spread(_values(rows, "cost", "decode", n)) for n in _lengths(rows, "decode")}
        speeds = {n: stats.spread(_values(rows, "cost", "speed", n)) for n in _lengths(rows, "speed")}
        needle = [row["nats"] for row in rows if row["metric"] == "needle"]
        arms.append(
            Mixer(
                key, described["strategy"], described["parameters"], rate,
                len(rates) > 2 and rate in (min(rates), max(rates)), model_folder(results.folder, key, 0), figures,
                deltas, _spans(results, key, base), _curve(rows),
                {row["rate"]: row["value"] for row in rows if row["task"] == "tune"},
                speeds.get(run["settings"]["length"]),
                {n: float(_values(rows, "cost", "bytes", n)[0]) for n in _lengths(rows, "bytes")}, decode,
                crossover(decode, arms[0].decode) if arms else None, speeds,
                crossover(_times(speeds), _times(arms[0].speeds)) if arms else None,
                float(np.mean(needle)) if needle else None,
            )
        )  # fmt: skip
    return Trained(results, arms)


def crossover(mine: dict[int, Estimate], base: dict[int, Estimate]) -> float | None:
    """The length from which on ``mine`` is faster than ``base``, between measured ones on straight lines of logarithms.

    The shortest length if it always is; None if at the longest the quartiles are not apart.
    """
    lengths = sorted(mine.keys() & base.keys())
    behind = [math.log(mine[n].value / base[n].value) for n in lengths]
    if not lengths or mine[lengths[-1]].high >= base[lengths[-1]].low:
        return None
    slow = [i for i, x in enumerate(behind) if x >= 0]
    if not slow:
        return float(lengths[0])
    i = slow[-1]
    part = behind[i] / (behind[i] - behind[i + 1])
    return float(lengths[i] * (lengths[i + 1] / lengths[i]) ** part)


def _times(speeds: dict[int, Estimate]) -> dict[int, Estimate]:
    return {n: Estimate(1 / s.value, 1 / s.high, 1 / s.low, s.n, s.contexts) for n, s in speeds.items()}


def _figures(results: Results, key: str, base: str) -> tuple[dict[str, Estimate], dict[str, Estimate]]:
    figures, deltas = {}, {}
    settings = results.run["settings"]
    seed, last = int(settings["seed"]), settings["length"] * settings["longest"]
    for name, kind in FIGURES.items():

        def where(row: Row, kind: Figure = kind) -> bool:
            return (row["task"], row["metric"]) == (kind.task, kind.metric) and row.get("last", last) == last

        if name == "beyond" and settings["longest"] == 1:
            continue
        mine, other = _table(results.rows, key, where), _table(results.rows, base, where)
        if not mine:
            continue
        shared = sorted(mine.keys() & other.keys())  # an unfinished run: the seeds that both have
        values = np.array([mine[s] for s in mine])
        paired = [np.array([table[s] for s in shared]) for table in (mine, other)]
        if kind.share:
            figures[name] = stats.share(values.ravel(), _contexts(values))
        else:
            figures[name] = stats.crossed(values, seed, f"{key}/{name}")
        if key != base and shared:
            if kind.share:
                deltas[name] = stats.share_difference(paired[0].ravel(), paired[1].ravel(), _contexts(paired[0]))
            else:
                deltas[name] = stats.crossed(paired[0] - paired[1], seed, f"{key}/{name}")
    return figures, deltas


def _contexts(values: Array) -> Any:
    """The window of each answer: those of several trainings to one window hang together."""
    return np.tile(np.arange(values.shape[1]), values.shape[0])


def _table(rows: list[Row], arm: str, where: Callable[[Row], bool]) -> dict[int, list[float]]:
    """Values by seed, contexts in their order."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if row["arm"] == arm and where(row):
            found.setdefault(row.get("seed", 0), []).append(row["value"])
    return found


def _spans(results: Results, key: str, base: str) -> list[tuple[int, int, Estimate, Estimate]]:
    settings = results.run["settings"]
    found = []
    for first, last in spans(settings["length"], settings["longest"]):

        def where(row: Row, last: int = last) -> bool:
            return bool(row["metric"] == "span" and row["last"] == last)

        mine, other = _table(results.rows, key, where), _table(results.rows, base, where)
        if shared := sorted(mine.keys() & other.keys()):
            values, beside = (np.array([table[s] for s in shared]) for table in (mine, other))
            pair = [stats.crossed(x, int(settings["seed"]), f"{key}/{last}") for x in (values, values - beside)]
            found.append((first, last, pair[0], pair[1]))
    return found


def _curve(rows: list[Row]) -> list[tuple[int, float]]:
    curves = [row["curve"] for row in rows if row["task"] == "train"]
    return [(points[0][0], float(np.mean([loss for _, loss in points]))) for points in zip(*curves, strict=True)]


def _lengths(rows: list[Row], metric: str) -> list[int]:
    return sorted({row["length"] for row in rows if (row["task"], row["metric"]) == ("cost", metric)})


def _values(rows: list[Row], task: str, metric: str, length: int | None = None) -> Array:
    chosen = [r for r in rows if (r["task"], r["metric"]) == (task, metric) and length in (None, r["length"])]
    return np.array([row["value"] for row in chosen], np.float64)


def _plain(arm: Mixer, base: Mixer, best: list[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, kind in FIGURES.items():
        if name in arm.figures:
            figures[name] = {"unit": "share" if kind.share else "nats per byte", **_numbers(arm.figures[name])}
            if not kind.share:
                figures[name]["bits_per_byte"] = bits(arm.figures[name]).value
            if name in arm.deltas:
                delta = arm.deltas[name]
                figures[name] |= {"delta": _numbers(delta), "differs_from_softmax": delta.excludes_zero}
    speed = arm.speed and {**_numbers(arm.speed), "ratio_to_softmax": base.speed and arm.speed.value / base.speed.value}
    return {
        "arm": arm.key, "strategy": arm.strategy, "parameters": arm.parameters, "rate": arm.rate,
        "tuned": [[rate, value] for rate, value in arm.tuned.items()], "figures": figures, "best_at": best,
        "needle_nats": arm.needle_nats,
        "spans": [
            {"first": a, "last": b, "nats_per_byte": _numbers(e), "delta": _numbers(d)} for a, b, e, d in arm.spans
        ],
        "training_tokens_per_second": speed, "training_speeds": {str(n): _numbers(e) for n, e in arm.speeds.items()},
        "training_crossover": arm.train_crossover, "state_bytes": {str(n): size for n, size in arm.state.items()},
        "decode_ms": {str(n): _numbers(e) for n, e in arm.decode.items()}, "decode_crossover": arm.crossover,
        "model": str(arm.model),
    }  # fmt: skip


def _numbers(figure: Estimate) -> dict[str, Any]:
    return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in asdict(figure).items()}
