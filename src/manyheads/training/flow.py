# SPDX-License-Identifier: Apache-2.0
"""Training of small rectified flows."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .budget import Budget
from .fit import TrainState, fit
from .schedules import decay

__all__ = ["train_flow"]

BatchT = TypeVar("BatchT")


class _Flow(Protocol):
    def loss(self, given: Any) -> Tensor: ...


def train_flow(
    flow: _Flow, get_batch: Callable[[int], BatchT], budget: Budget | TrainState | str | int, rate: float,
    on_step: Callable[[TrainState], bool | None] | None = None, *, warmup: int | float = 0.05,
) -> TrainState:  # fmt: skip
    """Train in place: AdamW, a rise and half a cosine; on a GPU steps are replayed.

    Args:
        flow: a module on its device with a ``loss`` of a batch.
        get_batch: by the number of the step, on that device.
        budget: as in :func:`manyheads.training.fit`.
        rate: highest learning rate.
        on_step: told the state after each step.
        warmup: of :func:`manyheads.training.decay`.
    """
    model: Any = flow
    used = list(model.parameters())
    return fit(
        model, get_batch, lambda _, given: flow.loss(given), budget=budget,
        optimizers=[torch.optim.AdamW(used, lr=rate, betas=(0.9, 0.99), weight_decay=0.01)],
        schedule=decay("cosine", warmup=warmup), on_step=on_step, replayed=used[0].device.type == "cuda",
    )  # fmt: skip
