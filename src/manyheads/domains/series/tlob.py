# SPDX-License-Identifier: Apache-2.0
"""TLOB: A Novel Transformer Model with Dual Attention for Price Trend Prediction with Limit Order Book Data.

arXiv 2502.15757. A window of an order book has two axes, and what is to be seen lies along both: how the book moved,
and how its levels stand to each other. So layers attend over time and over features in turn, by transposition:

    x [B, S, F] -> bilinear normalisation -> linear F to d, sinusoidal positions -> ``layers`` pairs -> flat -> classes
    pair: layer over S tokens of width d; transpose; layer over d tokens of width S; transpose
    layer(x): h = LN(x + W_0 MHA(x)); m = W_2 GELU(W_1 h); GELU(LN(m + h)) + x     (a residual where sizes are equal)

The last pair makes d to d / 4 and S to S / 4. Bilinear normalisation (BiN) adds two z-scores of the window, each with
its own scale and shift: of each feature over time, and of each snapshot over features; weights y1, y2 > 0 are learned.
MLPLOB (``mixing=mlp``), the paper's second model, has the MLPs without attention; ``axes`` leaves one attention out.

Faults of the released code that are not repeated: BiN sets a weight anew inside its forward where it fell below 0 (here
it is a softplus, 0.5 at first); its second half divides by 0 where a snapshot is constant; and queries, keys and values
pass two linear maps in a row, which are one. ``width`` is the hidden size of the MLPs, four times theirs there. Each of
``heads`` is as wide as its tokens, as there. Left out: the message columns of LOBSTER, an average of weights over
training. The labels, whose thresholds there are fit on the test days too, are the task's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...attention.positions import sinusoids
from ...errors import UserError
from ...recipe import Batch, FieldTask, Picture, Recipe

__all__ = ["TLOB", "BilinearNorm", "Layer", "Tlob"]

_CONSTANT = 1e-4  # a deviation below which nothing is divided by it
_MOST = 128  # features in front of the last layer


class BilinearNorm(nn.Module):
    """``[B, S, F] -> [B, S, F]``: y1 of the z-score over features and y2 of that over time."""

    def __init__(self, frames: int, features: int) -> None:
        super().__init__()
        self.scale_t, self.shift_t = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
        self.scale_f, self.shift_f = nn.Parameter(torch.ones(frames, 1)), nn.Parameter(torch.zeros(frames, 1))
        self.weights = nn.Parameter(torch.full((2,), math.log(math.expm1(0.5))))

    def forward(self, x: Tensor) -> Tensor:
        over_time = self.scale_t * _z_score(x, 1) + self.shift_t
        over_features = self.scale_f * _z_score(x, 2) + self.shift_f
        y1, y2 = nn.functional.softplus(self.weights)
        out: Tensor = y1 * over_features + y2 * over_time
        return out


def _z_score(x: Tensor, axis: int) -> Tensor:
    """Mean 0 and variance 1 along an axis; a constant is 0."""
    away = x - x.mean(axis, keepdim=True)
    spread = away.square().mean(axis, keepdim=True).sqrt()
    return away / spread.masked_fill(spread < _CONSTANT, 1.0)


class Layer(nn.Module):
    """One layer over tokens, ``[B, N, width] -> [B, N, out]``.

    Attributes:
        shown: attention weights ``[B, H, N, N]`` of the last forward; none without attention.
    """

    def __init__(self, width: int, hidden: int, out: int, heads: int, dropout: float, attend: bool) -> None:
        super().__init__()
        self.heads, self.attend, self.shown = heads, attend, torch.empty(0)
        if attend:
            self.qkv, self.w0 = nn.Linear(width, 3 * heads * width), nn.Linear(heads * width, width)
            self.norm = nn.LayerNorm(width)
        self.up, self.down, self.last = nn.Linear(width, hidden), nn.Linear(hidden, out), nn.LayerNorm(out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x + self.dropout(self._attention(x))) if self.attend else x
        m: Tensor = self.down(nn.functional.gelu(self.up(h)))
        same = m.shape[-1] == x.shape[-1]
        m = nn.functional.gelu(self.last(self.dropout(m) + h if same else m))
        return m + x if same else m

    def _attention(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        self.shown = weights.detach()
        out: Tensor = self.w0((weights @ v).transpose(1, 2).flatten(2))
        return out


class TLOB(nn.Module):
    """Snapshots ``[B, S, F]`` -> logits ``[B, classes]``; pairs of layers of which each may lack attention."""

    def __init__(self, recipe: "Tlob", task: Any, width: int) -> None:
        super().__init__()
        frames, dim, features = task.frames, task.dim, len(task.channels)
        self.norm = BilinearNorm(frames, features) if recipe.normalise else nn.Identity()
        self.project = nn.Linear(features, dim)
        attends = [recipe.mixing == "attention" and recipe.axes in ("both", axis) for axis in ("time", "features")]
        pairs = []
        for i in range(task.layers):
            ends = (dim, frames) if i < task.layers - 1 else (max(1, dim // 4), max(1, frames // 4))
            pairs.append(nn.ModuleList(
                Layer(size, width, end, recipe.heads, task.dropout, attend)
                for size, end, attend in zip((dim, frames), ends, attends, strict=True)
            ))  # fmt: skip
        self.pairs = nn.ModuleList(pairs)
        sizes = [ends[0] * ends[1]]
        while sizes[-1] > _MOST:
            sizes.append(sizes[-1] // 4)
        chain: list[nn.Module] = []
        for before, after in pairwise(sizes):
            chain += [nn.Linear(before, after), nn.GELU()]
        self.head = nn.Sequential(*chain, nn.Linear(sizes[-1], len(task.classes)))

    def forward(self, snapshots: Tensor) -> Tensor:
        """Logits."""
        x = self.project(self.norm(snapshots))
        x = x + sinusoids(torch.arange(x.shape[1], device=x.device), x.shape[2]).to(x)
        for i in range(len(self.pairs)):
            over_time, over_features = self.pair(i)
            x = over_features(over_time(x).mT).mT
        logits: Tensor = self.head(x.flatten(1))
        return logits

    def pair(self, layer: int) -> tuple[Layer, Layer]:
        """The layers over time and over features."""
        over_time, over_features = self.pairs[layer].children()
        assert isinstance(over_time, Layer) and isinstance(over_features, Layer)
        return over_time, over_features


@dataclass(frozen=True, kw_only=True)
class Tlob(Recipe):
    """A transformer of order books whose layers attend over time and over features in turn.

    Attributes:
        mixing: by attention and MLPs, or by MLPs alone, which is MLPLOB.
        axes: that attention is over; layers of the other axis keep their MLPs.
        heads: each as wide as its tokens.
        normalise: by BiN.
    """

    task: ClassVar[str] = "order_book"

    mixing: Literal["attention", "mlp"] = field(default="attention", metadata={"help": "attention, or mlp: MLPLOB"})
    axes: Literal["both", "time", "features"] = field(default="both", metadata={"help": "both, time or features"})
    heads: int = field(default=1, metadata={"help": "heads, each as wide as its tokens"})
    normalise: bool = field(default=True, metadata={"help": "bilinear normalisation of the window"})

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise UserError("tlob: heads count, 1 or more; write heads=1")
        if self.mixing == "mlp" and self.axes != "both":
            raise UserError("tlob: mixing=mlp has no attention whose axes could be chosen; leave axes out")

    def build(self, task: FieldTask, width: int) -> nn.Module:
        return TLOB(self, task, width)

    def pictures(self, model: nn.Module, batch: Batch) -> Sequence[Picture]:
        """Attention that snapshots and features receive, by layer, over test windows."""
        assert isinstance(model, TLOB)
        model(batch["inputs"])
        found = []
        for axis, name in enumerate(("snapshots", "features")):
            layers = [model.pair(i)[axis] for i in range(len(model.pairs))]
            rows = [layer.shown.float().mean((0, 1, 2)).tolist() for layer in layers if layer.attend]
            if rows:
                columns = [str(i) for i in range(len(rows[0]))]
                labels = [str(i) for i in range(len(rows))]
                rows = [row + [math.nan] * (len(columns) - len(row)) for row in rows]  # the last has fewer features
                found.append(Picture(f"attention that {name} receive", labels, columns, rows, ("layers", name)))
        return found
