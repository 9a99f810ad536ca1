# SPDX-License-Identifier: Apache-2.0
"""Recognition of words by CTC: its loss, and the best path."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import ctc_loss

__all__ = ["best_paths", "ctc_losses", "ctc_mean"]


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


def ctc_mean(logits: Tensor, mask: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """The mean of :func:`ctc_losses` over words."""
    mean: Tensor = ctc_losses(logits, mask, targets, counts).sum() / counts.sum()
    return mean


def best_paths(logits: Tensor, mask: Tensor) -> list[str]:
    """Words of the likeliest class of each frame, those after each other once; class k is the digit k - 1."""
    rows = zip(logits.argmax(-1).cpu(), mask.sum(1).tolist(), strict=True)
    return [" ".join(str(k - 1) for k in row[:length].unique_consecutive().tolist() if k) for row, length in rows]
