# SPDX-License-Identifier: Apache-2.0
"""What tasks of language understanding share: encoders of a published shape, which may stand still, and confusions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import UserError, refusal
from ...experiment import RunContext
from ...recipe import Picture
from .._field import FieldTask

__all__ = ["StandingEncoder", "UnderstandingTask", "confusion", "take"]


class StandingEncoder(nn.Module):
    """An encoder that learns, or stands still while ``still`` is set: nothing is carried back through it then."""

    def __init__(self) -> None:
        super().__init__()
        self.still: Tensor
        self.register_buffer("still", torch.tensor(False))

    @abstractmethod
    def states(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """States ``[B, T, dim]`` and their mask."""

    def forward(self, inputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`states`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not bool(self.still)):
            return self.states(inputs, mask)


def take(own: nn.Module, published: nn.Module, name: str, wanted: Mapping[str, int], has: Mapping[str, int]) -> None:
    """Put the weights of a published module into one of its shape that may have fewer of its layers.

    Raises:
        UserError: shapes differ; the message says which fields to give.
    """
    fields = ",".join(f"{key}={value}" for key, value in has.items())
    if wanted["dim"] != has["dim"] or wanted["heads"] != has["heads"] or wanted["layers"] > has["layers"]:
        raise UserError(f"{name} has another shape than this task's encoder: give the task {fields}, or fewer layers")
    theirs = published.state_dict()
    own.load_state_dict({key: theirs[key] for key in own.state_dict()})


@dataclass(frozen=True, kw_only=True)
class UnderstandingTask(FieldTask):
    """Base of tasks of language understanding, whose model has an ``encoder`` of the shape of a published one.

    The reference is that model from scratch. ``width`` is of what reads the encoder, so that the encoder is the same.

    Attributes:
        label: what it is called where an experiment has it several times.
    """

    encoder: ClassVar[str]  # the encoder's name in models/published.toml

    label: str = ""

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        """Refused: a published encoder has its own blocks.

        Raises:
            UserError: always.
        """
        raise UserError(f"{self.name} has the encoder of {self.encoder}: no other blocks go into it")

    def unsupported_reason(self, run: RunContext) -> str | None:
        from ...models import tokenizer

        missing = refusal(lambda: [tokenizer(name) for name in self.published])
        return missing or super().unsupported_reason(run)

    @abstractmethod
    def load_published(self, model: Any) -> None:
        """Put the published encoder's weights into a model of :meth:`reference`.

        Raises:
            UserError: it cannot be had, or has another shape than this task's fields say.
        """

    def shape(self) -> dict[str, int]:
        """Of the encoder."""
        return {"dim": self.dim, "layers": self.layers, "heads": self.heads}


def confusion(title: str, names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> Picture:
    """Shares of what was said, by what was right."""
    counts = np.zeros((len(names), len(names)))
    for right, said in pairs:
        counts[right, said] += 1
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    return Picture(title, list(names), list(names), shares.tolist(), ("meant", "understood"))
