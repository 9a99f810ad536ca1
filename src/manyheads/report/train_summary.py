# SPDX-License-Identifier: Apache-2.0
"""From the rows of a comparison by training to figures: what every mixer reached, and softmax on the same samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..comparison_train import crossover
from ..experiment.estimates import Estimate, difference, estimate, paired
from ..experiment.journal import Results
from ..experiment.rows import Metric, Row
from ..tasks import load
from ..tasks.training._trained import arm_folder

__all__ = ["FIGURES", "Figure", "Mixer", "Trained", "bits", "summarise"]


@dataclass(frozen=True)
class Figure:
    """A kind of figure: the rows it is made of and how to read it."""

    title: str
    task: str
    metric: str
    share: bool = False  # of right answers; else nats per byte


FIGURES: dict[str, Figure] = {
    "loss": Figure("held-out loss, bits/byte", "byte_lm", "token_nll"),
    "beyond": Figure("loss far beyond the training length, bits/byte", "byte_lm", "span_nll"),
    "recall": Figure("associative recall", "associative_recall", "recalled", share=True),
    "needle": Figure("planted constant", "planted_constant", "completed", share=True),
}


@dataclass(frozen=True)
class Mixer:
    """What one arm reached.

    Attributes:
        key: of the arm, its spec.
        parameters: of its model, None before one is trained.
        rate: learning rate found by tuning.
        edge: whether it is the smallest or largest of those tried.
        model: folder of the first training's model.
        figures: by name of FIGURES; losses in nats per byte.
        deltas: the same less that of softmax, paired; empty for softmax.
        spans: loss by part of the held-out windows, ``(first, last, figure, delta to softmax)``.
        curve: loss by training tokens, mean over seeds.
        tuned: validation loss by learning rate.
        speeds: training tokens per second by length, and speed: at the trained one.
        state: bytes, and decode: milliseconds of a token, by length.
        crossover: the length from which on decoding is faster than that of softmax; None if there is none.
        train_crossover: likewise of training.
        needle_nats: loss on the bytes of planted constants.
    """

    key: str
    parameters: int | None
    rate: float | None
    edge: bool
    model: Path
    figures: dict[str, Estimate] = field(default_factory=dict)
    deltas: dict[str, Estimate] = field(default_factory=dict)
    spans: list[tuple[int, int, Estimate, Estimate]] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    tuned: dict[float, float] = field(default_factory=dict)
    speed: Estimate | None = None
    speeds: dict[int, Estimate] = field(default_factory=dict)
    state: dict[int, float] = field(default_factory=dict)
    decode: dict[int, Estimate] = field(default_factory=dict)
    crossover: float | None = None
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

    @property
    def settings(self) -> Mapping[str, Any]:
        """The run's size as :class:`manyheads.comparison_train.TrainingSize` has it; ``longest`` is the reach had.

        Also ``steps`` of the trainings, ``parts`` of the text in bytes, ``seed``, ``device`` and ``threads``.
        """
        run = self.results.run
        length = run["training"]["length"]
        ends = [int(row.at["last"]) for row in self.results.rows if row.metric == "span_nll"]
        own = {"seed": run["experiment"]["seed"], "device": run["experiment"]["device"], "threads": run["threads"]}
        return {**run["training"], **own, "longest": max(ends, default=length) // length}

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
        keys = ("kind", "command", "training", "texts", "environment", "skipped", "started", "seconds")
        best = {name: self.best(name) for name in FIGURES}
        return {
            "folder": str(self.results.folder), "report": str(self.results.report), "finished": self.results.finished,
            **{key: run.get(key) for key in (*keys, "peak_rss_bytes")},
            "arms": [_plain(arm, self.base, [name for name in FIGURES if arm.key in best[name]]) for arm in self.arms],
        }  # fmt: skip


def bits(figure: Estimate) -> Estimate:
    """Nats as bits."""
    return figure.scaled(1 / math.log(2))


def summarise(results: Results) -> Trained:
    """Figures of every arm of ``results``; of an unfinished run as far as it got."""
    run, arms = results.run, list[Mixer]()
    rows = _Rows(results.rows, run["experiment"]["seed"])
    keys = [arm["key"] for arm in run["experiment"]["arms"]]
    length, rates = run["training"]["length"], run["training"]["rates"]
    last = max((row.at["last"] for row in rows.of("byte_lm", "span_nll")), default=0)
    for key in keys:
        trained = rows.of("byte_lm", "training_nll", key)
        tuned = {float(row.at["rate"]): row.value for row in rows.of("byte_lm", "tuning_nll", key)}
        rate = min(tuned, key=lambda one: (tuned[one], one)) if tuned else trained[0].about["rate"] if trained else None
        kinds = {name: {"last": last} if name == "beyond" else {} for name in FIGURES}
        if last <= length:
            del kinds["beyond"]
        found = {name: rows.against(FIGURES[name], key, keys[0], at) for name, at in kinds.items()}
        times = rows.by("mixer_speed", "token_time", key, "times")
        speeds = {n * length: Estimate(1e6 / e.value, 1e6 / e.high, 1e6 / e.low, e.n, e.groups, e.interval)
                  for n, e in times.items()}  # fmt: skip
        decode = rows.by("mixer_cost", "decode", key, "length")
        needle = [row.value for row in rows.of("planted_constant", "answer_nll", key)]
        arms.append(
            Mixer(
                key, trained[0].about["parameters"] if trained else None, rate,
                len(rates) > 2 and rate in (min(rates), max(rates)), arm_folder(results.folder, key) / "seed-0",
                {name: figure for name, (figure, _) in found.items() if figure},
                {name: delta for name, (_, delta) in found.items() if delta and key != keys[0]},
                rows.spans(key, keys[0]), _curve(trained), tuned, speeds.get(length), speeds,
                {int(row.at["length"]): row.value for row in rows.of("mixer_cost", "state", key)}, decode,
                crossover(decode, arms[0].decode) if arms else None,
                crossover(_seconds(speeds), _seconds(arms[0].speeds)) if arms else None,
                sum(needle) / len(needle) if needle else None,
            )
        )  # fmt: skip
    return Trained(results, arms)


class _Rows:
    """Rows by task, metric, arm and condition."""

    def __init__(self, rows: Iterable[Row], seed: int) -> None:
        self._rows, self._seed = list(rows), seed

    def of(self, task: str, metric: str, arm: str | None = None, **at: Any) -> list[Row]:
        return [
            row for row in self._rows
            if (row.task, row.metric) == (task, metric) and arm in (None, row.arm)
            and all(row.at.get(name) == value for name, value in at.items())
        ]  # fmt: skip

    def by(self, task: str, metric: str, arm: str, name: str) -> dict[int, Estimate]:
        """Estimates by the values of a condition."""
        rows = self.of(task, metric, arm)
        values = sorted({int(row.at[name]) for row in rows})
        return {n: estimate([r for r in rows if r.at[name] == n], _metric(task, metric), self._seed) for n in values}

    def against(
        self, kind: Figure, arm: str, base: str, at: Mapping[str, Any]
    ) -> tuple[Estimate | None, Estimate | None]:
        """The figure, and its difference to that of ``base`` over the seeds that both have."""
        mine, other = (self.of(kind.task, kind.metric, key, **at) for key in (arm, base))
        if not mine:
            return None, None
        metric, seeds = _metric(kind.task, kind.metric), {row.seed for row in mine} & {row.seed for row in other}
        left, right = ([row for row in rows if row.seed in seeds] for rows in (mine, other))
        delta = difference(left, right, metric, self._seed) if seeds and paired(left, right) else None
        return estimate(mine, metric, self._seed), delta

    def spans(self, arm: str, base: str) -> list[tuple[int, int, Estimate, Estimate]]:
        rows = self.of("byte_lm", "span_nll", arm)
        bounds = sorted({(int(row.about["first"]), int(row.at["last"])) for row in rows})
        found = []
        for first, last in bounds:
            figure, delta = self.against(FIGURES["beyond"], arm, base, {"last": last})
            if figure and delta:
                found.append((first, last, figure, delta))
        return found


def _metric(task: str, metric: str) -> Metric:
    return load(task)().metric(metric)


def _seconds(speeds: Mapping[int, Estimate]) -> dict[int, Estimate]:
    return {n: Estimate(1 / s.value, 1 / s.high, 1 / s.low, s.n, s.groups, s.interval) for n, s in speeds.items()}


def _curve(trained: list[Row]) -> list[tuple[int, float]]:
    curves = [row.about["curve"] for row in trained]
    return [(points[0][0], sum(y for _, y in points) / len(points)) for points in zip(*curves, strict=True)]


def _plain(arm: Mixer, base: Mixer, best: list[str]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, found in arm.figures.items():
        figures[name] = {"unit": "share" if FIGURES[name].share else "nats per byte", **found.plain()}
        if not FIGURES[name].share:
            figures[name]["bits_per_byte"] = bits(found).value
        if (delta := arm.deltas.get(name)) is not None:
            figures[name] |= {"delta": delta.plain(), "differs_from_softmax": delta.excludes_zero}
    speed = arm.speed and {**arm.speed.plain(), "ratio_to_softmax": base.speed and arm.speed.value / base.speed.value}
    return {
        "arm": arm.key, "parameters": arm.parameters, "rate": arm.rate, "figures": figures, "best_at": best,
        "tuned": [[rate, value] for rate, value in arm.tuned.items()], "needle_nats": arm.needle_nats,
        "spans": [
            {"first": a, "last": b, "nats_per_byte": e.plain(), "delta": d.plain()} for a, b, e, d in arm.spans
        ],
        "training_tokens_per_second": speed, "training_speeds": {str(n): e.plain() for n, e in arm.speeds.items()},
        "training_crossover": arm.train_crossover, "state_bytes": {str(n): size for n, size in arm.state.items()},
        "decode_ms": {str(n): e.plain() for n, e in arm.decode.items()}, "decode_crossover": arm.crossover,
        "model": str(arm.model),
    }  # fmt: skip
