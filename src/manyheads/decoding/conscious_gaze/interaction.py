# SPDX-License-Identifier: Apache-2.0
"""Interaction of image and text as players of a game, over candidate tokens (Harsanyi, 1963)."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sensed", "dividends", "sensed"]


@dataclass(frozen=True, slots=True)
class Sensed:
    """Of a step.

    Attributes:
        variance: of the dividend of image and text over the candidates, nats squared.
        size: mean of its magnitude, nats.
    """

    variance: float
    size: float


def dividends(values: Tensor) -> Tensor:
    """Dividends ``[4, K]`` of image and text together, of the image, of the text, and of neither.

    They sum to the value of both: ``v(VX) = I_VX + I_V + I_X + v(0)``.

    Args:
        values: ``[4, K]`` of image and text, image alone, text alone, neither.
    """
    both, image, text, none = values
    return torch.stack([both - image - text + none, image - none, text - none, none])


def sensed(logits: Tensor, candidates: int) -> Sensed:
    """Interaction over the likeliest of the first stream, by logits ``[4, V]`` of the streams in that order."""
    likeliest = logits[0].topk(min(candidates, logits.shape[1])).indices
    together = dividends(logits.log_softmax(-1)[:, likeliest])[0]
    return Sensed(float(together.var(correction=0)), float(together.abs().mean()))
