# SPDX-License-Identifier: Apache-2.0
"""The training loop.

A step: ``accumulate`` batches forward and backward, gradients clipped by their norm, the optimisers at the rate that
the schedule says. What a batch is and what the loss of a model on it is, the caller says; the loop knows neither tokens
nor pictures. With several processes each takes batches of its own, so that ``n`` of them do what one does that
accumulates ``n`` times as many.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UserError
from .budget import Budget
from .checkpoint import Checkpoint, RandomState, newest, read, write
from .processes import Processes, accelerated
from .replay import Replayed
from .schedules import Schedule

__all__ = ["BatchFn", "Diverged", "Loss", "TrainState", "autocast", "fit"]

BatchT = TypeVar("BatchT")
BatchFn = Callable[[int], BatchT]
Loss = Callable[[nn.Module, BatchT], Tensor | Iterator[Tensor]]

_LOOK = 50  # steps between two looks at the losses, for each of which a GPU has to be waited for


class Diverged(UserError):
    """The loss is NaN or infinite."""


@dataclass
class TrainState:
    """How far a training is; the caller may hold one and read it while batches are made.

    Attributes:
        budget: of the training.
        step: optimiser steps done.
        tokens: seen, where they are counted.
        seconds: spent, compiling and earlier runs up to the checkpoint included in neither or both.
        losses: of each step, the last few possibly missing while training goes on.
        finished: whether the budget is spent, or ``on_step`` ended it.
        loss: of the last step, on the model's device.
    """

    budget: Budget
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    finished: bool = False
    loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    _recent: list[Tensor] = field(default_factory=list)

    @property
    def position(self) -> float:
        """What is spent, in the unit of the budget."""
        return float({"steps": self.step, "tokens": self.tokens, "seconds": self.seconds}[self.budget.unit])

    @property
    def progress(self) -> float:
        """Share of the budget that is spent; above 1 when the last step went beyond it."""
        return self.position / self.budget.amount

    def add(self, loss: Tensor) -> None:
        """Take the loss of a step.

        Raises:
            Diverged: it, or an earlier one, is NaN or infinite.
        """
        self.loss = loss
        self._recent.append(loss)
        if len(self._recent) == _LOOK:
            self.look()

    def look(self) -> None:
        """Bring ``losses`` up to date."""
        found: list[float] = torch.stack(self._recent).tolist() if self._recent else []
        self.losses += found
        self._recent.clear()
        if not all(map(math.isfinite, found)):
            raise Diverged(f"the loss is NaN or infinite by step {len(self.losses)}; take a smaller learning rate")

    def state_dict(self) -> dict[str, Any]:
        self.look()
        return {
            "budget": [self.budget.amount, self.budget.unit], "step": self.step, "tokens": self.tokens,
            "seconds": self.seconds, "losses": torch.tensor(self.losses, dtype=torch.float64),
            "finished": self.finished,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        if state["budget"] != [self.budget.amount, self.budget.unit]:
            raise ValueError(f"its budget is {state['budget'][0]:g} {state['budget'][1]}")
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.losses, self.finished = state["losses"].tolist(), state["finished"]


def fit(
    model: nn.Module,
    get_batch: BatchFn[BatchT],
    loss: Loss[BatchT],
    *,
    budget: Budget | TrainState | str | int,
    optimizers: Sequence[torch.optim.Optimizer],
    schedule: Schedule | None = None,
    clip: float | None = 1.0,
    accumulate: int = 1,
    bf16: bool | None = None,
    compiled: bool = False,
    warm: Sequence[BatchT] = (),
    tokens_of: Callable[[BatchT], int] | None = None,
    checkpoint: Checkpoint | None = None,
    accelerate: bool = False,
    replayed: bool = False,
    on_step: Callable[[TrainState], bool | None] | None = None,
) -> TrainState:
    """Train in place, and leave the model in evaluation mode.

    Args:
        model: on its device, in float32.
        get_batch: given the number of the batch, that batch, on the model's device. With ``accumulate`` and several
            processes a step takes several numbers; otherwise they are those of the steps.
        loss: of a model on a batch, a scalar; or the terms of one, each carried backward before the next is asked for.
        budget: as text, see :meth:`Budget.parse`, or a number of steps, or a new :class:`TrainState` of one.
        optimizers: each with its highest rate.
        schedule: factor of the rates for the next step; None leaves the rates alone.
        clip: largest norm of all gradients; None for no clipping.
        accumulate: batches of a step; the gradient is the mean of theirs.
        bf16: forward in bfloat16; None for on a GPU.
        compiled: ``torch.compile`` the loss, as one graph for each shape; raises where that cannot be.
        warm: batches run before the clock starts and forgotten, so that compiling takes nothing of a budget in seconds.
        tokens_of: tokens that a batch counts as; needed for a budget in tokens.
        checkpoint: where checkpoints go; if there is one, training goes on from it, to the bit on a CPU.
        accelerate: train in all processes that ``accelerate launch`` or ``torchrun`` started.
        replayed: record a step as a CUDA graph and replay it; on a GPU, in one process and without checkpoints.
        on_step: told the state after each step; True ends the training.

    Raises:
        Diverged: the loss is NaN or infinite.
        ValueError: ``replayed`` together with what it does not go with.
        UserError: a budget that cannot be followed, or a checkpoint of another training.
    """
    state = budget if isinstance(budget, TrainState) else TrainState(Budget.of(budget))
    if state.budget.unit == "tokens" and tokens_of is None:
        raise UserError("a budget in tokens needs tokens_of, which counts those of a batch")
    device = next(model.parameters()).device
    processes = accelerated(device) if accelerate else Processes()
    rates = [group["lr"] for group in _groups(optimizers)]
    trained = _trained(model, optimizers)
    called = processes.wrap(model)
    precision = autocast(device, bf16)
    measure: Loss[BatchT] = torch.compile(loss, dynamic=False, fullgraph=True) if compiled else loss
    model.train()
    for batch in warm:
        _backward(measure, called, batch, 1, precision)
        _forget(optimizers)
    shared = {"model": model, "state": state, **{f"optimizer-{i}": each for i, each in enumerate(optimizers)}}
    own = {"random": RandomState(), **(checkpoint.keep if checkpoint else {})}
    if checkpoint and (place := newest(checkpoint.folder)) is not None:
        read(place, shared, own, processes.rank)

    def step(batches: list[BatchT]) -> Tensor:
        _forget(optimizers)
        total = torch.zeros((), device=device)
        for i, batch in enumerate(batches, 1):
            with processes.unsynchronised(called) if i < len(batches) else nullcontext():
                total = total + _backward(measure, called, batch, len(batches), precision)
        if clip is not None:
            nn.utils.clip_grad_norm_(trained, clip)
        for each in optimizers:
            each.step()
        return total

    take = _recorded(step, optimizers, device, processes.size == 1 and not checkpoint) if replayed else step
    begun, written = time.perf_counter() - state.seconds, state.seconds
    while not state.finished:
        if schedule is not None:
            factor = schedule(state)
            _set_rates(optimizers, [rate * factor for rate in rates])
        first = state.step * accumulate
        batches = [get_batch((first + i) * processes.size + processes.rank) for i in range(accumulate)]
        total = take(batches)
        counted = sum(map(tokens_of, batches)) if tokens_of else 0
        state.step += 1
        state.tokens += int(processes.total(counted)) if tokens_of else 0
        state.seconds = time.perf_counter() - begun
        if state.budget.unit == "seconds":
            state.seconds = processes.of_first(state.seconds)
        state.add(processes.mean(total))
        state.finished = bool(on_step is not None and on_step(state)) or state.progress >= 1
        if checkpoint and _due(checkpoint, state, written, processes):
            write(checkpoint.folder, state.step, shared, own, processes.rank, processes.wait)
            written = state.seconds
    _forget(optimizers)
    state.look()
    model.eval()
    return state


def _due(checkpoint: Checkpoint, state: TrainState, written: float, processes: Processes) -> bool:
    """Whether to write a checkpoint, if the last one was at ``written`` seconds; the same in all processes."""
    late = checkpoint.seconds < math.inf and processes.of_first(state.seconds - written) >= checkpoint.seconds
    return state.finished or state.step % checkpoint.every == 0 or late


def autocast(device: torch.device, bf16: bool | None = None) -> AbstractContextManager[Any]:
    """The precision of a forward: bfloat16 if asked for, and by default on a GPU."""
    wanted = device.type == "cuda" if bf16 is None else bf16
    return torch.autocast(device.type, torch.bfloat16) if wanted else nullcontext()


def _backward(
    loss: Loss[BatchT], model: nn.Module, batch: BatchT, accumulate: int, precision: AbstractContextManager[Any]
) -> Tensor:
    """Add the gradients of one batch; its part of the step's loss."""
    with precision:
        made = loss(model, batch)
    total = torch.zeros((), device=next(model.parameters()).device)
    terms = iter((made,)) if isinstance(made, Tensor) else made
    while True:
        with precision:
            term = next(terms, None)
        if term is None:
            return total
        part = term / accumulate
        part.backward()
        total = total + part.detach()


def _groups(optimizers: Sequence[torch.optim.Optimizer]) -> list[dict[str, Any]]:
    return [group for each in optimizers for group in each.param_groups]


def _recorded(
    step: Callable[[list[BatchT]], Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    device: torch.device,
    alone: bool,
) -> Replayed[list[BatchT]]:
    if device.type != "cuda" or not alone:
        raise ValueError("only steps on a GPU, in one process and without checkpoints, are replayed")
    return Replayed(step, optimizers, device)


def _set_rates(optimizers: Sequence[torch.optim.Optimizer], rates: list[float]) -> None:
    for group, rate in zip(_groups(optimizers), rates, strict=True):
        if isinstance(group["lr"], Tensor):  # where a recorded step reads it
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _forget(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for each in optimizers:
        each.zero_grad(set_to_none=True)


def _trained(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> list[nn.Parameter]:
    """All that is optimised, the model's parameters first in its order, on which the last bit of a norm depends."""
    held = {id(p): p for group in _groups(optimizers) for p in group["params"]}
    own = [p for p in model.parameters() if held.pop(id(p), None) is not None]
    return [*own, *held.values()]
