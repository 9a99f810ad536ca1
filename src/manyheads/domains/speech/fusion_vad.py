# SPDX-License-Identifier: Apache-2.0
r"""Voice activity from MFCC and a pretrained encoder together: addition, concatenation or cross-attention.

"Attention Is Not Always the Answer: Optimizing Voice Activity Detection with Simple Feature Fusion" (FusionVAD), arXiv
2506.01365. MFCC miss less speech and raise more false alarms than most pretrained features, so both together may do
better than either; the paper finds that addition does it as well as attention, and cheaper:

    m = W_m mfcc + b_m,  p = W_p states + b_p                  each [B, T, D], frames of 20 ms
    addition       z = m + p                                    [B, T, D]
    concat         z = [m; p]                                   [B, T, 2 D]
    cross          z = MHA(queries p, keys and values m)        [B, T, D]; over all frames of the recording
    speech         sigmoid(w FC2(BiLSTM2(FC2(z))))              FC2: two layers of D with GELU

The pretrained encoder is frozen. D is the task's ``dim`` (128 in the paper), ``width`` is the LSTM's, so that all have
one number of parameters. Not known of the paper, and chosen here: which stream asks (``query``, Whisper's), its heads
(the task's), no residual around attention, sinusoidal positions added before it (``positions``), since without them
attention does not know where a frame lies. Left out: encoders other than Whisper's, smoothing of what is said.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...attention.positions import interleaved_sinusoids
from ...recipe import Batch, FieldTask, Picture, Recipe

__all__ = ["Addition", "Concatenation", "CrossAttention", "FusionVad"]


class Addition(nn.Module):
    """Sum of both streams."""

    def forward(self, mfcc: Tensor, whisper: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, D]``."""
        return mfcc + whisper


class Concatenation(nn.Module):
    """Both streams side by side."""

    def forward(self, mfcc: Tensor, whisper: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, 2 D]``."""
        return torch.cat((mfcc, whisper), -1)


class CrossAttention(nn.Module):
    """One stream asks, the other answers.

    Attributes:
        shown: weights ``[B, H, T, T]`` of the last forward outside training.
    """

    def __init__(self, dim: int, heads: int, query: str, positions: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.query, self.positions = query, positions
        self.shown: Tensor | None = None

    def forward(self, mfcc: Tensor, whisper: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, D]``."""
        if self.positions:
            places = interleaved_sinusoids(torch.arange(mfcc.shape[1]), mfcc.shape[2]).to(mfcc)
            mfcc, whisper = mfcc + places, whisper + places
        asks, answers = (whisper, mfcc) if self.query == "whisper" else (mfcc, whisper)
        out, shown = self.attention(
            asks, answers, answers, key_padding_mask=~mask, need_weights=not self.training, average_attn_weights=False
        )
        self.shown = None if shown is None else shown.detach()
        return out  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class FusionVad(Recipe):
    """Finds speech by two kinds of features, fused.

    Attributes:
        fusion: how.
        query: the stream that asks in cross-attention.
        positions: of frames, in cross-attention.
    """

    task: ClassVar[str] = "voice_activity"

    fusion: Literal["addition", "concat", "cross"] = field(
        default="addition", metadata={"help": "addition, concat, or cross-attention"}
    )
    query: Literal["whisper", "mfcc"] = field(default="whisper", metadata={"help": "the stream that asks"})
    positions: bool = field(default=True, metadata={"help": "positions of frames in cross-attention"})

    def build(self, task: FieldTask, width: int) -> nn.Module:
        vad: Any = task
        made: dict[str, nn.Module] = {"addition": Addition(), "concat": Concatenation()}
        if self.fusion == "cross":
            made["cross"] = CrossAttention(task.dim, task.heads, self.query, self.positions)
        size = 2 * task.dim if self.fusion == "concat" else task.dim
        return vad.around([made[self.fusion]], size, width)  # type: ignore[no-any-return]

    def pictures(self, model: nn.Module, batch: Batch) -> Sequence[Picture]:
        """Where frames of the first recording look, every fourth of them, mean over heads."""
        fusion: Any = model.fusion
        if not isinstance(fusion, CrossAttention):
            return ()
        model(batch["inputs"], batch["states"], batch["mask"])
        count = int(batch["mask"][0].sum())
        shown: Any = fusion.shown
        values = shown[0].float().mean(0)[:count:4, :count].unfold(1, 4, 4).sum(-1).cpu().tolist()
        times = [f"{0.02 * i:.2f}" for i in range(0, count, 4)]
        columns = times[: len(values[0])]
        return (Picture("cross-attention", times, columns, values, ("asking, s", "asked, s")),)
