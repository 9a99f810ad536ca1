# SPDX-License-Identifier: Apache-2.0
"""Forecasts of the return of one day: what is read, models of it, and what following a forecast is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss

from ...data.stocks import Prices
from ...errors import UserError
from ...recipe import Batch, Sample
from ._forecast import Array, Table, WalkForward

__all__ = ["FEATURES", "LastToken", "Recurrent", "ReturnForecast", "ReturnTask", "Window", "features"]

FEATURES = 4  # of a day: return, range, close in its range, change of volume


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """What is known at a close.

    Attributes:
        rows: days by features, the last day last ``[L, 4]``; returns and ranges in deviations.
        deviation: of the returns of all days that are kept, in per cent.
        close: the price.
        date: of the close.
    """

    rows: Array
    deviation: float
    close: float
    date: str

    def __neg__(self) -> Window:
        """The window with every feature negated."""
        return replace(self, rows=-self.rows)

    def last(self, days: int) -> Window:
        """The window with its last days alone."""
        return replace(self, rows=self.rows[-days:])


@dataclass(frozen=True, slots=True)
class ReturnForecast:
    """The next day's return.

    Attributes:
        close: price that it starts from.
        percent: 100 times the logarithm of the ratio of the prices.
    """

    close: float
    percent: float

    def __str__(self) -> str:
        return f"{self.close * np.exp(self.percent / 100):.4g} after {self.close:.4g} ({self.percent:+.2f} %)"


def features(share: Prices, first: int, day: int) -> tuple[Array, float]:
    """Features of the days after ``first`` up to ``day``, and the deviation of their returns in per cent.

    Nothing after the close of ``day`` is read.
    """
    seen = slice(first, day + 1)
    high, low, close, volume = (share.column(name)[seen] for name in ("high", "low", "close", "volume"))
    returns = 100 * np.diff(np.log(share.column("adjusted")[seen]))
    deviation = float(max(returns.std(), 1e-3))
    spread = 100 * np.log(high / low)[1:]
    place = ((close - low) / np.maximum(high - low, 1e-9))[1:] - 0.5
    traded = np.diff(np.log(volume + 1)).clip(-3, 3)
    return np.stack((returns / deviation, spread / deviation, place, traded), 1), deviation


class Recurrent(nn.Module):
    """A recurrent network, its last state and a layer, ``[B, L, features] -> [B]``, or ``[B, outputs]`` of several.

    Args:
        kind: ``lstm``, ``gru`` or ``bilstm``.
        dim: features of a day.
        width: of the states.
        layers: of the network.
        dropout: between them, and before the last layer.
        features: of a day.
        outputs: of the last layer.
    """

    def __init__(
        self, kind: str, dim: int, width: int, layers: int, dropout: float, features: int = FEATURES, outputs: int = 1
    ) -> None:
        super().__init__()
        self.embed, two = nn.Linear(features, dim), kind == "bilstm"
        self.network = (nn.GRU if kind == "gru" else nn.LSTM)(
            dim, width, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0, bidirectional=two
        )
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(width * (1 + two), outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Forecast ``[B]``, in deviations; or ``[B, outputs]``."""
        states = self.network(self.embed(x))[0]
        return _one(self.head(states[:, -1]))


class LastToken(nn.Module):
    """Days as tokens with learned positions, blocks, a layer that reads the last one; shapes as :class:`Recurrent`."""

    def __init__(
        self, blocks: Sequence[nn.Module], dim: int, days: int, features: int = FEATURES, outputs: int = 1
    ) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(features, dim), nn.Parameter(torch.randn(days, dim) * 0.1)
        self.blocks, self.norm, self.head = nn.ModuleList(blocks), nn.LayerNorm(dim), nn.Linear(dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast ``[B]``, in deviations; or ``[B, outputs]``."""
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        h = self.embed(x) + self.positions
        for block in self.blocks:
            h = block(h, mask)
        return _one(self.head(self.norm(h[:, -1])))


def _one(x: Tensor) -> Tensor:
    return x[:, 0] if x.shape[1] == 1 else x


@dataclass(frozen=True, kw_only=True)
class ReturnTask(WalkForward):
    """Base of tasks that forecast returns: models, their loss, what they say, rows of tables.

    Attributes:
        history: days that are read.
    """

    references: ClassVar[tuple[str, ...]] = ("lstm", "gru", "bilstm")

    history: int = 30

    @property
    def features(self) -> int:
        """Features of a day."""
        return FEATURES

    def collate(self, samples: Sequence[Sample]) -> Batch:
        if short := next((s for s in samples if len(s.inputs.rows) < self.history), None):
            raise UserError(f"{short.name} has {len(short.inputs.rows)} days, the model reads {self.history}")
        windows = [sample.inputs.last(self.history) for sample in samples]
        inputs = torch.stack([torch.from_numpy(w.rows.copy()).float() for w in windows])
        if any(sample.target is None for sample in samples):
            return {"inputs": inputs, "windows": windows}
        targets = [s.target[0] / w.deviation for s, w in zip(samples, windows, strict=True)]
        return {"inputs": inputs, "windows": windows, "targets": torch.tensor(targets, dtype=torch.float32)}

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        return LastToken(blocks, self.dim, self.history)

    def reference(self, width: int, kind: str = "") -> nn.Module:
        return Recurrent(kind or self.references[0], self.dim, width, self.layers, self.dropout)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = huber_loss(model(batch["inputs"]).float(), batch["targets"])
        return found

    def predict(self, model: nn.Module, batch: Batch) -> list[ReturnForecast]:
        said = model(batch["inputs"]).float().cpu().tolist()
        return [ReturnForecast(w.close, x * w.deviation) for x, w in zip(said, batch["windows"], strict=True)]

    def truth(self, sample: Sample) -> ReturnForecast:
        return ReturnForecast(sample.inputs.close, sample.target[0])

    def table(self, sample: Sample) -> Table:
        window = sample.inputs
        returns = window.rows[:, 0] * window.deviation
        row = [0.0, returns[-5], *returns[-5:], returns[-25:].mean(), returns[-25], window.rows[-1, 1]]
        names = ("last", "season", *(f"return {i}" for i in range(5, 0, -1)), "drift", "25 days ago", "range")
        kinds, zero = np.zeros(1, np.int64), np.zeros(1)
        return Table(names, np.array([row]), kinds, zero, np.array(sample.target, float))

    def told(self, sample: Sample, values: Array) -> ReturnForecast:
        return ReturnForecast(sample.inputs.close, float(values[0]))
