# SPDX-License-Identifier: Apache-2.0
"""Training a ranker: of two documents the relevant one is to score higher, by a margin of 1."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .budget import Budget
from .fit import BatchFn, TrainState, fit
from .schedules import decay

__all__ = ["Pairs", "hinge_loss", "ranking_optimizers", "train_ranker"]

Pairs = tuple[Tensor, Tensor, Tensor]
_SCORING = 10.0  # times the rate, for the layer that weighs kernels


def hinge_loss(model: nn.Module, batch: Pairs) -> Tensor:
    """``max(0, 1 - s(q, d+) + s(q, d-))``, the mean over ids ``queries [B, Q]``, ``better`` and ``worse [B, T]``."""
    queries, better, worse = batch
    first, second = model(queries.repeat(2, 1), torch.cat([better, worse])).chunk(2)
    loss: Tensor = (1 - first + second).clamp(min=0).mean()
    return loss


def ranking_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Adam, ten times as fast for the layer ``dense`` that weighs kernels, as TKL is trained."""
    named = list(model.named_parameters())
    fast = [p for name, p in named if ".dense." in name]
    rest = [p for name, p in named if ".dense." not in name]
    return [torch.optim.Adam([{"params": rest, "lr": lr}, {"params": fast, "lr": _SCORING * lr}])]


def train_ranker(
    model: nn.Module, get_batch: BatchFn[Pairs], budget: Budget | TrainState | str | int, *, lr: float,
    on_step: Callable[[TrainState], bool | None] | None = None,
) -> TrainState:  # fmt: skip
    """Train in place, at a rate that rises for a tenth and falls by half a cosine, as all arms that are compared.

    See :func:`~manyheads.training.fit.fit`.

    Raises:
        Diverged: the loss is NaN or infinite.
    """
    return fit(
        model, get_batch, hinge_loss, budget=budget, optimizers=ranking_optimizers(model, lr), on_step=on_step,
        schedule=decay("cosine", warmup=0.1, floor=0.1), tokens_of=lambda batch: sum(x.numel() for x in batch),
    )  # fmt: skip
