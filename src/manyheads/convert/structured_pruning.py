# SPDX-License-Identifier: Apache-2.0
"""Structured pruning by scores that need no paper's care: the baselines that other conversions are measured against.

    random     numbers drawn with ``seed``
    magnitude  L2 norm of the weights that go with a head, neuron or channel
    wanda      |W| times the root mean square of its input, summed over outputs: of the last layer of the feed-forward
               part for neurons, of the output projection for heads; channels by their norm's output times the weights
               that read them. After A Simple and Effective Pruning Approach for Large Language Models (arXiv
               2306.11695), whose single weights are added up here for what they belong to.

What is cut, and how many parameters stay, is as in every pruning of this package, so that arms are equal. Layers have
no such scores: ``magnitude`` and ``wanda`` take the mean norm of their weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calls.calibration import Statistic, Statistics, rms
from ..conversion import Anatomy, Recovery, SurgeryPlan
from ..errors import UserError
from ._pruning import Pruning, Scores

__all__ = ["StructuredPruning"]

_NEURONS, _HEADS, _ATTENTION, _MLP = rms("neurons"), rms("heads"), rms("attention"), rms("mlp")


@dataclass(frozen=True, kw_only=True)
class StructuredPruning(Pruning):
    """See the head of this file; ``keep``, ``axis`` and ``heads`` are those of the base."""

    score: str = field(default="wanda", metadata={"help": "random, magnitude or wanda"})
    seed: int = field(default=0, metadata={"help": "of random scores"})
    lr: float = field(default=3e-4, metadata={"help": "highest learning rate of the recovery"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in ("random", "magnitude", "wanda"):
            raise UserError(f"score is random, magnitude or wanda, not {self.score!r}")

    def wants(self, model: Anatomy) -> Sequence[Statistic]:
        return (_NEURONS, _HEADS, _ATTENTION, _MLP) if self.score == "wanda" else ()

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        return self.pruned(model, self._random(model) if self.score == "random" else self._scores(model, stats))

    def recovery(self, model: Anatomy) -> Recovery:
        return Recovery(loss="kl" if model.causal else "hidden", lr=self.lr)

    def _random(self, model: Anatomy) -> Scores:
        source = torch.Generator().manual_seed(self.seed)
        shapes = model.layers

        def draw(*size: int) -> Tensor:
            return torch.rand(size, generator=source)

        neurons = [draw(shape.neurons) for shape in shapes]
        return Scores(neurons, draw(len(shapes), shapes[0].heads), draw(model.width), draw(len(shapes)).tolist())

    def _scores(self, model: Anatomy, stats: Statistics) -> Scores:
        neurons, heads, width, layers = [], [], torch.zeros(model.width, dtype=torch.float64), []
        for i, shape in enumerate(model.layers):
            down, o = model.weight("down", i).double().cpu(), model.weight("o", i).double().cpu()
            first = [model.weight(part, i).double().cpu() for part in ("gate", "up") if model.has(part)]
            qkv = [model.weight(part, i).double().cpu() for part in "qkv"]
            weights = [*qkv, o, *first, down]
            layers.append(float(sum(w.norm() for w in weights)) / len(weights))
            if self.score == "magnitude":
                neurons.append((down.square().sum(0) + sum(w.square().sum(1) for w in first)).sqrt())
                columns = o.square().sum(0)
                width += sum(w.square().sum(0) for w in (*qkv, *first)) + sum(w.square().sum(1) for w in (o, down))
            else:
                neurons.append(down.abs().sum(0) * stats[_NEURONS][i].cpu())
                columns = o.abs().sum(0) * stats[_HEADS][i].cpu()
                for read, inputs in ((qkv, stats[_ATTENTION][i]), (first, stats[_MLP][i])):
                    width += sum(w.abs().sum(0) for w in read) * inputs.cpu()
            heads.append(columns.view(shape.heads, -1).sum(1))
        return Scores(neurons, torch.stack(heads), width, layers)
