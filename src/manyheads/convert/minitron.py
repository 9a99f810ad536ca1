# SPDX-License-Identifier: Apache-2.0
"""Minitron: prune width or depth of a language model by activations, then distil from the corrected teacher.

Most of a trained model's channels, neurons and layers move its output little on a small calibration text. What moves it
least is cut out in one shot, and the smaller model learns the larger one's predictions again from few tokens. The
larger one is trained on that text first, because the text that it was trained on is not at hand ("teacher correction").

LLM Pruning and Distillation in Practice: The Minitron Approach (arXiv 2408.11796), importance as in Compact Language
Models via Pruning and Knowledge Distillation (arXiv 2407.14679).

    head j       |attention output of head j|           [H] a layer, of ``[B, T, H, d]``
    neuron i     |input of the last feed-forward layer|  [I] a layer, of ``[B, T, I]``
    channel c    |output of a norm|, summed over norms   [D], of ``[B, T, D]``
    layer l      1 - cos(x_in, x_out) (Block Importance), or the loss when it is left out
    student      KL(teacher | student) on the logits, temperature 1, no other loss

Each is the mean over the tokens of a sequence and the L2 norm over sequences. Depth is cut in a row of layers, of which
the first and the last stay.

Open in the paper's text and chosen here: width and neurons are cut in one ratio (the paper searches a few sizes by
hand); a group of heads keeps as many as every other; channels come in multiples of eight and of the number of heads,
as stock configs ask for. A norm over fewer channels divides by their root mean square alone. Where many layers go, the
earlier paper adds losses of hidden states; they are left out, as here where depth is cut little.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..calls.calibration import Statistic, Statistics, cosine, sequence_norm
from ..conversion import Anatomy, Drop, Recovery, SurgeryPlan
from ..errors import UserError
from ._pruning import Pruning, Scores

__all__ = ["Minitron"]

_NEURONS, _HEADS, _NORMS, _COSINE = sequence_norm("neurons"), sequence_norm("heads"), sequence_norm("norms"), cosine()


@dataclass(frozen=True, kw_only=True)
class Minitron(Pruning):
    """See the head of this file; the other fields are those of the base."""

    depth: str = field(
        default="cosine", metadata={"help": "layers are scored by cosine (of input and output) or loss (without each)"}
    )
    correct: float = field(
        default=0.2, metadata={"help": "share of the recovery in which the teacher is trained on the text"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth not in ("cosine", "loss"):
            raise UserError("depth is cosine or loss")
        if not 0 <= self.correct < 1:
            raise UserError("correct is a share of the recovery below 1")

    def wants(self, model: Anatomy) -> Sequence[Statistic]:
        return (*super().wants(model), _NEURONS, _HEADS, _NORMS, _COSINE)

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        layers = [float(x) for x in stats[_COSINE]]
        if self.depth == "loss" and self.axis == "layers":
            layers = [stats.loss(SurgeryPlan((Drop(part="block", layers=(i,)),))) for i in range(len(model.layers))]
        scores = Scores(
            stats[_NEURONS], torch.stack(list(stats[_HEADS])), torch.stack(list(stats[_NORMS])).sum(0), layers
        )
        return self.pruned(model, scores, stats)

    def recovery(self, model: Anatomy) -> Recovery:
        return replace(super().recovery(model), correct=self.correct if model.causal else 0.0)
