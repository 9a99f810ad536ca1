# SPDX-License-Identifier: Apache-2.0
"""The kind of strategies that make a trained model forget, and what they read of it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from .calls.head_names import Heads
from .strategy import Strategy

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

__all__ = ["Answers", "Readings", "Unlearning"]


@dataclass(frozen=True)
class Answers:
    """What a model says of a batch of questions.

    Attributes:
        logits: where the tokens of the answers are predicted, ``[N, Q, V]``.
        tokens: of the answers, int64 ``[N, Q]``; -100 where there is none.
    """

    logits: "Tensor"
    tokens: "Tensor"


class Readings(Protocol):
    """The batches of a step, read by a model when they are asked for.

    Attributes:
        concepts: what is to be forgotten, each a batch of its own: ``person``, ``event``.
    """

    @property
    def concepts(self) -> "Sequence[str]": ...

    def forget(self, concept: str) -> Answers:
        """The facts to be forgotten of a concept, with gradients."""

    def refused(self, concept: str) -> Answers:
        """The same questions with a refusal for an answer, with gradients."""

    def retain(self) -> Answers:
        """Facts to be kept, with gradients."""

    def before(self, concept: str) -> Answers:
        """As :meth:`forget`, or for ``retain`` as :meth:`retain`, of the model before, without gradients."""


@dataclass(frozen=True, kw_only=True)
class Unlearning(Strategy, ABC):
    """Makes a trained model forget: says what is made small in a step, and what becomes of the gradients.

    ``layers`` are those of the decoder that are trained; all that is trained of the model when not given.

    Attributes:
        heads: the only ones that are trained, as ``layer.head`` joined by ``+``; nothing else changes by a bit.
        refers: reads the model before unlearning too.
        apart: the gradients of the terms are given to :meth:`combined` one by one.
        parts: of each of ``heads`` that are trained.
    """

    refers: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    parts: ClassVar[str] = "qkvo"

    heads: Heads = field(default=(), metadata={"help": "train these heads alone, as 3.1+4.2; all that is trained else"})

    @abstractmethod
    def terms(self, read: Readings) -> "Iterator[Tensor]":
        """The terms of the loss of a step, scalars; each is carried backward before the next is asked for."""

    def combined(self, gradients: "Sequence[Sequence[Tensor]]") -> "list[Tensor]":
        """One gradient of each parameter, given those of each term; only where they are kept ``apart``."""
        return [sum(each[1:], each[0]) for each in zip(*gradients, strict=True)]

    def merged(self, before: "Tensor", after: "Tensor", share: float = 1.0) -> "Tensor":
        """A parameter of the model that has unlearned, given what it was and what training made of it.

        Args:
            before, after: of any shape, the same.
            share: of the way that is gone; less than 1 where all of it costs too much of what is kept.
        """
        return before + share * (after - before)
