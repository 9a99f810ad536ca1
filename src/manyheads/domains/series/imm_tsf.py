# SPDX-License-Identifier: Apache-2.0
"""IMM-TSF: timestamped texts fused into a forecast of irregular series.

"Time-IMM: A Dataset and Benchmark for Irregular Multimodal Multivariate Time Series" (arXiv 2506.10412). Two slots
around any forecaster, each with a variant by recency or recurrence and one by attention. A frozen encoder gives texts
``V_n [N, D]`` written at ``tau_n``; the forecaster gives ``Y [Q, C]`` at the times ``t`` that are asked for.

- Timestamp to text. ``recency``: w = exp(-(max(t - tau_n, 0) / sigma)^2), E_t = sum_n w V_n / max(sum_n w, 1e-6),
  LayerNorm, Dropout, Linear; sigma = exp(learned), at first one horizon. ``attention``: keys and values are
  Linear([V_n; T2V(tau_n)]), the query is a learned vector and T2V(t), one head; LayerNorm(attended + query), Dropout,
  Linear; zeros without a text. T2V(t) = [w t + b, sin(W t + B)] (Time2Vec).
- Modalities. ``gated``: u = [Y; E], a GRU over t of C units, Linear, LayerNorm, Dropout: D; g = sigmoid(Linear(u)),
  Y' = g Y + (1 - g) (Y + D). ``cross``: queries W_q Y, keys and values W_k E and W_v E without biases, a Linear,
  LayerNorm, Dropout: D; Y' = (Y + kappa D) / (1 + kappa). A window without a text keeps Y.

Where paper and released code differ this follows the paper: there the attention's query does not depend on ``t``, so
that the texts say the same of the whole horizon (``query=constant`` here), forecasts without a text are shrunk by
1 / (1 + kappa), texts and series have clocks of different origins, and series are scaled by what the test part holds.
With one variable the LayerNorm of D would leave nothing of it and is left out. Choices of ours: texts are brought to
the forecaster's own number of features, not 768, and times are in horizons. ``notes=shuffled`` is the placebo: the
texts of that entity and part in a random order, at the times of its own.

Shapes: ``Y [B, Q, C]``, ``E [B, Q, D]``, texts ``[B, N, D]``, their times ``[B, N]``, masks True where something is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...recipe import Batch, Picture, Recipe

__all__ = ["CrossAttentionFusion", "GatedResidualFusion", "ImmTsf", "RecencyPool", "TextAttention", "Time2Vec"]

Backbone = Literal["time_attention", "patchtst", "dlinear"]


class Time2Vec(nn.Module):
    """Times ``[...] -> [..., size]``: one linear feature, the others sines."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.rates, self.phases = nn.Parameter(torch.randn(size)), nn.Parameter(torch.randn(size))

    def forward(self, times: Tensor) -> Tensor:
        at = times[..., None] * self.rates + self.phases
        return torch.cat((at[..., :1], at[..., 1:].sin()), -1)


