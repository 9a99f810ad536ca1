# SPDX-License-Identifier: Apache-2.0
"""What is gathered of a model's activations in one pass over a text, and what a conversion reads of it.

A statistic names a place, says what a batch adds to a sum, and what the sum means at the end. All that several
strategies want is gathered in the same pass; sums are of float64.

Places, of each layer:

    block      its input and its output, ``[B, T, D]`` both
    stream     its input, what is between its attention and its feed-forward part, and its output, ``[B, T, D]`` each;
               of families whose layers normalise what a part reads, not what it writes
    attention  what is read by q, k and v, ``[B, T, D]``
    heads      what the output projection reads, ``[B, T, H, d]``
    mlp        what the feed-forward part reads, ``[B, T, D]``
    neurons    what its last layer reads, ``[B, T, I]``
    norms      the output of each norm that reads the residual stream, in their order, ``[B, T, D]``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ..errors import UserError

if TYPE_CHECKING:
    from ..conversion import SurgeryPlan

__all__ = ["Place", "Statistic", "Statistics", "absolute", "cosine", "gram", "mean", "rms", "sequence_norm"]

Place = Literal["block", "stream", "attention", "heads", "mlp", "neurons", "norms"]


@dataclass(frozen=True)
class Statistic:
    """One thing to know of activations.

    Attributes:
        name: by which it is found; two of one name are the same.
        place: see the head of this file.
        add: given the tensors of the place in float32, and those of ``parts`` behind them, what is added to the sum.
        finish: given the sum, the number of sequences and of tokens, the value.
        parts: linear layers of the layer whose weights ``[out, in]`` are given too, as ``o``; biases as ``o.bias``.
    """

    name: str
    place: Place
    add: Callable[..., Tensor] = field(compare=False)
    finish: Callable[[Tensor, int, int], Tensor] = field(compare=False)
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Statistics:
    """What calibration found.

    Attributes:
        values: by name, a float64 tensor for each layer; for ``norms``, for each of them.
        tokens: that were read.
        trial: loss of the model on the same text after a plan, nats/token; None where the model predicts no text.
        slope: gradient of that loss by a weight; None there too.
    """

    values: Mapping[str, Sequence[Tensor]]
    tokens: int = 0
    trial: Callable[[SurgeryPlan], float] | None = field(default=None, compare=False)
    slope: Callable[[str, int], Tensor] | None = field(default=None, compare=False)

    def __getitem__(self, statistic: Statistic) -> Sequence[Tensor]:
        return self.values[statistic.name]

    def loss(self, plan: SurgeryPlan) -> float:
        """Nats per token of the calibration text after ``plan``; takes a forward over it.

        Raises:
            UserError: the model predicts no text.
        """
        if self.trial is None:
            raise UserError("this chooses by the loss of text, which the model does not predict: choose otherwise")
        return self.trial(plan)

    def gradient(self, part: str, layer: int) -> Tensor:
        """Gradient of the loss of the calibration text by the weight ``[out, in]`` of a part of a layer.

        All gradients come of one forward and backward over the text, when the first is asked for.

        Raises:
            UserError: the model predicts no text.
        """
        if self.slope is None:
            raise UserError("this scores by the loss of text, which the model does not predict: choose another score")
        return self.slope(part, layer)


def _flat(x: Tensor) -> Tensor:
    """Tokens and channels ``[N, C]``."""
    return x.flatten(2).flatten(0, 1)


def _per_token(total: Tensor, sequences: int, tokens: int) -> Tensor:
    return total / tokens


def mean(place: Place) -> Statistic:
    """Mean of each channel, ``[C]``; heads are ``[H * d]``."""
    return Statistic(f"{place}.mean", place, lambda x: _flat(x).sum(0, dtype=torch.float64), _per_token)


def absolute(place: Place) -> Statistic:
    """Mean absolute value of each channel, ``[C]``."""
    return Statistic(f"{place}.absolute", place, lambda x: _flat(x).abs().sum(0, dtype=torch.float64), _per_token)


def rms(place: Place) -> Statistic:
    """Root of the mean square of each channel, ``[C]``."""
    return Statistic(
        f"{place}.rms", place, lambda x: _flat(x).square().sum(0, dtype=torch.float64),
        lambda total, _, tokens: (total / tokens).sqrt(),
    )  # fmt: skip


def gram(place: Place) -> Statistic:
    """Mean of ``x x^T``, ``[C, C]``; the products of a batch are float32."""
    return Statistic(f"{place}.gram", place, lambda x: (_flat(x).mT @ _flat(x)).double(), _per_token)


def sequence_norm(place: Place) -> Statistic:
    """Mean over the tokens of a sequence, then the L2 norm over sequences: of ``|x|``, or for heads of their norms.

    ``[C]``, for heads ``[H]``; the aggregation of Minitron (arXiv 2407.14679, batch L2 and sequence mean).
    """

    def add(x: Tensor) -> Tensor:
        size = x.norm(dim=-1) if place == "heads" else x.abs()
        return size.mean(1, dtype=torch.float64).square().sum(0)

    return Statistic(f"{place}.sequence_norm", place, add, lambda total, *_: total.sqrt())


def cosine(part: Literal["block", "attention", "mlp"] = "block") -> Statistic:
    """Mean of ``1 - cos`` of the stream before and after a block (Block Influence) or a part of it, a scalar."""
    first, last = {"block": (0, -1), "attention": (0, 1), "mlp": (1, 2)}[part]

    def add(*stream: Tensor) -> Tensor:
        return (1 - torch.cosine_similarity(stream[first], stream[last], dim=-1)).sum(dtype=torch.float64)

    return Statistic(f"{part}.cosine", "block" if part == "block" else "stream", add, _per_token)
