# SPDX-License-Identifier: Apache-2.0
"""Where the price of a limit order book goes, up, down or neither, on days that no training has seen: F1."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...data.order_books import COLUMNS, LEVELS, BookDay, book_days, read_book, simulated_day
from ...errors import UserError
from ...recipe import Part, Sample
from .._field import parted
from ._window_classes import WindowTask

__all__ = ["DeepLOB", "OrderBook", "trend"]

_DAYS: tuple[tuple[Part, range], ...] = (("train", range(32)), ("validation", range(32, 36)), ("test", range(36, 44)))
_SNAPSHOTS = 800  # of a simulated day
_FIRST = 0.8  # of FI-2010's training file that is trained on; the rest validates


def trend(mid: np.ndarray, horizon: int, smooth: int) -> np.ndarray:
    """TLOB's label before its threshold, at each ``t`` that has one: float64 ``[T]``, NaN elsewhere.

    ``l = (m+ - m-) / m-``: m- is the mean of the ``smooth`` prices up to t, m+ of those up to ``t + horizon``. What is
    smoothed does not depend on the horizon, and both means end where they say. ``smooth`` is at most
    ``horizon``, so that no price is in both.
    """
    smooth, found = min(smooth, horizon), np.full(len(mid), np.nan)
    sums = np.cumsum(np.concatenate(([0.0], mid)))
    means = np.full(len(mid), np.nan)
    means[smooth - 1 :] = (sums[smooth:] - sums[:-smooth]) / smooth
    if len(mid) > horizon:
        found[:-horizon] = means[horizon:] / means[:-horizon] - 1
    return found


@dataclass(frozen=True, kw_only=True)
class OrderBook(WindowTask):
    """Forty-four days of a simulated book (:mod:`manyheads.data.order_books`), or days of one's own.

    Thirty-two days are trained on, four validate, eight test; intervals are over days. A window is ``frames``
    snapshots of ten levels: prices in hundredths of a percent from the last mid price, logarithms of sizes. Its class
    says whether :func:`trend` exceeds a threshold, which is taken from the days of the training part alone.

    Attributes:
        horizon: snapshots ahead.
        smooth: snapshots of the means that are compared.
        threshold: ``balanced``, half the mean size of a trend; or ``spread``, the mean spread by the mean price, below
            which a trend does not pay for the two sides of a trade.
    """

    files: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[str] = (
        "a folder of order books of three days or more, each LOBSTER's *_orderbook_10.csv, or an FI-2010 file "
        "(*NoAuction_DecPre*.txt)"
    )
    references: ClassVar[tuple[str, ...]] = ("deeplob",)

    dim: int = 24
    layers: int = 2
    width: int = 64
    batch: int = 64
    frames: int = 50
    samples_judged: int = 2000
    horizon: int = 20
    smooth: int = 10
    threshold: Literal["balanced", "spread"] = "balanced"
    every: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.horizon, self.smooth) < 1:
            raise UserError("horizon and smooth count snapshots, 1 or more")

    @property
    def classes(self) -> tuple[str, ...]:
        return ("up", "flat", "down")

    @property
    def channels(self) -> tuple[str, ...]:
        return COLUMNS

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        if folder is None:
            made = [(part, simulated_day(seed, _SNAPSHOTS)) for part, seeds in _DAYS for seed in seeds]
        else:
            made = _own(book_days(folder))
        return [Sample(day.name, day.day, part, torch.from_numpy(day.values)) for part, day in made]

    @classmethod
    def open(cls, path: Path) -> Sample:
        return Sample(path.name, "", "test", torch.from_numpy(read_book(path)[-1].values))

    def cut(self, recording: Sample) -> Sequence[Sample]:
        """Windows of a day that have a trend."""
        values = trend(_mid(recording), self.horizon, self.smooth)
        bound, found = self.bound(), []
        for start in self.starts(recording):
            t = start + self.frames - 1
            if np.isfinite(values[t]):
                label = self.classes[1 + int(values[t] < -bound) - int(values[t] > bound)]
                window = self.window(recording, start)
                found.append(replace(recording, name=f"{recording.name} {t}", inputs=window, target=label))
        return found

    def bound(self) -> float:
        """The threshold of trends, of the training part."""
        days = self.recordings("train")
        if self.threshold == "spread":
            spreads = np.concatenate([(day.inputs[:, 0] - day.inputs[:, 2]).numpy() for day in days])
            return float(spreads.mean() / np.concatenate([_mid(day) for day in days]).mean())
        trends = np.concatenate([trend(_mid(day), self.horizon, self.smooth) for day in days])
        if not np.isfinite(trends).any():
            raise UserError(f"no day to train on has {self.horizon + self.smooth} snapshots; give longer ones")
        return float(np.nanmean(np.abs(trends)) / 2)

    def window(self, sample: Sample, start: int) -> Tensor:
        return _seen(super().window(sample, start))

    def reference(self, width: int, kind: str = "") -> nn.Module:
        return DeepLOB(self.dim, width, len(self.classes), self.dropout)


class DeepLOB(nn.Module):
    """Zhang et al., arXiv 1808.03668: convolutions that join price and size, sides, levels; inception; an LSTM.

    Snapshots ``[B, T, 40]`` -> logits ``[B, classes]``. Batch norm in place of scales of the whole set.

    Args:
        dim: feature maps.
        width: cells of the LSTM.
        classes: of the last layer.
        dropout: before it.
    """

    def __init__(self, dim: int, width: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.scale = nn.BatchNorm1d(4 * LEVELS, affine=False)
        joins = (1, (1, 2)), (dim, (1, 2)), (dim, (1, LEVELS))
        self.convs = nn.Sequential(*(
            nn.Sequential(
                nn.Conv2d(before, dim, over, stride=over), nn.LeakyReLU(0.01), nn.BatchNorm2d(dim),
                nn.Conv2d(dim, dim, (3, 1), padding=(1, 0)), nn.LeakyReLU(0.01), nn.BatchNorm2d(dim),
            )
            for before, over in joins
        ))  # fmt: skip
        self.inception = nn.ModuleList(
            nn.Sequential(nn.Conv1d(dim, dim, 1), nn.LeakyReLU(0.01), nn.Conv1d(dim, dim, taps, padding=taps // 2))
            for taps in (1, 3, 5)
        )
        self.lstm = nn.LSTM(3 * dim, width, batch_first=True)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(width, classes)

    def forward(self, snapshots: Tensor) -> Tensor:
        """Logits."""
        x = self.convs(self.scale(snapshots.mT).mT[:, None])[..., 0]
        x = torch.cat([branch(x) for branch in self.inception], 1)
        logits: Tensor = self.head(self.dropout(self.lstm(x.mT)[0][:, -1]))
        return logits


def _mid(day: Sample) -> np.ndarray:
    found: np.ndarray = ((day.inputs[:, 0] + day.inputs[:, 2]) / 2).numpy()
    return found


def _seen(window: Tensor) -> Tensor:
    """A window of raw snapshots ``[S, 40]`` as models read it, float32."""
    found, last = window.clone(), (window[-1, 0] + window[-1, 2]) / 2
    found[:, 0::2] = (found[:, 0::2] / last - 1) * 1e4
    found[:, 1::2] = found[:, 1::2].clamp(min=0).log1p()
    return found.float()


def _own(days: Sequence[BookDay]) -> list[tuple[Part, BookDay]]:
    """Parts of the user's days: FI-2010's as its files say, others by day.

    Raises:
        UserError: of FI-2010 a day would be in two parts: ``Train_..._CF_7`` holds days 1 to 7, ``Test_..._CF_k`` the
            day after k.
    """
    folds: dict[bool, set[int]] = {True: set(), False: set()}  # k of training files, and of test files
    for day in days:
        fold = re.search(r"CF_(\d+)", day.day)
        folds[day.day.startswith("Train_")].add(int(fold[1]) if fold else 0)
    if not folds[True]:
        home = parted([day.day for day in days])
        return [(home[day.day], day) for day in days]
    if len(folds[True]) > 1 or min(folds[False], default=0) < min(folds[True]):
        raise UserError("of FI-2010 give one training file, Train_..._CF_k, and test files from Test_..._CF_k on")
    made: list[tuple[Part, BookDay]] = []
    for day in days:
        if not day.day.startswith("Train_"):
            made.append(("test", day))
            continue
        cut = round(_FIRST * len(day.values))
        parts: tuple[tuple[Part, np.ndarray], ...] = (("train", day.values[:cut]), ("validation", day.values[cut:]))
        made += [(part, BookDay(f"{day.name} {part}", f"{day.day} {part}", values)) for part, values in parts]
    return made