class RecencyPool(nn.Module):
    """Texts averaged by how long ago they were written; ``shown`` are weights ``[B, Q, N]`` of the last forward."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.log_sigma = nn.Parameter(torch.zeros(()))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Dropout(dropout), nn.Linear(dim, dim))
        self.shown: Tensor | None = None

    def forward(self, texts: Tensor, times: Tensor, mask: Tensor, queries: Tensor) -> Tensor:
        out: Tensor = self.out(self.pooled(texts, times, mask, queries))
        return out

    def pooled(self, texts: Tensor, times: Tensor, mask: Tensor, queries: Tensor) -> Tensor:
        """The averages, before anything learned."""
        ago = (queries[:, :, None] - times[:, None]).clamp(min=0)
        weights = (-(ago * (-self.log_sigma).exp()).square()).exp() * mask[:, None]
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
        self.shown = weights.detach()
        return weights @ texts


class TextAttention(nn.Module):
    """Times that are asked for attend to texts and when they were written; ``shown`` as :class:`RecencyPool` has."""

    def __init__(self, dim: int, dropout: float, by_time: bool = True) -> None:
        super().__init__()
        self.times = Time2Vec(dim // 2)
        self.embed, self.query = nn.Linear(dim + dim // 2, dim), nn.Parameter(torch.randn(dim) * 0.02)
        self.ask = nn.Linear(dim + dim // 2, dim) if by_time else None
        self.attention = nn.MultiheadAttention(dim, 1, dropout, batch_first=True)
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Dropout(dropout), nn.Linear(dim, dim))
        self.shown: Tensor | None = None

    def forward(self, texts: Tensor, times: Tensor, mask: Tensor, queries: Tensor) -> Tensor:
        known = self.embed(torch.cat((texts, self.times(times)), -1))
        query = self.query.expand(*queries.shape, -1)
        if self.ask is not None:
            query = self.ask(torch.cat((query, self.times(queries)), -1))
        hidden = ~mask
        hidden[:, 0] &= mask.any(1)  # a window without a text attends to padding, and is zeroed
        attended, self.shown = self.attention(query, known, known, key_padding_mask=hidden)
        out: Tensor = self.out(attended + query) * mask.any(1)[:, None, None]
        return out


class GatedResidualFusion(nn.Module):
    """A residual by a GRU over the horizon, as far as a gate lets it."""

    def __init__(self, channels: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.recurrent = nn.GRU(channels + dim, channels, batch_first=True)
        self.residual, self.gate = _residual(channels, channels, dropout), nn.Linear(channels + dim, channels)

    def forward(self, y: Tensor, texts: Tensor, asked: Tensor, noted: Tensor) -> Tensor:
        both = torch.cat((y, texts), -1)
        change = self.residual(self.recurrent(both)[0])
        gate = self.gate(both).sigmoid().masked_fill(~noted[:, None, None], 1.0)
        out: Tensor = gate * y + (1 - gate) * (y + change)
        return out


class CrossAttentionFusion(nn.Module):
    """A residual by attention of the forecast to what the texts say at all times of the horizon."""

    def __init__(self, channels: int, dim: int, dropout: float, kappa: float) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(size, dim, bias=False) for size in (channels, dim, dim))
        self.attention = nn.MultiheadAttention(dim, 1, dropout, batch_first=True)
        self.residual, self.kappa = _residual(dim, channels, dropout), kappa

    def forward(self, y: Tensor, texts: Tensor, asked: Tensor, noted: Tensor) -> Tensor:
        attended = self.attention(self.q(y), self.k(texts), self.v(texts), key_padding_mask=~asked, need_weights=False)[
            0
        ]
        fused = (y + self.kappa * self.residual(attended)) / (1 + self.kappa)
        return torch.where(noted[:, None, None], fused, y)


def _residual(size: int, channels: int, dropout: float) -> nn.Module:
    norm = nn.LayerNorm(channels) if channels > 1 else nn.Identity()
    return nn.Sequential(nn.Linear(size, channels), norm, nn.Dropout(dropout))


class Fused(nn.Module):
    """A forecaster with both slots; ``forward(batch) -> [B, Q, C]``."""

    def __init__(self, recipe: "ImmTsf", task: Any, forecaster: nn.Module) -> None:
        super().__init__()
        dim, fused, recent = task.dim, (task.channels, task.dim, task.dropout), recipe.ttf == "recency"
        self.forecaster, self.texts = forecaster, "notes" if recipe.notes == "own" else "placebo"
        self.project, given = nn.Linear(task.text_width, dim), (dim, task.dropout)
        self.timed = RecencyPool(*given) if recent else TextAttention(*given, recipe.query == "times")
        gated = recipe.mmf == "gated"
        self.fusion = GatedResidualFusion(*fused) if gated else CrossAttentionFusion(*fused, recipe.kappa)

    def forward(self, batch: Batch) -> Tensor:
        y: Tensor = self.forecaster(batch)
        mask = batch["note_mask"]
        if not mask.any():
            return y
        texts = self.timed(self.project(batch[self.texts]), batch["note_times"], mask, batch["queries"])
        out: Tensor = self.fusion(y, texts, batch["asked"], mask.any(1))
        return out


@dataclass(frozen=True, kw_only=True)
class ImmTsf(Recipe):
    """Texts and when they were written, fused into a forecast.

    Attributes:
        ttf: how texts are brought to the times that are asked for.
        mmf: how they change the forecast.
        backbone: the forecaster, a reference model of the task.
        notes: an entity's own texts, or the same in a random order, the placebo.
        query: of the attention to texts: the times that are asked for, or a constant, as released.
        kappa: weight of the residual where ``mmf=cross``.
    """

    task: ClassVar[str] = "irregular_forecast"

    ttf: Literal["recency", "attention"] = field(default="recency", metadata={"help": "how texts get to the times"})
    mmf: Literal["gated", "cross"] = field(default="gated", metadata={"help": "gated residual or cross-attention"})
    backbone: Backbone = field(default="time_attention", metadata={"help": "the forecaster, a reference of the task"})
    notes: Literal["own", "shuffled"] = field(default="own", metadata={"help": "own texts, or shuffled, a placebo"})
    query: Literal["times", "constant"] = field(
        default="times", metadata={"help": "of attention; constant as released"}
    )
    kappa: float = field(default=0.5, metadata={"help": "weight of the residual of the cross-attention"})

    def __post_init__(self) -> None:
        if not self.kappa >= 0:
            raise UserError(f"imm_tsf: kappa={self.kappa:g}: a weight is 0 or more; write kappa=0.5")

    def build(self, task: Any, width: int) -> nn.Module:
        return Fused(self, task, task.reference(width, self.backbone))

    def pictures(self, model: Any, batch: Batch) -> Sequence[Picture]:
        """Weights of the texts of a test window by the times that are asked for."""
        if not batch["note_mask"].any():
            return ()
        model(batch)
        seen = int(batch["note_mask"].sum(1).argmax())
        asked, noted, days = batch["asked"][seen], batch["note_mask"][seen], batch["windows"][seen].days
        times = batch["queries"][seen][asked], batch["note_times"][seen][noted]
        rows, columns = ([f"{days * float(t):.1f}" for t in some] for some in times)
        weights = model.timed.shown[seen][asked][:, noted].float().tolist()
        return (Picture("weights of texts", rows, columns, weights, ("days ahead", "written, in days")),)
