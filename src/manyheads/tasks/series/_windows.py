# SPDX-License-Identifier: Apache-2.0
"""Windows of irregular series: a history with its texts, and the times that are forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...attention.masks import padded
from ...data.irregular import SETS, Record, Span, irregular, read_record, record_folder
from ...errors import UserError
from ...experiment import seeding
from ...recipe import Batch, Part, Sample
from ._forecast import Array, ForecastTask, cut_times
from ._notes import embedded, text_width

__all__ = ["Forecast", "Window", "WindowTask", "standard"]

_OWN_STEPS = 32  # observations of a history, in data of the user's own
_BY_RECORD = 8  # records of a set from which on intervals are over records


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A forecast that is asked for.

    Attributes:
        record: what is known up to ``origin``, of one history.
        origin: days since 1970; the history ends there, and the forecast begins.
        days: of the history and of the horizon.
        queries: times that are asked for ``[Q]``, days since 1970, later than ``origin``.
        placebo: as many texts as the record has, of all of that entity and part in a random order; by chance its own.
    """

    record: Record
    origin: float
    days: float
    queries: Array
    placebo: tuple[str, ...] = ()

    def __neg__(self) -> Window:
        """The window with every value negated."""
        return replace(self, record=-self.record)

    def scaled(self, times: Array) -> Tensor:
        """Times in units of the horizon, 0 at the origin, float32."""
        return torch.from_numpy((times - self.origin) / self.days).float()


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """Values at times.

    Attributes:
        variables: their names, C.
        times: days since 1970 ``[Q]``.
        values: ``[Q, C]`` in the units of the series; NaN where nothing is said.
        origin: when the forecast begins.
    """

    variables: tuple[str, ...]
    times: Array
    values: Array
    origin: float

    def __str__(self) -> str:
        """As a CSV file has it."""
        stamps = np.datetime_as_string((self.times * 86400e3).round().astype("datetime64[ms]"), unit="m")
        rows = (",".join(f"{v:.5g}" for v in row) for row in self.values)
        lines = (f"{stamp.replace('T', ' ')},{row}" for stamp, row in zip(stamps, rows, strict=True))
        return "\n".join((",".join(("date_time", *self.variables)), *lines))

    def at(self, other: Forecast) -> Array:
        """Values at the times of another forecast, by their distance from its origin ``[Q', C]``."""
        own, asked = self.times - self.origin, other.times - other.origin
        if np.array_equal(own, asked) and np.isfinite(self.values).all():
            return self.values
        found = np.zeros((len(asked), len(self.variables)))
        for c, values in enumerate(self.values.T):
            if (known := np.isfinite(values)).any():
                found[:, c] = np.interp(asked, own[known], values[known])
        return found


