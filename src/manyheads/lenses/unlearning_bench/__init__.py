# SPDX-License-Identifier: Apache-2.0
"""Unlearning of fictitious people and events: objectives that make a vision-language model forget some, and no more.

Xu et al., "PEBench: A Fictitious Dataset to Benchmark Machine Unlearning for Multimodal Large Language Models" (arXiv
2503.12545). A model is trained on people and events of which it cannot have known anything
(:mod:`manyheads.data.fictitious`), then made to forget some of either. What is asked afterwards: is it forgotten
(efficacy), also in pictures and words that are new (generality), is the rest known (retain), is the event in a picture
known when its person was forgotten, and the other way round (scope), and is anything else lost (real).

Objectives are parts, L_f the loss of what is to be forgotten, L_r of what is kept, p_0 the model before:

    unlearning_bench.gradient_ascent         - L_f
    unlearning_bench.gradient_difference     - L_f + L_r
    unlearning_bench.kl_minimization         - L_f + KL(p_0 || p) on what is kept
    unlearning_bench.preference              L of a refusal in place of the answer, + L_r
    unlearning_bench.negative_preference     - 2/beta log sigmoid(- beta log p / p_0) on what is forgotten, + L_r
    unlearning_bench.task_vector             theta_0 - alpha (theta_f - theta_0), theta_f trained on what is forgotten
    unlearning_bench                         balanced gradient difference

The last is the paper's own for people and events at once, whose objectives are at odds. Its text was not at hand, so
that this is inferred: the gradients of - L_person, - L_event and L_r are scaled to one norm, the median, and where two
have a negative inner product the part of each along the other is taken out; then they are added.

All train what the model trains, or with ``heads`` the queries, keys, values and output of those heads alone
(:mod:`.attribution` finds heads that answers to be forgotten hang on more than others), ours and not the paper's:

    python -m manyheads.recipes.unlearning_bench --people 24 --events 12 --method unlearning_bench.gradient_difference

Shapes: logits ``[N, Q, V]`` of the Q tokens of N answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from ...unlearning import Readings, Unlearning
from .gradient_ascent import GradientAscent
from .gradient_difference import GradientDifference
from .kl_minimization import KLMinimization
from .losses import answer_nll, balanced
from .negative_preference import NegativePreference
from .preference import Preference
from .task_vector import TaskVector

__all__ = [
    "BalancedGradientDifference", "GradientAscent", "GradientDifference", "KLMinimization", "NegativePreference",
    "Preference", "TaskVector",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BalancedGradientDifference(Unlearning):
    """A gradient for each concept to be forgotten and one for what is kept, at one norm and none against another.

    Attributes:
        project: take out what of a gradient goes against another.
        norms: bring gradients to one norm first.
    """

    apart: ClassVar[bool] = True

    project: bool = field(default=True, metadata={"help": "take out what of a gradient goes against another"})
    norms: bool = field(default=True, metadata={"help": "bring gradients to one norm first"})

    def terms(self, read: Readings) -> Iterator[Tensor]:
        for concept in read.concepts:
            yield -answer_nll(read.forget(concept))
        yield answer_nll(read.retain())

    def combined(self, gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        return balanced(gradients, self.project, self.norms)
