# SPDX-License-Identifier: Apache-2.0
"""Structured pruning by scores that need no paper's care: the baselines that other conversions are measured against.

    random     numbers drawn with ``seed``
    magnitude  L2 norm of the weights that go with a head, neuron or channel
    taylor     |weight times the gradient of the calibration text's loss|, summed over those weights: the first-order
               element-wise score of LLM-Pruner (On the Structural Pruning of Large Language Models, arXiv 2305.11627),
               in all layers alike, where its authors spare the first and the last
    wanda      |W| times the root mean square of its input, summed over outputs: of the last layer of the feed-forward
               part for neurons, of the output projection for heads; channels by their norm's output times the weights
               that read them. After A Simple and Effective Pruning Approach for Large Language Models (arXiv
               2306.11695), whose single weights are added up here for what they belong to.

The weights of a key/value head count for each query head of its group in equal parts.

What is cut, and how many parameters stay, is as in every pruning of this package, so that arms are equal. Layers have
no such scores: ``magnitude`` and ``wanda`` take the mean norm of their weights, ``taylor`` the sum of theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calls.calibration import Statistic, Statistics, rms
from ..conversion import Anatomy, SurgeryPlan
from ..errors import UserError
from ._pruning import Pruning, Scores

__all__ = ["StructuredPruning"]

_NEURONS, _HEADS, _ATTENTION, _MLP = rms("neurons"), rms("heads"), rms("attention"), rms("mlp")


@dataclass(frozen=True, kw_only=True)
class StructuredPruning(Pruning):
    """See the head of this file; the other fields are those of the base."""

    score: str = field(default="wanda", metadata={"help": "random, magnitude, taylor or wanda"})
    seed: int = field(default=0, metadata={"help": "of random scores"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("random", "magnitude", "taylor", "wanda"):
            raise UserError(f"score is random, magnitude, taylor or wanda, not {self.score!r}")

    def wants(self, model: Anatomy) -> Sequence[Statistic]:
        own = (_NEURONS, _HEADS, _ATTENTION, _MLP) if self.score == "wanda" else ()
        return (*super().wants(model), *own)

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        found = {"random": self._random, "wanda": self._wanda}.get(self.score, self._of_weights)
        return self.pruned(model, found(model, stats), stats)

    def _random(self, model: Anatomy, stats: Statistics) -> Scores:
        source = torch.Generator().manual_seed(self.seed)
        shapes = model.layers

        def draw(*size: int) -> Tensor:
            return torch.rand(size, generator=source)

        neurons = [draw(shape.neurons) for shape in shapes]
        return Scores(neurons, draw(len(shapes), shapes[0].heads), draw(model.width), draw(len(shapes)).tolist())

    def _of_weights(self, model: Anatomy, stats: Statistics) -> Scores:
        """Sums of what each weight is worth, its square or its part in the loss."""

        def worth(part: str, layer: int) -> Tensor:
            weight = model.weight(part, layer).double().cpu()
            if self.score == "magnitude":
                return weight.square()
            return (weight * stats.gradient(part, layer).double().cpu()).abs()

        neurons, heads, width, layers = [], [], torch.zeros(model.width, dtype=torch.float64), []
        for i, shape in enumerate(model.layers):
            first = [worth(part, i) for part in ("gate", "up") if model.has(part)]
            q, k, v, o, down = (worth(part, i) for part in ("q", "k", "v", "o", "down"))
            neurons.append(down.sum(0) + sum(w.sum(1) for w in first))
            shared = (k.sum(1) + v.sum(1)).view(shape.kv_heads, -1).sum(1) * (shape.kv_heads / shape.heads)
            own = (q.sum(1) + o.sum(0)).view(shape.heads, -1).sum(1)
            heads.append(own + shared.repeat_interleave(shape.heads // shape.kv_heads))
            width += sum(w.sum(0) for w in (q, k, v, *first)) + sum(w.sum(1) for w in (o, down))
            sums = [float(w.sum()) for w in (q, k, v, o, *first, down)]
            layers.append(sum(sums) if self.score == "taylor" else sum(x**0.5 for x in sums) / len(sums))
        return Scores(neurons, torch.stack(heads), width, layers)

    def _wanda(self, model: Anatomy, stats: Statistics) -> Scores:
        neurons, heads, width, layers = [], [], torch.zeros(model.width, dtype=torch.float64), []
        for i, shape in enumerate(model.layers):
            down, o = model.weight("down", i).double().cpu(), model.weight("o", i).double().cpu()
            first = [model.weight(part, i).double().cpu() for part in ("gate", "up") if model.has(part)]
            qkv = [model.weight(part, i).double().cpu() for part in "qkv"]
            weights = [*qkv, o, *first, down]
            layers.append(float(sum(w.norm() for w in weights)) / len(weights))
            neurons.append(down.abs().sum(0) * stats[_NEURONS][i].cpu())
            columns = o.abs().sum(0) * stats[_HEADS][i].cpu()
            heads.append(columns.view(shape.heads, -1).sum(1))
            for read, inputs in ((qkv, stats[_ATTENTION][i]), (first, stats[_MLP][i])):
                width += sum(w.abs().sum(0) for w in read) * inputs.cpu()
        return Scores(neurons, torch.stack(heads), width, layers)
