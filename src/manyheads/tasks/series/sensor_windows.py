# SPDX-License-Identifier: Apache-2.0
"""Windows of body sensors of people that no training has seen, classified by what they do: F1, balanced accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from ...data.sensors import ACTIVITIES, CHANNELS, Recording, read_csv, recordings
from ...errors import UserError
from ...recipe import Part, Sample
from .._blocks import Transformer
from .._field import parted
from ._window_classes import TemporalCNN, TemporalLSTM, WindowTask

__all__ = ["SensorWindows"]

_VALIDATION, _TEST = "s12", "s16"  # first people of those parts, of 23


@dataclass(frozen=True, kw_only=True)
class SensorWindows(WindowTask):
    """A phone in the pocket and a watch on the wrist: 23 people sit, stand up, walk, turn and sit down, 25 frames/s.

    Eleven people are trained on, four validate, eight test; intervals are over people. A window has the label that most
    of its frames have. Training draws all classes alike, for two thirds of the frames walk or turn.
    """

    files: ClassVar[tuple[str, ...]] = ("sp-sw-har",)
    takes: ClassVar[str] = (
        "a folder of CSV files named person_anything.csv, of three people or more, each with a header, a row for each "
        "frame, a column for each sensor and one named label"
    )
    references: ClassVar[tuple[str, ...]] = ("temporal_transformer", "temporal_lstm", "temporal_cnn")

    dim: int = 32
    layers: int = 3
    batch: int = 32
    samples_judged: int = 2000

    @property
    def classes(self) -> tuple[str, ...]:
        return _said(self.folder)[0] if self.folder else ACTIVITIES

    @property
    def channels(self) -> tuple[str, ...]:
        return _said(self.folder)[1] if self.folder else CHANNELS

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        if folder is None:
            found = recordings()
            home = {one.person: _part(one.person) for one in found}
        else:
            paths = sorted(folder.glob("*.csv"))
            if not paths:
                raise UserError(f"{folder} holds no recording that can be used; it should be {cls.takes}")
            found = [_recording(path) for path in paths]
            if bare := [one.name for one in found if not one.labels]:
                raise UserError(f"{bare[0]} has no column named label")
            if other := [one.name for one in found if one.channels != found[0].channels]:
                raise UserError(f"{other[0]} has other columns than {found[0].name}; all recordings have the same")
            home = parted([one.person for one in found])
        return [
            Sample(
                one.name, one.person, home[one.person], torch.from_numpy(one.values), one.labels,
                {"channels": one.channels},
            )
            for one in found
        ]  # fmt: skip

    @classmethod
    def open(cls, path: Path) -> Sample:
        one = _recording(path)
        return Sample(path.name, "", "test", torch.from_numpy(one.values))

    def cut(self, recording: Sample) -> Sequence[Sample]:
        found = []
        for start in self.starts(recording):
            (label, _), *_ = Counter(recording.target[start : start + self.frames]).most_common(1)
            inputs = self.window(recording, start)
            found.append(replace(recording, name=f"{recording.name} {start}", inputs=inputs, target=label))
        return found

    def draw(self, rng: np.random.Generator, samples: Sequence[Sample]) -> Sequence[Sample]:
        classes = dict[str, list[Sample]]()
        for sample in samples:
            classes.setdefault(sample.target, []).append(sample)
        names = sorted(classes)
        drawn = [classes[names[i]] for i in rng.integers(0, len(names), self.batch)]
        return [some[int(rng.integers(len(some)))] for some in drawn]

    def reference(self, width: int, kind: str = "") -> nn.Module:
        kind = kind or self.references[0]
        if kind == "temporal_transformer":
            of_frames = [Transformer(self.dim, self.heads, width, self.dropout) for _ in range(self.layers)]
            return self.around(of_frames, positions=True)
        block = TemporalLSTM if kind == "temporal_lstm" else TemporalCNN
        return self.around([block(self.dim, width, self.dropout) for _ in range(self.layers)])


def _part(person: str) -> Part:
    return "train" if person < _VALIDATION else "validation" if person < _TEST else "test"


def _recording(path: Path) -> Recording:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: give a CSV file of sensors") from error
    return read_csv(path.stem, path.stem.partition("_")[0], text)


@cache
def _said(folder: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Classes and channels of the user's folder."""
    found = SensorWindows.read(Path(folder))
    return tuple(sorted({label for one in found for label in one.target})), found[0].about["channels"]
