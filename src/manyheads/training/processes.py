# SPDX-License-Identifier: Apache-2.0
"""One process or several: what a training loop needs to know of the others. Several go by accelerate (``[train]``)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["Processes", "accelerated"]


class Processes:
    """This process alone."""

    rank, size = 0, 1

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model that is called in training; its gradients are those of all processes."""
        return model

    def unsynchronised(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Gradients of a backward within stay here, to be added to those of a later one."""
        return nullcontext()

    def mean(self, x: Tensor) -> Tensor:
        return x

    def total(self, x: float) -> float:
        return x

    def of_first(self, x: float) -> float:
        """``x`` as the first process has it, so that all decide alike."""
        return x

    def wait(self) -> None:
        """Return when all processes have come here."""


class _Accelerated(Processes):
    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.rank, self.size = accelerator.process_index, accelerator.num_processes

    def wrap(self, model: nn.Module) -> nn.Module:
        wrapped: nn.Module = self.accelerator.prepare(model)
        return wrapped

    def unsynchronised(self, model: nn.Module) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.accelerator.no_sync(model)
        return context

    def mean(self, x: Tensor) -> Tensor:
        return self._reduced(x, "mean")

    def total(self, x: float) -> float:
        return float(self._reduced(torch.tensor(x, dtype=torch.float64), "sum"))

    def of_first(self, x: float) -> float:
        return self.total(x if self.rank == 0 else 0.0)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def _reduced(self, x: Tensor, how: str) -> Tensor:
        reduced: Tensor = self.accelerator.reduce(x.to(self.accelerator.device), how)
        return reduced


def accelerated(device: torch.device) -> Processes:
    """The processes that ``accelerate launch`` or ``torchrun`` started, each with its device.

    Raises:
        UserError: accelerate is not installed, or the model is on another device than this process's.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise UserError("several GPUs need accelerate: pip install 'manyheads[train]'") from error
    accelerator = Accelerator(cpu=device.type == "cpu")
    if (accelerator.device.type, accelerator.device.index or 0) != (device.type, device.index or 0):
        raise UserError(f"the model is on {device}, this process's device is {accelerator.device}; move it there")
    return _Accelerated(accelerator)