@dataclass(frozen=True, kw_only=True)
class WindowTask(ForecastTask):
    """Base of tasks on irregular series: what is read, how it is cut, and batches of it.

    Attributes:
        dataset: one of :data:`manyheads.data.irregular.SETS`; not asked for with data of your own.
        days: of a history and of a horizon; 0 for what the authors have, or 32 observations of data of your own.
        encoder: of texts, frozen: a name or folder as :func:`manyheads.models.load_reader` takes it, or ``words`` for
            a random projection of hashed words.
    """

    width: int = 256
    dataset: str = "EPA-Air"
    days: float = 0.0
    encoder: str = "all-minilm-l6-v2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset not in SETS:
            raise UserError(f"there are no irregular series {self.dataset!r}; there are {', '.join(SETS)}")
        if self.days < 0:
            raise UserError("days of a history are above 0, or 0 for what the authors have")

    @property
    def label(self) -> str:
        return "" if self.folder else self.dataset

    @property
    def source(self) -> str:
        return self.folder or self.dataset

    @property
    def span(self) -> Span:
        """How the set is cut."""
        if not self.folder:
            own = SETS[self.dataset]
            return replace(own, days=self.days, stride=0.0) if self.days else own
        first = self.samples("train")[0].inputs.times
        step = float(np.median(np.diff(first)))
        days = self.days or _OWN_STEPS * step
        return Span(days, max(4, round(days / step)))

    @property
    def channels(self) -> int:
        """Variables of the set."""
        return len(self.samples("train")[0].inputs.variables)

    @property
    def text_width(self) -> int:
        """Numbers of a text's embedding."""
        return text_width(self.encoder)

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        own = folder is not None and str(folder) not in SETS
        records = record_folder(folder) if own and folder else irregular(str(folder or cls.dataset))
        parts = cut_times([record.times for record in records])
        found = []
        for record in records:
            scaled = _scaled(record, record.between(*parts["train"]).values)
            for part, (first, last) in parts.items():
                cut = scaled.between(first, last)
                if len(cut.times) > 1:
                    name = f"{record.name} {part}"
                    found.append(Sample(name, name, part, cut))
        return found

    @classmethod
    def open(cls, path: Path) -> Sample:
        record = read_record(path)
        return Sample(path.name, "", "test", _scaled(record, record.values))

    def context(self, sample: Sample) -> str:
        names = {one.inputs.name for one in self.samples("test")}
        return sample.inputs.record.name if len(names) >= _BY_RECORD else sample.name

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        made: list[Sample] = []
        spans = np.array([max(0.0, s.inputs.times[-1] - s.inputs.times[0] - 2 * self.span.days) for s in samples])
        if not spans.sum():
            raise UserError(f"no entity of {self.source} has a training part of two horizons; give fewer days")
        for turn in range(1000 * self.batch):
            sample = samples[int(rng.choice(len(samples), p=spans / spans.sum()))]
            origin = sample.inputs.times[0] + self.span.days + rng.uniform() * spans[samples.index(sample)]
            if (window := self._window(sample, float(origin), f"drawn {turn}")) is not None:
                made.append(window)
            if len(made) == self.batch:
                return made
        raise UserError(f"hardly a window of {self.source} has observations and texts; give more days")

    def judged(self, part: Part) -> Sequence[Sample]:
        days, stride = self.span.days, self.span.stride or self.span.days
        found = []
        for sample in self.samples(part):
            times = sample.inputs.times
            for i, origin in enumerate(np.arange(times[0] + days, times[-1] - days + 1e-9, stride)):
                if (window := self._window(sample, float(origin), f"{sample.name} {i}")) is not None:
                    found.append(window)
        if not found:
            raise UserError(f"no entity of {self.source} has two horizons of {days:g} days in the {part} part")
        order = seeding.generator(0, windows=part).permutation(len(found))
        return [found[i] for i in order[: self.samples_judged]]

    def _window(self, sample: Sample, origin: float, name: str) -> Sample | None:
        """A window of a record, None where there is nothing to read or to forecast."""
        whole, days = sample.inputs, self.span.days
        history, future = whole.between(origin - days, origin), whole.between(origin, origin + days)
        known, asked = np.isfinite(history.values).any(1), np.isfinite(future.values).any(1)
        if not known.any() or not asked.any() or (len(whole.notes) and not len(history.notes)):
            return None
        history = replace(history, times=history.times[known], values=history.values[known])
        first = int(np.searchsorted(whole.note_times, origin - days))
        others = seeding.generator(0, placebo=whole.name).permutation(len(whole.notes))
        placebo = tuple(whole.notes[others[first + i]] for i in range(len(history.notes)))
        queries = future.times[asked]
        target = Forecast(whole.variables, queries, future.values[asked], origin)
        return replace(sample, name=name, inputs=Window(history, origin, days, queries, placebo), target=target)

    def _asked(self, sample: Sample) -> Sample:
        """A whole record, as :meth:`open` gives it, as the window that begins at its end."""
        if isinstance(sample.inputs, Window):
            return sample
        record, span = sample.inputs, self.span
        if len(record.variables) != self.channels:
            raise UserError(
                f"{sample.name} has {len(record.variables)} variables, the model forecasts {self.channels}: "
                f"{', '.join(self.samples('train')[0].inputs.variables)}"
            )
        origin = float(record.times[-1]) + 1e-6
        queries = origin + span.days * np.arange(1, span.steps + 1) / span.steps
        return replace(sample, inputs=Window(record.between(origin - span.days, origin), origin, span.days, queries))

    def collate(self, samples: Sequence[Sample]) -> Batch:
        samples = [self._asked(sample) for sample in samples]
        windows: list[Window] = [sample.inputs for sample in samples]
        scaled = [standard(w.record, w.record.values) for w in windows]
        # Queries are those of the target where there is one: what is planted as a target is asked for at its own times.
        asked = [
            w.scaled(s.target.times - s.target.origin + w.origin if s.target is not None else w.queries)
            for w, s in zip(windows, samples, strict=True)
        ]
        notes = [embedded(w.record.notes, self.encoder) for w in windows]
        others = [embedded(w.placebo or w.record.notes, self.encoder) for w in windows]
        values, there = padded([x.nan_to_num(0.0) for x in scaled])
        queries, wanted = padded(asked)
        texts, noted = padded(notes)
        batch = {
            "values": values, "there": there, "mask": padded([x.isfinite() for x in scaled])[0],
            "times": padded([w.scaled(w.record.times) for w in windows])[0], "queries": queries, "asked": wanted,
            "notes": texts, "note_mask": noted, "placebo": padded(others)[0],
            "note_times": padded([w.scaled(w.record.note_times) for w in windows])[0], "windows": windows,
        }  # fmt: skip
        if any(sample.target is None for sample in samples):
            return batch
        targets = [standard(w.record, s.target.values) for w, s in zip(windows, samples, strict=True)]
        batch["targets"], _ = padded([x.nan_to_num(0.0) for x in targets])
        batch["target_mask"], _ = padded([x.isfinite() for x in targets])
        return batch


def _scaled(record: Record, values: Array) -> Record:
    """The record with the means and deviations of ``values [L, C]``; 0 and 1 where nothing is observed or varies."""
    known = np.isfinite(values)
    seen, counts = np.where(known, values, 0.0), known.sum(0).clip(min=1)
    mean = seen.sum(0) / counts
    deviation = np.sqrt(((seen - mean) ** 2 * known).sum(0) / counts)
    return replace(record, scale=np.stack((mean, np.where(deviation > 1e-9, deviation, 1.0))))


def standard(record: Record, values: Array) -> Tensor:
    """Values in units of the record's scale, float32 ``[L, C]``."""
    return torch.from_numpy((values - record.scale[0]) / record.scale[1]).float()
