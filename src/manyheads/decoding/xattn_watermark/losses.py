# SPDX-License-Identifier: Apache-2.0
"""What layers and extractor are trained on: the bits read from a drawn text, and how far the model was moved.

At each place of a text a token is drawn from the watermarked model that has read the text up to there, by the Gumbel
trick with straight-through gradients: what the extractor reads are whole tokens, and what flows back is the gradient of
their relaxation. Tokens drawn do not go on into what is read next: one forward trains all places, and what the model
writes by itself is learnt by the extractor afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, gumbel_softmax

from .extractor import Extractor

__all__ = ["Lesson", "distortion", "drawn", "edited_vectors", "message_loss"]


class Lesson(NamedTuple):
    """A batch.

    Attributes:
        ids: ``[B, T]`` that the model reads.
        messages: ``[B, b]`` of 0 and 1.
        source: ``[N B, T]`` where each token of the edited texts comes from, of N draws; below 0 for a foreign one.
        foreign: ``[N B, T]`` these tokens.
        real: ``[N B, T]`` which places of the edited texts there are.
        allowed: a scalar, nats per token of divergence that cost nothing at this step.
    """

    ids: Tensor
    messages: Tensor
    source: Tensor
    foreign: Tensor
    real: Tensor
    allowed: Tensor


def drawn(logits: Tensor, temperature: float = 1.0, times: int = 1) -> Tensor:
    """Tokens at each place, ``times`` over, one-hot ``[N B, T, V]`` of logits ``[B, T, V]``, with a relaxed gradient.

    The argmax of logits and Gumbel noise is a draw from their softmax, whatever ``temperature``, which smooths the
    gradient alone.
    """
    return gumbel_softmax(logits.float().repeat(times, 1, 1), tau=temperature, hard=True)


def distortion(logits: Tensor, plain: Tensor) -> Tensor:
    """KL divergence of the watermarked next token from the plain one, nats, ``[B, T]`` of logits ``[B, T, V]``."""
    q, p = logits.float().log_softmax(-1), plain.float().log_softmax(-1)
    return (q.exp() * (q - p)).sum(-1)


def edited_vectors(extractor: Extractor, text: Tensor, lesson: Lesson) -> Tensor:
    """What is known of the edited texts' tokens ``[N B, T, R]``; ``text`` as in :meth:`Extractor.embedded`."""
    x = extractor.embedded(text)
    moved = x.gather(1, lesson.source.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
    return torch.where(lesson.source[..., None] < 0, extractor.embedded(lesson.foreign), moved)


def message_loss(extractor: Extractor, text: Tensor, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the bits read from the edited text, nats per bit; and the share of them that are right."""
    found = extractor(edited_vectors(extractor, text, lesson), lesson.real).float()
    wanted = lesson.messages.repeat(len(found) // len(lesson.messages), 1)
    right = ((found > 0) == (wanted > 0.5)).float().mean()
    return binary_cross_entropy_with_logits(found, wanted), right.detach()
