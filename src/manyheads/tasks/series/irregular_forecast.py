# SPDX-License-Identifier: Apache-2.0
"""Irregular series of several variables with timestamped texts, forecast on what comes later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ...data.irregular import Record
from ...errors import refusal
from ...experiment import Metric, RunContext
from ...recipe import Batch, Picture, Sample
from .._blocks import Transformer
from ._forecast import Array, Table
from ._forecasters import DLinear, Forecaster, PatchTST, TimeAttention
from ._notes import embedded
from ._windows import Forecast, Window, WindowTask, standard

__all__ = ["IrregularForecast"]

_GRID = 64  # steps that DLinear reads at most: its size grows with their square
_COLUMNS = ("last", "season", "level", "last change", "season change", "spread", "ahead", "age", "slope")


@dataclass(frozen=True, kw_only=True)
class IrregularForecast(WindowTask):
    """A set of Time-IMM. A history and its texts are read, the values at the times of what comes next are forecast.

    Of the time that all entities have, the first 60 % are trained on, the next 20 % validate, what comes later tests:
    parts by time, with the same cuts for all entities, and a window, history and horizon, lies in one part. Scales are
    the means and deviations of the training part; errors are in those units, over the values that were observed.
    Windows without an observation or, where the set has texts, without a text in the history are left out, as in the
    paper. In training, windows begin anywhere. Intervals are over entities where there are eight or more, else over
    windows.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "mse", "squared error, in deviations", "sd²",
            what="mean over the observed values of a window, each variable in units of its deviation in training",
        ),
        Metric("mae", "absolute error, in deviations", "sd"),
    )  # fmt: skip
    files: ClassVar[tuple[str, ...]] = ("time-imm", "time-imm-repository")
    takes: ClassVar[str] = (
        "a folder of ENTITY/time_series.csv with a column date_time and one of each variable, beside it text.csv"
    )
    references: ClassVar[tuple[str, ...]] = ("time_attention", "patchtst", "dlinear")

    def unsupported_reason(self, run: RunContext) -> str | None:
        return super().unsupported_reason(run) or refusal(lambda: embedded(("a text",), self.encoder))

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        return self._attending(blocks, 2 * self.dim)

    def _attending(self, blocks: Sequence[nn.Module], width: int) -> nn.Module:
        steps, channels = self.span.steps, self.channels
        return Forecaster(
            TimeAttention(blocks, channels, self.dim, self.heads, width, self.dropout, steps), channels
        )  # fmt: skip

    def reference(self, width: int, kind: str = "") -> nn.Module:
        kind, steps, channels = kind or self.references[0], self.span.steps, self.channels
        if kind == "dlinear":
            return Forecaster(DLinear(min(steps, _GRID), width, self.dropout), channels)
        if kind == "patchtst":
            made = PatchTST(steps, channels, self.dim, self.layers, self.heads, width, self.dropout)
            return Forecaster(made, channels)
        return self._attending(
            [Transformer(self.dim, self.heads, width, self.dropout) for _ in range(self.layers)], width
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        mask = batch["target_mask"]
        found: Tensor = mse_loss(model(batch)[mask].float(), batch["targets"][mask])
        return found

    def predict(self, model: nn.Module, batch: Batch) -> list[Forecast]:
        said = model(batch).float().cpu()
        found: list[Forecast] = []
        for window, row, asked in zip(batch["windows"], said, batch["asked"].cpu(), strict=True):
            mean, deviation = window.record.scale
            times = window.origin + batch["queries"][len(found)].cpu().double().numpy()[asked.numpy()] * window.days
            values = row[asked].double().numpy() * deviation + mean
            found.append(Forecast(window.record.variables, times, values, window.origin))
        return found

    def score(self, sample: Sample, said: Forecast) -> Mapping[str, float]:
        truth: Forecast = sample.target
        known = np.isfinite(truth.values)
        off = ((said.at(truth) - truth.values) / sample.inputs.record.scale[1])[known]
        return {"mse": float(np.square(off).mean()), "mae": float(np.abs(off).mean())}

    def truth(self, sample: Sample) -> Forecast:
        found: Forecast = sample.target
        return found

    def table(self, sample: Sample) -> Table:
        window, truth = sample.inputs, sample.target
        record: Record = window.record
        features, kinds, targets = [], [], []
        for c in range(len(record.variables)):
            seen = np.isfinite(truth.values[:, c])
            asked = (truth.times[seen] - window.origin) / window.days
            features.append(_features(standard(record, record.values)[:, c].double().numpy(), window, asked))
            kinds.append(np.full(int(seen.sum()), c))
            targets.append(standard(record, truth.values)[:, c].double().numpy()[seen])
        rows = np.concatenate(features)
        level = rows[:, _COLUMNS.index("level")]
        return Table(_COLUMNS, rows, np.concatenate(kinds), level, np.concatenate(targets))

    def told(self, sample: Sample, values: Array) -> Forecast:
        truth, scale = sample.target, sample.inputs.record.scale
        known = np.isfinite(truth.values)
        found = np.full(truth.values.T.shape, np.nan)
        found[known.T] = values  # rows of a table go variable by variable
        return Forecast(truth.variables, truth.times, found.T * scale[1] + scale[0], truth.origin)

    def pictures(self, samples: Sequence[Sample], said: Sequence[Forecast]) -> Sequence[Picture]:
        seen = {self.context(sample): i for i, sample in reversed(list(enumerate(samples)))}
        return [_picture(samples[i], said[i]) for i in sorted(seen.values())[:2]]


def _features(values: Array, window: Window, asked: Array) -> Array:
    """The columns of a table of one variable ``[n, columns]``, for forecasts ``asked`` horizons ahead."""
    times = (window.record.times - window.origin) / window.days
    times, values = times[np.isfinite(values)], values[np.isfinite(values)]
    if not len(values):  # never observed: the mean of the training part
        times, values = np.array([-1.0]), np.array([0.0])
    season = values[np.abs(times[None] - (asked[:, None] - 1)).argmin(1)]  # what was nearest a whole horizon before
    half = values[times >= -0.5]
    slope = (half.mean() if len(half) else values[-1]) - values.mean()
    same = np.ones(len(asked))
    level, last = values.mean(), values[-1]
    columns = (
        last * same, season, level * same, (last - level) * same, season - level, values.std() * same, asked,
        -times[-1] * same, slope * same,
    )  # fmt: skip
    return np.stack(columns, 1)


def _picture(sample: Sample, said: Forecast) -> Picture:
    """The variable that is observed most: what was read, what came, and what was forecast."""
    window, truth = sample.inputs, sample.target
    c = int(np.isfinite(truth.values).sum(0).argmax())
    times = np.concatenate((window.record.times, truth.times))
    before, nothing = window.record.values[:, c], np.full(len(truth.times), np.nan)
    rows = {
        "observed": np.concatenate((before, nothing)),
        "truth": np.concatenate((before * np.nan, truth.values[:, c])),
        "forecast": np.concatenate((before * np.nan, said.at(truth)[:, c])),
    }
    columns = [f"{time - window.origin:.3f}" for time in times]
    title = f"{window.record.name}: {truth.variables[c]}"
    return Picture(title, list(rows), columns, [list(v) for v in rows.values()], ("value", "days"), kind="lines")
