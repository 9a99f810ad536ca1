# SPDX-License-Identifier: Apache-2.0
"""Target variance rescaling (TVR), a mitigation of massive activations in training (paper 104, 2503.22329).

Every ``interval`` steps of the optimiser each matrix W of the blocks whose standard deviation has outgrown the target,

    std(W) / target > limit:   W <- (W - mean(W)) / std(W) * target + mean(W),   bias <- 0,

is pulled back to it; matrices within the limit are left alone to the bit.

    rescaling = TargetVariance(blocks_of(model), target=0.01)
    rescaling.attach(optimizer)        # or call rescaling.step() after each step

Taken are the weights of linear layers (GPT-2's transposed ones too) in the blocks; neither the token embedding nor the
head is rescaled. The paper's companion at initialisation, :func:`divide_by_depth`, does to the weights of a new model
what ``scale_with_depth`` does to the target; its exact form is inferred from that option.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import UserError

__all__ = ["TargetVariance", "blocks_of", "divide_by_depth"]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The elements of the outermost lists of modules, in order: the blocks of a transformer, of encoder and decoder."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child) if isinstance(child, nn.ModuleList) else blocks_of(child)
    return found


def _matrices(blocks: Sequence[nn.Module]) -> Iterator[tuple[int, Any]]:
    """The number of each block, from 1, with each of its modules that has a matrix to multiply by.

    Raises:
        UserError: one is not held here in numbers that can be rescaled.
    """
    for number, block in enumerate(blocks, start=1):
        for module in block.modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or isinstance(module, nn.Embedding):
                continue
            if weight.device.type == "meta" or not weight.is_floating_point():
                raise UserError(
                    f"a {type(module).__name__} keeps its weight as {weight.dtype} on {weight.device}, which cannot be "
                    "rescaled: load the model whole and without quantisation"
                )
            yield number, module


class TargetVariance:
    """Keeps the standard deviations of the matrices of blocks near a target.

    Args:
        blocks: see :func:`blocks_of`.
        target: standard deviation; the paper takes 0.01 for its Llama of 1B parameters, and 0.02 with DyT.
        interval: steps of the optimiser between two looks.
        limit: ratio to the target above which a matrix is rescaled.
        scale_with_depth: the target of block number n, from 1, is divided by sqrt(n).
    """

    def __init__(
        self, blocks: Sequence[nn.Module], *, target: float = 0.02, interval: int = 50, limit: float = 1.2,
        scale_with_depth: bool = False,
    ) -> None:  # fmt: skip
        self.blocks, self.target, self.interval, self.limit = list(blocks), target, interval, limit
        self.scale_with_depth, self.steps = scale_with_depth, 0

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Call :meth:`step` after every step of ``optimizer``; the handle returned has ``remove()``."""

        def after(*_: Any) -> None:
            self.step()

        return optimizer.register_step_post_hook(after)

    def step(self) -> int:
        """Count a step; every ``interval`` steps rescale. Returns how many matrices were rescaled."""
        self.steps += 1
        return self.rescale() if self.steps % self.interval == 0 else 0

    @torch.no_grad()
    def rescale(self) -> int:
        """Rescale now what is above the limit. Returns how many matrices that were."""
        count = 0
        for number, module in _matrices(self.blocks):
            target = self.target / (number**0.5 if self.scale_with_depth else 1.0)
            exact = module.weight.float()
            std, mean = exact.std(), exact.mean()
            if std > self.limit * target:
                module.weight.copy_((exact - mean) / std * target + mean)
                if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
                    bias.zero_()
                count += 1
        return count


@torch.no_grad()
def divide_by_depth(blocks: Sequence[nn.Module]) -> None:
    """Divide the matrices of block number n, from 1, of a new model by sqrt(n)."""
    for number, module in _matrices(blocks):
        module.weight.div_(number**0.5)
