# SPDX-License-Identifier: Apache-2.0
"""Training of rows or columns of weights while all else stays as it is, bit for bit.

Masking gradients is not enough: weight decay and momentum move what has no gradient. Here each slice is a parameter of
its own, in float32, which alone the optimiser knows; after a step it is written into its place.

    with train_slices(model, slices) as own:
        optimizer = own.follow(torch.optim.AdamW(own.parameters, lr=1e-4))
        fit(model, get_batch, next_token_loss, budget=100, optimizers=[optimizer])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["OwnSlices", "Slice", "train_slices"]


@dataclass(frozen=True, eq=False)
class Slice:
    """Some rows or columns of a parameter.

    Attributes:
        parameter: of a model.
        dim: along which they are counted.
        index: which, ascending.
    """

    parameter: nn.Parameter
    dim: int
    index: tuple[int, ...]


class OwnSlices:
    """The slices as parameters.

    Attributes:
        parameters: one for each slice, float32.
    """

    def __init__(self, slices: Sequence[Slice]) -> None:
        taken: set[tuple[int, int]] = set()
        for each in slices:
            if (key := (id(each.parameter), each.dim)) in taken or any(
                other == key[0] and dim != key[1] for other, dim in taken
            ):
                raise UserError("two slices of one parameter may overlap: join them into one")
            taken.add(key)
        self.slices = list(slices)
        self._index = [torch.tensor(each.index, device=each.parameter.device) for each in slices]
        self.parameters = [
            nn.Parameter(each.parameter.detach().index_select(each.dim, index).float())
            for each, index in zip(slices, self._index, strict=True)
        ]

    @property
    def count(self) -> int:
        """Numbers that are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    def follow(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Write the slices into their places after every step of ``optimizer``, which is given back."""

        def after(*_: Any) -> None:
            self.write()

        optimizer.register_step_post_hook(after)
        return optimizer

    @torch.no_grad()
    def write(self) -> None:
        """Write the slices into their places."""
        for each, index, own in zip(self.slices, self._index, self.parameters, strict=True):
            each.parameter.index_copy_(each.dim, index, own.to(each.parameter.dtype))

    def take(self, number: int, parameter: Tensor) -> None:
        """Move the gradient of the whole ``parameter`` to the slice of that number."""
        if parameter.grad is None:
            return
        own, index = self.parameters[number], self._index[number]
        part = parameter.grad.index_select(self.slices[number].dim, index).float()
        own.grad = part if own.grad is None else own.grad + part
        parameter.grad = None


@contextmanager
def train_slices(model: nn.Module, slices: Sequence[Slice]) -> Iterator[OwnSlices]:
    """Gradients reach the slices alone, for as long as the block lasts.

    Raises:
        UserError: there are none, or two of one parameter.
    """
    if not slices:
        raise UserError("there are no slices to train")
    own = OwnSlices(slices)
    before = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    handles = []
    for number, each in enumerate(slices):
        each.parameter.requires_grad_(True)
        handles.append(each.parameter.register_post_accumulate_grad_hook(lambda p, n=number: own.take(n, p)))
    try:
        yield own
    finally:
        for handle in handles:
            handle.remove()
        for p, needed in before:
            p.requires_grad_(needed)
