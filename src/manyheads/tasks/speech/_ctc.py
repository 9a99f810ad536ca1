# SPDX-License-Identifier: Apache-2.0
"""Base of tasks that recognise words by CTC: reference models, the loss, and the best path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import ctc_loss

from ...errors import UserError
from ...recipe import Batch
from .._blocks import Transformer
from .._field import FieldTask
from ._encoder import Conformer, SpeechEncoder

__all__ = ["CTCTask", "Transcript", "ctc_losses"]


@dataclass(frozen=True, eq=False)
class Transcript:
    """What is recognised.

    Attributes:
        text: words with a space between.
        log_probs: ``[T, classes]`` of the blank and each word by frame of 40 ms.
    """

    text: str
    log_probs: Tensor

    def __str__(self) -> str:
        return self.text


def ctc_losses(logits: Tensor, mask: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """CTC loss of each sample, nats, float32 ``[B]``; 0 where it is too short for its words.

    Args:
        logits: ``[B, T, classes]``, the blank first.
        mask: ``[B, T]``, True where speech is.
        targets, counts: classes ``[B, S]``, and how many of them count ``[B]``.
    """
    log_probs = logits.float().log_softmax(-1).transpose(0, 1)
    losses: Tensor = ctc_loss(log_probs, targets, mask.sum(1), counts, reduction="none", zero_infinity=True)
    return losses


@dataclass(frozen=True, kw_only=True)
class CTCTask(FieldTask):
    """Words are numbered from 1; 0 is the blank.

    Attributes:
        kernel: frames of the Conformer's convolution.
    """

    references: ClassVar[tuple[str, ...]] = ("conformer", "transformer")
    classes: ClassVar[int]  # the blank and all words

    kernel: int = 31

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError("a kernel is a window around a frame: give an odd number of frames")

    def around(self, blocks: Sequence[nn.Module], positions: bool = False) -> SpeechEncoder:
        return SpeechEncoder(blocks, self.dim, self.classes, self.dropout, positions)

    def reference(self, width: int, kind: str = "") -> nn.Module:
        if (kind or self.references[0]) == "transformer":
            blocks: list[nn.Module] = [
                Transformer(self.dim, self.heads, width, self.dropout) for _ in range(self.layers)
            ]
            return self.around(blocks, positions=True)
        return self.around(
            [Conformer(self.dim, self.heads, width, self.dropout, self.kernel) for _ in range(self.layers)]
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits, mask = model(batch["inputs"], batch["mask"])
        losses = ctc_losses(logits, mask, batch["targets"], batch["counts"])
        mean: Tensor = losses.sum() / batch["counts"].sum()
        return mean

    def predict(self, model: nn.Module, batch: Batch) -> list[Transcript]:
        logits, mask = model(batch["inputs"], batch["mask"])
        found = []
        for row, length in zip(logits.float().log_softmax(-1).cpu(), mask.sum(1).tolist(), strict=True):
            best = row[:length].argmax(1).unique_consecutive().tolist()
            found.append(Transcript(" ".join(str(k - 1) for k in best if k), row[:length]))
        return found
