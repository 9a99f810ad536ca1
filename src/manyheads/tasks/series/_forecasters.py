# SPDX-License-Identifier: Apache-2.0
"""Forecasters of irregular series that papers build upon: one that reads times, two that read a regular grid.

All take a batch as :mod:`.irregular_forecast` makes it and give a forecast ``[B, Q, C]`` at its query times. The level
of each variable, the mean of what its history has, is taken away before and added again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...recipe import Batch

__all__ = ["DLinear", "Forecaster", "PatchTST", "TimeAttention", "TimeCode", "carried_forward", "interpolated"]


class Forecaster(nn.Module):
    """A backbone with the level of each variable taken away and added again.

    Args:
        backbone: ``backbone(values [B, L, C], mask [B, L, C], batch) -> [B, Q, C]``.
        channels: C.
    """

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone, self.channels = backbone, channels

    def forward(self, batch: Batch) -> Tensor:
        """Forecast ``[B, Q, C]``."""
        mask = batch["mask"]
        seen = mask.to(batch["values"].dtype)
        level = (batch["values"] * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
        found = self.backbone((batch["values"] - level) * seen, mask, batch)
        out: Tensor = found + level
        return out


class TimeCode(nn.Module):
    """Features of times, ``[B, T] -> [B, T, dim]``: sines of learned rates, of which the slowest begins at half a wave
    a history, the fastest at half a wave a step, and the time itself; then a layer.
    """

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        rates = torch.logspace(0, math.log10(max(2, steps)), dim - 1) * math.pi
        self.rates, self.phases = nn.Parameter(rates), nn.Parameter(torch.arange(dim - 1) % 2 * (math.pi / 2))
        self.layer = nn.Linear(dim, dim)

    def forward(self, times: Tensor) -> Tensor:
        """Features of times."""
        waves = (times[..., None] * self.rates + self.phases).sin()
        out: Tensor = self.layer(torch.cat((waves, times[..., None]), -1))
        return out


class TimeAttention(nn.Module):
    """Reads irregular times: a token for each time of the history, and query times that attend to the tokens.

    The idea of multi-time attention (mTAN, arXiv 2101.10318), with a Transformer's blocks of torch.

    Args:
        blocks: of the history, each ``block(x [B, L, dim], mask [B, L]) -> [B, L, dim]``.
        channels: C.
        dim, heads, width, dropout: of the block of the queries.
        steps: observations of a history, about.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], channels: int, dim: int, heads: int, width: int, dropout: float, steps: int
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(2 * channels, dim)
        self.times, self.queries = TimeCode(dim, steps), TimeCode(dim, steps)
        self.blocks, self.norms = nn.ModuleList(blocks), nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.feedforward = nn.Sequential(
            nn.Linear(dim, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, dim), nn.Dropout(dropout)
        )
        self.head = nn.Linear(dim, channels)

    def forward(self, values: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        """Forecast ``[B, Q, C]``."""
        there = batch["there"]
        x = self.embed(torch.cat((values, mask.to(values.dtype)), -1)) + self.times(batch["times"])
        for block in self.blocks:
            x = block(x, there)
        x, q = self.norms[0](x), self.queries(batch["queries"])
        q = q + self.attention(self.norms[1](q), x, x, key_padding_mask=~there, need_weights=False)[0]
        out: Tensor = self.head(q + self.feedforward(self.norms[2](q)))
        return out


def carried_forward(values: Tensor, mask: Tensor, times: Tensor, there: Tensor, steps: int) -> Tensor:
    """A regular grid ``[B, steps, C]``: at each step the last value observed up to it, 0 before the first.

    Args:
        values, mask: ``[B, L, C]``.
        times: ``[B, L]``, from -1 to 0, ascending.
        there: ``[B, L]``.
        steps: of the grid, which ends at 0.
    """
    ends = torch.arange(1 - steps, 1, device=times.device) / steps
    known = mask & there[..., None]
    before = (times[:, None, :] <= ends[None, :, None] + 1e-6)[..., None] & known[:, None]  # [B, steps, L, C]
    place = torch.arange(1, values.shape[1] + 1, device=times.device)[None, None, :, None]
    last = (before * place).amax(2)  # [B, steps, C], 0: none
    found = torch.gather(values, 1, (last - 1).clamp(min=0))
    return found * (last > 0)


def interpolated(grid: Tensor, queries: Tensor) -> Tensor:
    """Values ``[B, Q, C]`` at times ``[B, Q]`` in (0, 1] of a grid ``[B, G, C]`` at 1/G, 2/G, ... 1."""
    steps = grid.shape[1]
    at = (queries * steps - 1).clamp(0, steps - 1)
    low = at.floor().long().clamp(max=max(0, steps - 2))
    share = (at - low)[..., None]
    first, second = (
        torch.gather(grid, 1, i[..., None].expand(-1, -1, grid.shape[2])) for i in (low, (low + 1).clamp(max=steps - 1))
    )
    return first + share * (second - first)


class DLinear(nn.Module):
    """Reads a grid: linear maps of its trend and of the rest (arXiv 2205.13504), and a perceptron of ``width`` beside
    them, by which its size is matched; the same for every variable.
    """

    def __init__(self, steps: int, width: int, dropout: float, window: int = 25) -> None:
        super().__init__()
        self.steps, self.window = steps, min(window, steps) // 2 * 2 + 1
        self.trend, self.rest = nn.Linear(steps, steps), nn.Linear(steps, steps)
        for layer in (self.trend, self.rest):
            nn.init.constant_(layer.weight, 1 / steps)
        self.more = nn.Sequential(nn.Linear(steps, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, steps))

    def forward(self, values: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        """Forecast ``[B, Q, C]``."""
        x = carried_forward(values, mask, batch["times"], batch["there"], self.steps).mT  # [B, C, steps]
        ends = nn.functional.pad(x, (self.window // 2, self.window // 2), "replicate")
        trend = nn.functional.avg_pool1d(ends, self.window, 1)
        return interpolated((self.trend(trend) + self.rest(x - trend) + self.more(x)).mT, batch["queries"])


class PatchTST(nn.Module):
    """Reads a grid in patches by a Transformer, each variable by itself (arXiv 2211.14730), of transformers."""

    def __init__(
        self, steps: int, channels: int, dim: int, layers: int, heads: int, width: int, dropout: float
    ) -> None:
        super().__init__()
        from transformers import PatchTSTConfig, PatchTSTForPrediction

        kind: Any = PatchTSTConfig
        patch = max(2, steps // 8)
        config = kind(
            num_input_channels=channels, context_length=steps, prediction_length=steps, patch_length=patch,
            patch_stride=patch, d_model=dim, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=width,
            norm_type="layernorm", attention_dropout=dropout, positional_dropout=dropout, ff_dropout=dropout,
            head_dropout=dropout, scaling=None, loss="mse", do_mask_input=False,
        )  # fmt: skip
        self.steps, self.model = steps, PatchTSTForPrediction(config)

    def forward(self, values: Tensor, mask: Tensor, batch: Batch) -> Tensor:
        """Forecast ``[B, Q, C]``."""
        grid = carried_forward(values, mask, batch["times"], batch["there"], self.steps)
        return interpolated(self.model(past_values=grid).prediction_outputs, batch["queries"])
