# SPDX-License-Identifier: Apache-2.0
"""LoRA (Hu et al., arXiv 2106.09685): what a frozen linear layer computes, and a trained product of two thin matrices.

Legend: N x K weight of a linear layer, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from ..errors import UserError

__all__ = ["LowRank", "parameter_name"]

_MULTIPLE = 8  # of the rank, in products on a GPU


class LowRank(nn.Module):
    """``W x + alpha B A x`` for the layers of a model; B begins at zero.

    Args:
        layers: ``[N, K]`` of each linear layer that is changed, by module path.
        rank: R, 0 for none.
        alpha: factor.
    """

    def __init__(self, layers: Mapping[str, tuple[int, int]], rank: int, alpha: float = 2.0) -> None:
        super().__init__()
        self.layers, self.lora, self.alpha = dict(layers), rank, alpha
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for name, (n, k) in self.layers.items() if rank else ():
            self.down[parameter_name(name)] = nn.Parameter(torch.randn(rank, k) * k**-0.5)
            self.up[parameter_name(name)] = nn.Parameter(torch.zeros(n, rank))

    def check_shape(self, weight: Tensor, name: str, how: str) -> None:
        """Raise UserError where the layer has another shape than the one trained on; ``how`` to train on this."""
        if tuple(weight.shape) != tuple(self.layers[name]):
            raise UserError(f"this was trained on another model, {name} has another shape: {how}")

    def matrices(self, name: str, weight: Tensor, live: bool) -> tuple[Tensor | None, Tensor | None]:
        """A ``[R, K]`` and B ``[N, R]`` of a layer; the parameters themselves where ``live``, else as ``weight`` is."""
        key = parameter_name(name)
        if key not in self.down:
            return None, None
        pair = self.down[key], self.up[key]
        return pair if live else (pair[0].to(weight), pair[1].to(weight))

    def compute(self, weight: Tensor, bias: Tensor | None, name: str, how: str) -> Callable[[Tensor], Tensor]:
        """What the linear layer computes; with the parameters as they are now, unless they are being trained."""
        self.check_shape(weight, name, how)
        down, up = self.matrices(name, weight, next(iter(self.parameters())).requires_grad)
        assert down is not None and up is not None
        if weight.is_cuda:
            return lambda x: self._joined(x, weight, bias, down, up)
        return lambda x: linear(x, weight, bias) + self.change(x, down, up)

    def _joined(self, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        """The same with A and B of a rank that is a multiple of 8, and the sum in the last product.

        Halves of another rank (22, say) lie aligned to no more than 2 or 4 bytes, for which tensor cores have no
        kernels; what is added is zeros.
        """
        rest = -self.lora % _MULTIPLE
        down, up = pad(down.to(x.dtype), (0, 0, 0, rest)), pad(up.to(x.dtype), (0, rest))
        base = linear(x, weight, bias)
        low = linear(x, down).flatten(0, -2)
        return torch.addmm(base.flatten(0, -2), low.to(base.dtype), up.mT.to(base.dtype), alpha=self.alpha).view_as(
            base
        )

    def change(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """``alpha B A x``."""
        return self.alpha * linear(linear(x, down.to(x.dtype)), up.to(x.dtype))


def parameter_name(path: str) -> str:
    """A module path as the name of a parameter, in which torch has no dots."""
    return path.replace(".", "|")
