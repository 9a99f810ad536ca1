# SPDX-License-Identifier: Apache-2.0
"""What a plan of surgery puts into a model: nothing at all, linear layers of another size, low rank, shared atoms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Linear
from torch.nn.functional import linear

__all__ = ["Absent", "Linear", "LowRankLinear", "Same", "SharedLinear"]


class Absent(nn.Module):
    """Gives zeros of the shape of what it is given; as an attention module, with no weights beside them."""

    def __init__(self, attention: bool = False) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        zeros = torch.zeros_like(hidden_states)
        return (zeros, None) if self.attention else zeros


class Same(nn.Module):
    """Gives what it is given."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


class LowRankLinear(nn.Module):
    """``left (right x) + b``: ``left [out, R]``, ``right [R, in]``."""

    def __init__(self, left: Tensor, right: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.left, self.bias = nn.Parameter(left), bias
        self.right = right if isinstance(right, nn.Parameter) else nn.Parameter(right)  # perhaps of several layers
        self.out_features, self.in_features = left.shape[0], right.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.right), self.left, self.bias)


class SharedLinear(nn.Module):
    """``(sum_s c_s D_s + left right) x + b``; the atoms ``D [S, out, in]`` are one parameter of several layers."""

    def __init__(
        self, atoms: nn.Parameter, coefficients: Tensor, own: tuple[Tensor, Tensor] | None, bias: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.atoms, self.coefficients, self.bias = atoms, nn.Parameter(coefficients), bias
        self.own = own and LowRankLinear(*own, None)
        self.out_features, self.in_features = atoms.shape[1], atoms.shape[2]

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, torch.tensordot(self.coefficients, self.atoms, 1), self.bias)
        return y if self.own is None else y + self.own(x)
