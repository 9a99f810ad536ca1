# SPDX-License-Identifier: Apache-2.0
"""Models of one size, so that a comparison of architectures is none of parameter counts."""

import math
from collections.abc import Callable

import torch
from torch import nn

from ..errors import UserError

__all__ = ["matched_width", "parameters_of"]

_LEAST = 8  # smallest width
_TOLERANCE = 0.02  # largest share by which a match may be off


def parameters_of(model: nn.Module) -> int:
    """Numbers that are learned and that a token meets, those shared by two modules counted once.

    They are parameters, and buffers that are saved with them, for a codebook that follows its keys is learned too. A
    module says by an attribute ``active_share`` which part of its parameters that is, as experts do of which a token is
    sent to some; elsewhere it is all.
    """
    idle = 0.0
    for part in model.modules():
        if isinstance(share := getattr(part, "active_share", None), float):
            idle += (1 - share) * sum(p.numel() for p in part.parameters())
    held: dict[int, int] = {
        id(x): x.numel() for x in model.state_dict(keep_vars=True).values() if x.is_floating_point()
    }
    return sum(held.values()) - round(idle)


def matched_width(build: Callable[[int], nn.Module], parameters: int, *, name: str = "model") -> int:
    """The width, 8 or more, at which ``build`` comes closest to so many ``parameters``; nothing is allocated.

    Args:
        build: a model of a width; more width means more parameters.
        parameters: aimed at.
        name: of the model, for the error.

    Raises:
        UserError: no width comes within 2 %.
    """

    def size(width: int) -> int:
        with torch.device("meta"):
            return parameters_of(build(width))

    low, high = _LEAST, 2 * _LEAST
    sizes = {low: size(low), high: size(high)}
    if sizes[high] <= sizes[low]:
        raise UserError(f"{name} has {sizes[low]:,} parameters at any width: it cannot be matched")
    while sizes[high] < parameters:  # as if linear, and one more
        slope = (sizes[high] - sizes[low]) / (high - low)
        low, high = high, high + math.ceil((parameters - sizes[high]) / slope) + 1
        sizes[high] = size(high)
    for turn in range(2 * high.bit_length()):  # in turn as if linear, and by halves
        if high - low <= 1 or sizes[low] >= parameters:
            break
        share = (parameters - sizes[low]) / (sizes[high] - sizes[low]) if turn % 2 == 0 else 0.5
        width = min(max(low + math.floor(share * (high - low)), low + 1), high - 1)
        sizes[width] = size(width)
        low, high = (low, width) if sizes[width] > parameters else (width, high)
    best = min(sizes, key=lambda known: (abs(sizes[known] - parameters), known))
    if abs(sizes[best] - parameters) > _TOLERANCE * parameters:
        raise UserError(f"{name} cannot be brought to {parameters:,} parameters within {_TOLERANCE:.0%}")
    return best
