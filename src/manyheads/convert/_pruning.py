# SPDX-License-Identifier: Apache-2.0
"""Structured pruning: how much of what goes, and the plan once every head, neuron, channel and layer has a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import ceil, lcm
from typing import Literal

import torch
from torch import Tensor

from ..calls.calibration import Statistic, Statistics, gram
from ..conversion import (
    Anatomy,
    Assign,
    Conversion,
    Drop,
    Prune,
    Recovery,
    Step,
    SurgeryPlan,
    choose_heads,
    largest,
    nearest_heads,
)
from ..errors import UserError

_Fits = Callable[..., bool]
__all__ = ["Pruning", "Scores", "least", "top"]

_MULTIPLE = 8  # neurons and channels come in eights
_AXES = ("neurons", "width", "both", "heads_neurons", "layers")
_READ = {"heads": ("o", gram("heads")), "neurons": ("down", gram("neurons"))}  # what reads an axis
_RIDGE = 0.01  # of the refit, in parts of the mean of the Gram matrix's diagonal


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
    parameters, but for less than eight neurons a layer where groups of heads can be kept in several ways.
    """

    keep: float = field(default=0.8, metadata={"help": "share of the model's parameters that stays"})
    axis: str = field(
        default="both",
        metadata={
            "help": "what is cut for it: neurons, width, both in one ratio, heads_neurons in one ratio, or layers in a "
            "row"
        },
    )
    heads: float = field(default=1.0, metadata={"help": "share of the query heads that stays, beside that"})
    refit: bool = field(
        default=False,
        metadata={"help": "give what stays of heads and neurons output weights that make up for what went"},
    )
    loss: str = field(default="kl", metadata={"help": "of the recovery: kl (to the model before) or nll (of the text)"})
    lr: float = field(default=3e-4, metadata={"help": "highest learning rate of the recovery"})
    rank: int = field(default=0, metadata={"help": "of adapters that the recovery trains; 0 for all weights"})

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or not 0 < self.heads <= 1:
            raise UserError("keep and heads are shares, above 0 and at most 1")
        if self.axis not in _AXES:
            raise UserError(f"axis is {', '.join(_AXES[:-1])} or {_AXES[-1]}, not {self.axis!r}")
        if self.axis == "heads_neurons" and self.heads < 1:
            raise UserError("axis=heads_neurons says how many heads stay: leave heads at 1, or take axis=neurons")
        if self.refit and self.axis not in ("neurons", "heads_neurons"):
            raise UserError("what reads heads and neurons is refitted: take axis=neurons or heads_neurons")
        if self.loss not in ("kl", "nll") or self.lr <= 0 or self.rank < 0:
            raise UserError("the recovery's loss is kl or nll, its lr above 0 and its rank 0 or more")

    def wants(self, model: Anatomy) -> Sequence[Statistic]:
        return [statistic for _, statistic in _READ.values()] if self.refit else []

    def recovery(self, model: Anatomy) -> Recovery:
        """Encoders learn the hidden states of the model before."""
        loss: Literal["kl", "nll"] = "nll" if self.loss == "nll" else "kl"
        return Recovery(loss=loss if model.causal else "hidden", lr=self.lr, lora=self.rank)

    def pruned(self, model: Anatomy, scores: Scores, stats: Statistics) -> SurgeryPlan:
        """Drop the lowest scores.

        Raises:
            UserError: so few parameters, or so many heads, cannot be had; the message has the nearest.
        """
        first: tuple[Step, ...] = ()
        count = self._head_count(model)
        if count < model.layers[0].heads:
            kept = choose_heads(scores.heads, model.layers[0].kv_heads, count)
            first = tuple(Prune(axis="heads", keep=keep, layer=i) for i, keep in enumerate(kept))
        target = self.keep * model.parameters()

        def fits(*steps: Step) -> bool:
            return model.parameters(SurgeryPlan((*first, *steps))) <= target

        steps = first if self.keep == 1 else (*first, *self._cut(model, scores, fits))
        return SurgeryPlan((*steps, *(_refitted(model, step, stats) for step in steps if self.refit)))

    def _head_count(self, model: Anatomy) -> int:
        """Query heads of a layer that stay."""
        heads = model.layers[0].heads
        if self.axis != "heads_neurons":
            return max(1, round(self.heads * heads))
        parts = [part for part in ("q", "k", "v", "o", "gate", "up", "down") if model.has(part)]
        inside = sum(model.weight(part, i).numel() for part in parts for i in range(len(model.layers)))
        share = 1 - (1 - self.keep) * model.parameters() / inside  # of the blocks' own weights
        return nearest_heads(heads, model.layers[0].kv_heads, share * heads)

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
            raise UserError(
                f"axis={self.axis} cannot reach keep={self.keep:g}: keep={share:.2f} can be had, or another axis"
            )
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


def _refitted(model: Anatomy, step: Step, stats: Statistics) -> Assign:
    """Output weights of what stays, nearest in the least squares of calibration to what all of it gave.

    ``W_K + W_R G_RK (G_KK + c I)^-1``, K what stays, R what goes and G the Gram matrix of both; the more c, the nearer
    to the weights as they were.
    """
    assert isinstance(step, Prune) and step.layer is not None
    part, statistic = _READ[step.axis]
    whole, keep = model.weight(part, step.layer).double(), torch.tensor(step.keep)
    if step.axis == "heads":
        dim = model.layers[step.layer].head_dim
        keep = (keep[:, None] * dim + torch.arange(dim)).flatten()
    stays = torch.zeros(whole.shape[1], dtype=torch.bool, device=whole.device)
    stays[keep] = True
    found = stats[statistic][step.layer].to(whole)
    inner, across = found[stays][:, stays], found[stays][:, ~stays]
    inner.diagonal().add_(_RIDGE * inner.diagonal().mean())
    weight = whole[:, stays] + whole[:, ~stays] @ torch.linalg.solve(inner, across).mT
    return Assign(part=part, layer=step.layer, tensors={"weight": weight})
