# SPDX-License-Identifier: Apache-2.0
"""L-SFAN: Lightweight Spatially-focused Attention Network for Pain Behavior Detection (arXiv 2406.16913).

A window of body sensors is a picture of time by channel. Filters of both axes read it, an oriented pooling takes the
mean over time alone, and attention relates what is left: one token for each channel, so that what is weighed is where
on the body something is seen, not when.

    x [B, 1, T, F]  -> conv (kernel x reach), BN, ReLU, max over 2 frames; ``layers`` times  -> [B, d, T', F]
    tokens          = mean over T' + a learned embedding of each channel                      -> [B, F, d]
    tokens          = LN(tokens + MHSA(tokens)), then LN(tokens + MLP(tokens))                -> logits of their mean

``pool=sensors`` takes the mean over channels, so that attention is over time; ``both`` leaves one token; ``attend``
false leaves the MLP alone. Pictures: attention by channel, and Grad-CAM of the trunk, ReLU(sum_k a_k A_k) with a_k the
mean gradient of the predicted class's logit over feature map k, as clinicians are shown.

No code was published and sizes could not be read: three blocks, max pooling, the embedding, kernel 5 (for 25 frames a
second) and reach 3 are choices. So is the MLP, whose hidden size is the ``width`` that makes parameters equal. The
classes' imbalance is met by the draws of the task, in place of weights in the loss. The paper's data, EmoPain, are on
request; a folder of them will do.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...errors import UserError
from ...recipe import Batch, FieldTask, Picture, Recipe

__all__ = ["LSFAN", "Lsfan", "SensorAttention"]

Pool = Literal["time", "sensors", "both"]


class SensorAttention(nn.Module):
    """Multi-head self-attention over tokens, ``[B, N, d] -> [B, N, d]``.

    Attributes:
        shown: weights ``[B, H, N, N]`` of the last forward.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.shown = heads, torch.empty(0)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        self.shown = weights.detach()
        out: Tensor = self.out((weights @ v).transpose(1, 2).flatten(2))
        return out


class LSFAN(nn.Module):
    """Frames ``[B, T, F]`` -> logits ``[B, classes]``."""

    def __init__(self, recipe: "Lsfan", task: Any, width: int) -> None:
        super().__init__()
        dim, channels, self.pool = task.dim, len(task.channels), recipe.pool
        self.names = tuple(task.channels)
        self.scale = nn.BatchNorm1d(channels, affine=False)
        sizes = [1, *(max(1, dim // 2) for _ in range(task.layers - 1)), dim]
        around = (recipe.kernel // 2, recipe.reach // 2)
        self.trunk = nn.Sequential(*(
            nn.Sequential(
                nn.Conv2d(a, b, (recipe.kernel, recipe.reach), padding=around), nn.BatchNorm2d(b), nn.ReLU(),
                nn.MaxPool2d((2, 1), ceil_mode=True),
            )
            for a, b in pairwise(sizes)
        ))  # fmt: skip
        places = channels if recipe.pool == "time" else 1
        self.where = nn.Parameter(torch.randn(places, dim) * dim**-0.5)
        self.attention = SensorAttention(dim, task.heads) if recipe.attend else None
        self.mlp = nn.Sequential(nn.Linear(dim, width), nn.GELU(), nn.Linear(width, dim))
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.dropout, self.head = nn.Dropout(task.dropout), nn.Linear(dim, len(task.classes))

    def forward(self, frames: Tensor) -> Tensor:
        """Logits."""
        return self.classify(self.features(frames))

    def features(self, frames: Tensor) -> Tensor:
        """Feature maps ``[B, d, T', F]`` of the trunk."""
        maps: Tensor = self.trunk(self.scale(frames.mT).mT[:, None])
        return maps

    def tokens(self, maps: Tensor) -> Tensor:
        """The oriented pooling: ``[B, F, d]``, or ``[B, T', d]``, or ``[B, 1, d]``."""
        if self.pool == "both":
            return self.where + maps.mean((2, 3))[:, None]
        return self.where + maps.mean(2 if self.pool == "time" else 3).mT

    def classify(self, maps: Tensor) -> Tensor:
        """Logits of feature maps."""
        x = self.tokens(maps)
        if self.attention is not None:
            x = self.norms[0](x + self.dropout(self.attention(x)))
        x = self.norms[1](x + self.dropout(self.mlp(x)))
        logits: Tensor = self.head(x.mean(1))
        return logits

    def grad_cam(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Grad-CAM ``[B, T', F]`` of the class that is predicted, and its number ``[B]``."""
        with torch.enable_grad():
            maps = self.features(frames).detach().requires_grad_()
            best, at = self.classify(maps).max(1)
            (gradient,) = torch.autograd.grad(best.sum(), maps)
        return (gradient.mean((2, 3), keepdim=True) * maps.detach()).sum(1).relu(), at


@dataclass(frozen=True, kw_only=True)
class Lsfan(Recipe):
    """A small CNN over time and sensors, pooled over time, with attention over sensors.

    Attributes:
        pool: axis that the oriented pooling takes the mean over.
        attend: relate what is left by attention; without it the MLP is all there is.
        kernel: frames of a filter, odd.
        reach: sensors of a filter, odd; 1 leaves each alone.
    """

    task: ClassVar[str] = "sensor_windows"

    pool: Pool = field(default="time", metadata={"help": "axis that is pooled: time (the paper), sensors or both"})
    attend: bool = field(default=True, metadata={"help": "attention over what is left"})
    kernel: int = field(default=5, metadata={"help": "frames of a filter"})
    reach: int = field(default=3, metadata={"help": "sensors of a filter"})

    def __post_init__(self) -> None:
        if min(self.kernel, self.reach) < 1 or not self.kernel % 2 or not self.reach % 2:
            raise UserError("lsfan: kernel and reach are windows around a point, odd: write kernel=5,reach=3")

    def build(self, task: FieldTask, width: int) -> nn.Module:
        return LSFAN(self, task, width)

    def pictures(self, model: nn.Module, batch: Batch) -> Sequence[Picture]:
        """Attention that each channel receives, by head; Grad-CAM of the first window."""
        assert isinstance(model, LSFAN)
        map_, _ = model.grad_cam(batch["inputs"][:1])
        names = model.names
        times = [str(2 ** len(model.trunk) * i) for i in range(map_.shape[1])]
        found = [Picture("Grad-CAM of the first window", names, times, map_[0].T.tolist(), ("sensors", "frames"))]
        if model.attention is not None and self.pool == "time":
            model(batch["inputs"])
            heads = [str(i) for i in range(model.attention.heads)]
            shown = model.attention.shown.float().mean((0, 2)).tolist()
            found.append(Picture("attention that sensors receive", heads, names, shown, ("heads", "sensors")))
        return found
