# SPDX-License-Identifier: Apache-2.0
"""AMP: prune attention heads and feed-forward neurons whose share of what their layer writes is smallest.

Which heads and neurons matter is read off a few prompts, forward only: a head by the size of what it adds to the
residual stream, a neuron by the size of its activation. The same share of both goes in every layer, so that the result
keeps its shape and a stock config can say it; adapters of low rank then win back what was lost.

Efficient LLMs with AMP: Attention Heads and MLP Pruning (arXiv 2504.21174), for a layer:

    head n     I_n = mean over tokens of |h_n W_n|_1              [H], h_n ``[T, d]``, W_n ``[d, D]`` of the output
    neuron m   I_m = mean over tokens of |SiLU(x W_gate)_m (x W_up)_m|                                          [I]

Text and released code agree on both scores. The share of heads and neurons is that of the blocks' own weights that has
to go for the model to keep ``keep`` of its parameters, embeddings included. Heads come in whole numbers; the code makes
up for their rounding in neurons, but counts a head as one neuron. Here neurons are as many as the parameters allow.

The paper prunes models without grouped queries, and its code takes them for granted. Here groups stay equal: the number
of query heads is the nearest that allows it, and of the ways to keep so many (fewer groups, or fewer heads of each) the
one of the highest sum of scores is taken. Of a model with few heads, a small cut can leave all of them.

Ours beside the paper: ``neurons=projected`` multiplies a neuron's score by the L1 norm of its output weights, as is
done for heads; ``refit`` (of every pruning) lets what stays make up for what went, by least squares on the text.
``order=highest`` is the paper's control, which takes away the highest scores. The paper reads 50 prompts of Alpaca and
trains for two epochs of it; here both are of the text that is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..calls.calibration import Statistic, Statistics, absolute
from ..conversion import Anatomy, SurgeryPlan
from ..errors import UserError
from ._pruning import Pruning, Scores

__all__ = ["Amp"]


def _projected(x: Tensor, o: Tensor) -> Tensor:
    """Sum over tokens of the L1 norm of what each head adds; ``x [B, T, H, d]``, ``o [D, H * d]``."""
    weights = o.unflatten(1, x.shape[2:])
    parts = [(x[:, :, h] @ weights[:, h].mT).abs().sum(dtype=torch.float64) for h in range(x.shape[2])]
    return torch.stack(parts)


_HEADS = Statistic("heads.projected", "heads", _projected, lambda total, _, tokens: total / tokens, parts=("o",))
_NEURONS = absolute("neurons")


@dataclass(frozen=True, kw_only=True)
class Amp(Pruning):
    """See the head of this file; the other fields are those of the base."""

    axis: str = field(
        default="heads_neurons", metadata={"help": "what is cut: heads_neurons in one ratio, or neurons alone"}
    )
    neurons: str = field(
        default="activation", metadata={"help": "neurons are scored by activation, or projected on their output too"}
    )
    order: str = field(default="lowest", metadata={"help": "which scores go: lowest, or as a control highest"})
    loss: str = field(
        default="nll", metadata={"help": "of the recovery: nll (of the text) or kl (to the model before)"}
    )
    rank: int = field(default=8, metadata={"help": "of adapters that the recovery trains; 0 for all weights"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axis not in ("heads_neurons", "neurons"):
            raise UserError("amp scores heads and neurons: axis is heads_neurons or neurons")
        if self.neurons not in ("activation", "projected") or self.order not in ("lowest", "highest"):
            raise UserError("neurons are scored by activation or projected, and lowest or highest scores go")

    def wants(self, model: Anatomy) -> Sequence[Statistic]:
        return (*super().wants(model), _HEADS, _NEURONS)

    def plan(self, model: Anatomy, stats: Statistics) -> SurgeryPlan:
        sign = 1 if self.order == "lowest" else -1
        neurons = list(stats[_NEURONS])
        if self.neurons == "projected":
            out = [model.weight("down", i).abs().sum(0, dtype=torch.float64) for i in range(len(neurons))]
            neurons = [activation * size.to(activation) for activation, size in zip(neurons, out, strict=True)]
        scores = Scores([sign * x for x in neurons], sign * torch.stack(list(stats[_HEADS])), torch.empty(0), ())
        return self.pruned(model, scores, stats)
