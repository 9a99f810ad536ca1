# SPDX-License-Identifier: Apache-2.0
"""Training a ranker: of two documents the relevant one is to score higher, by a margin of 1."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .budget import Budget
from .fit import BatchFn, TrainState, fit
from .schedules import decay

__all__ = ["Pairs", "hinge_loss", "train_ranker"]

Pairs = tuple[Tensor, Tensor, Tensor]


def hinge_loss(model: nn.Module, batch: Pairs) -> Tensor:
    """``max(0, 1 - s(q, d+) + s(q, d-))``, the mean over ids ``queries [B, Q]``, ``better`` and ``worse [B, T]``."""
    queries, better, worse = batch
    first, second = model(queries.repeat(2, 1), torch.cat([better, worse])).chunk(2)
    loss: Tensor = (1 - first + second).clamp(min=0).mean()
    return loss


def train_ranker(
    model: nn.Module, get_batch: BatchFn[Pairs], budget: Budget | TrainState | str | int, *, lr: float,
    on_step: Callable[[TrainState], bool | None] | None = None,
) -> TrainState:  # fmt: skip
    """Train in place by Adam, at a rate that rises for a tenth and falls by half a cosine; see :func:`.fit.fit`.

    TKL is trained at a constant rate, ten times as high for the layer that weighs kernels. With a few thousand pairs
    that was worse on Cranfield's tuning queries: a step of that layer moves scores by more than the margin.

    Raises:
        Diverged: the loss is NaN or infinite.
    """
    return fit(
        model, get_batch, hinge_loss, budget=budget, on_step=on_step,
        optimizers=[torch.optim.Adam(model.parameters(), lr=lr)], schedule=decay("cosine", warmup=0.1, floor=0.1),
        tokens_of=lambda batch: sum(x.numel() for x in batch),
    )  # fmt: skip
