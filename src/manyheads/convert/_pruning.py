# SPDX-License-Identifier: Apache-2.0
"""Structured pruning: how much of what goes, and the plan once every head, neuron, channel and layer has a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, lcm

from torch import Tensor

from ..conversion import Anatomy, Conversion, Drop, Prune, Step, SurgeryPlan, choose_heads, largest
from ..errors import UserError

_Fits = Callable[..., bool]
__all__ = ["Pruning", "Scores", "least", "top"]

_MULTIPLE = 8  # neurons and channels come in eights


@dataclass(frozen=True)
class Scores:
    """What is worth keeping, the higher the sooner.

    Attributes:
        neurons: ``[I]`` of each layer.
        heads: ``[L, H]``.
        width: ``[D]``.
        layers: ``L`` numbers; of layers that are dropped the sum is lowest.
    """

    neurons: Sequence[Tensor]
    heads: Tensor
    width: Tensor
    layers: Sequence[float]


def top(scores: Tensor, keep: int) -> tuple[int, ...]:
    """Places of the highest ``keep`` scores ``[n]``, ascending."""
    return tuple(sorted(scores.topk(keep).indices.tolist()))


def least(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The ``count`` layers in a row whose sum of scores is lowest; never the first or the last.

    Raises:
        UserError: so many cannot be dropped.
    """
    if count > len(scores) - 2:
        raise UserError(f"the first and the last of {len(scores)} layers stay: drop {len(scores) - 2} at most")
    start = min(range(1, len(scores) - count), key=lambda i: sum(scores[i : i + count]))
    return tuple(range(start, start + count))


@dataclass(frozen=True, kw_only=True)
class Pruning(Conversion):
    """Base: fields that say how much stays, and the plan of what the subclass scores highest.

    The sizes follow from the fields and the model's shapes alone: two ways to score leave the same number of
    parameters.
    """

    keep: float = field(default=0.8, metadata={"help": "share of the model's parameters that stays"})
    axis: str = field(
        default="both", metadata={"help": "what is cut for it: neurons, width, both in one ratio, or layers in a row"}
    )
    heads: float = field(default=1.0, metadata={"help": "share of the query heads that stays, beside that"})

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or not 0 < self.heads <= 1:
            raise UserError("keep and heads are shares, above 0 and at most 1")
        if self.axis not in ("neurons", "width", "both", "layers"):
            raise UserError(f"axis is neurons, width, both or layers, not {self.axis!r}")

    def pruned(self, model: Anatomy, scores: Scores) -> SurgeryPlan:
        """Drop the lowest scores.

        Raises:
            UserError: so few parameters, or so many heads, cannot be had; the message has the nearest.
        """
        first: tuple[Step, ...] = ()
        if self.heads < 1:
            shape = model.layers[0]
            kept = choose_heads(scores.heads, shape.kv_heads, max(1, round(self.heads * shape.heads)))
            first = tuple(Prune(axis="heads", keep=keep, layer=i) for i, keep in enumerate(kept))
        if self.keep == 1:
            return SurgeryPlan(first)
        target = self.keep * model.parameters()

        def fits(*steps: Step) -> bool:
            return model.parameters(SurgeryPlan((*first, *steps))) <= target

        return SurgeryPlan((*first, *self._cut(model, scores, fits)))

    def _cut(self, model: Anatomy, scores: Scores, fits: _Fits) -> tuple[Step, ...]:
        shape, count = model.layers[0], len(model.layers)

        def narrow(channels: int, neurons: int) -> tuple[Step, ...]:
            wide = () if channels == model.width else (Prune(axis="width", keep=top(scores.width, channels)),)
            if neurons >= shape.neurons:
                return wide
            return (
                *wide,
                *(Prune(axis="neurons", keep=top(s, neurons), layer=i) for i, s in enumerate(scores.neurons)),
            )

        def shallow(layers: int) -> tuple[Step, ...]:
            return (Drop(part="block", layers=least(scores.layers, count - layers)),) if layers < count else ()

        unit = _unit(model)
        fewest = {"width": unit, "both": max(unit, unit * ceil(0.5 * self.keep * model.width / unit))}
        smallest = (
            shallow(2)
            if self.axis == "layers"
            else narrow(fewest.get(self.axis, model.width), shape.neurons if self.axis == "width" else _MULTIPLE)
        )
        if not fits(*smallest):
            share = ceil(100 * model.parameters(SurgeryPlan(smallest)) / model.parameters()) / 100
            raise UserError(f"{self.axis} alone cannot reach {self.spec}: keep={share:.2f} can be had, or another axis")
        if self.axis == "layers":
            return shallow(largest(2, count, lambda n: fits(*shallow(n))))
        if self.axis == "width":
            most = largest(1, model.width // unit, lambda n: fits(*narrow(n * unit, shape.neurons)))
            return narrow(most * unit, shape.neurons)

        def wide(channels: int) -> int:
            """The most neurons at a width."""
            most = largest(1, -(-shape.neurons // _MULTIPLE), lambda n: fits(*narrow(channels, n * _MULTIPLE)))
            return min(most * _MULTIPLE, shape.neurons)

        found = []
        for channels in range(unit, model.width + 1, unit) if self.axis == "both" else (model.width,):
            if channels < 0.5 * self.keep * model.width or not fits(*narrow(channels, _MULTIPLE)):
                continue
            neurons = wide(channels)
            found.append((abs(neurons / shape.neurons - channels / model.width), channels, neurons))
        return narrow(*min(found)[1:])


def _unit(model: Anatomy) -> int:
    """What widths are multiples of: eight, and the number of heads, which configs ask for."""
    heads = model.layers[0].heads
    unit = lcm(_MULTIPLE, heads)
    return unit if model.width % unit == 0 else heads if model.width % heads == 0 else 1
