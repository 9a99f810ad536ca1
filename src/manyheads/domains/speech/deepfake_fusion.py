# SPDX-License-Identifier: Apache-2.0
"""Two Views, One Truth: Spectral and Self-Supervised Features Fusion for Robust Speech Deepfake Detection (arXiv
2507.20417).

Of a recording there are two views: frames of a pretrained model ``s [B, T, 384]``, and cepstral coefficients
``c [B, F, 60]`` (LFCC, MFCC or CQCC: the task's ``spectral``). Each is normalised and projected to D features, c is
interpolated linearly to the T frames of s, and one sequence z ``[B, T, D]`` goes on to the back-end:

- ``concat``: z = W [s; c]
- ``cross``: z = LN(s + MHA(s, c, c)): the pretrained view asks, the spectral one answers
- ``mutual``: z = W [LN(s + MHA(s, c, c)); LN(c + MHA(c, s, s))]: attention in both directions
- ``gate``: z = g * s + (1 - g) * c, g = sigmoid(W [s; c] + b) for each frame and feature; g is shown

The forms of the fusion and the features are the paper's. What its opening and the first author's framework do not say
is chosen here: the widths, the alignment, no positions in the attention, attentive statistics pooling as the back-end
(the task's), a loss without weights on batches that hold as many real recordings as fakes. The pretrained model stays
frozen, and is the task's stand-in, trained with labels, where the paper's are self-supervised. Left out: the
augmentation of waveforms (RawBoost), for frozen features are made once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ...recipe import Batch, FieldTask, Picture, Recipe

__all__ = ["CrossAttention", "DeepfakeFusion", "Fusion", "aligned"]

Kind = Literal["concat", "cross", "mutual", "gate"]


def aligned(x: Tensor, length: int) -> Tensor:
    """Frames ``[B, F, D]`` at ``length`` even places from the first to the last, linear between neighbours."""
    return interpolate(x.mT, length, mode="linear", align_corners=True).mT


class CrossAttention(nn.Module):
    """LN(x + MHA(x, y, y)): ``[B, T, D]`` and ``[B, T, D]`` -> ``[B, T, D]``.

    Attributes:
        shown: weights ``[B, T, T]`` of the last forward, a mean over heads; kept where ``show`` is set.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)
        self.norm = nn.LayerNorm(dim)
        self.show, self.shown = False, torch.empty(0)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out, weights = self.attention(x, y, y, need_weights=self.show)
        if weights is not None:
            self.shown = weights.detach()
        found: Tensor = self.norm(x + out)
        return found


class Fusion(nn.Module):
    """Both views of a recording as one sequence: ``s [B, T, S]``, ``c [B, F, C]`` -> ``[B, T, dim]``.

    Args:
        sizes: features S and C.
        dim: features of each view and of what is made of them.
        heads, dropout: of attention.
        kind: of the fusion.
    """

    def __init__(self, sizes: Sequence[int], dim: int, heads: int, dropout: float, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.project = nn.ModuleList(nn.Sequential(nn.LayerNorm(size), nn.Linear(size, dim)) for size in sizes)
        if kind != "cross":
            self.join = nn.Linear(2 * dim, dim)
        if kind in ("cross", "mutual"):
            self.ask = nn.ModuleList(CrossAttention(dim, heads, dropout) for _ in range(2 if kind == "mutual" else 1))

    def views(self, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Both views, projected and aligned, ``[B, T, dim]`` each."""
        return self.project[0](s), aligned(self.project[1](c), s.shape[1])

    def gate(self, s: Tensor, c: Tensor) -> Tensor:
        """The share of the first of two aligned views."""
        return torch.sigmoid(self.join(torch.cat((s, c), -1)))

    def forward(self, s: Tensor, c: Tensor) -> Tensor:
        s, c = self.views(s, c)
        if self.kind == "gate":
            share = self.gate(s, c)
            return share * s + (1 - share) * c
        if self.kind == "cross":
            found: Tensor = self.ask[0](s, c)
            return found
        both = (self.ask[0](s, c), self.ask[1](c, s)) if self.kind == "mutual" else (s, c)
        joined: Tensor = self.join(torch.cat(both, -1))
        return joined


@dataclass(frozen=True, kw_only=True)
class DeepfakeFusion(Recipe):
    """A detector of fake speech that reads spectral and pretrained features as one sequence.

    Attributes:
        fusion: how the two become one.
    """

    task: ClassVar[str] = "speech_deepfakes"

    fusion: Kind = field(default="cross", metadata={"help": "how the views become one: concat, cross, mutual or gate"})

    def build(self, task: FieldTask, width: int) -> nn.Module:
        model: Any = task.reference(width)  # with one view: all else is the same
        model.fuse = Fusion(model.sizes, task.dim, task.heads, task.dropout, self.fusion)
        made: nn.Module = model
        return made

    def pictures(self, model: nn.Module, batch: Batch) -> Sequence[Picture]:
        """Which frames of the spectral view are read, or the share of the pretrained view, for the first recording."""
        fusion: Any = model.fuse
        frames = [str(i) for i in range(batch["inputs"].shape[1])]
        if self.fusion == "gate":
            share = fusion.gate(*fusion.views(batch["inputs"][:1], batch["spectral"][:1]))[0].float().mT
            rows = [str(i) for i in range(len(share))]
            title = "share of the pretrained view"
            return (Picture(title, rows, frames, share.tolist(), ("features", "frames of 20 ms")),)
        if self.fusion == "concat":
            return ()
        first = fusion.ask[0]
        first.show = True
        model(batch["inputs"][:1], batch["spectral"][:1])
        first.show = False
        axes = ("frames of the pretrained view", "frames of the spectral view")
        return (Picture("attention of the pretrained view", frames, frames, first.shown[0].float().tolist(), axes),)
