# SPDX-License-Identifier: Apache-2.0
"""Which module of a block writes an entry of the residual stream: attention, the MLP, or the norm behind one of them.

A block adds to its input what one or two of its modules give, in some architectures times a constant. Which they are is
found from the numbers of one token, so that no class has to be known: the change ``h_out - h_in [D]`` is explained by
one or two outputs ``[D]`` with a constant each. The one that adds most to the entry wrote it.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

__all__ = ["writer_of"]

_UNEXPLAINED = 2e-2  # part of the change that rounding may leave


def writer_of(before: Tensor, after: Tensor, parts: dict[str, Tensor], channel: int) -> str | None:
    """The name among ``parts`` of what wrote ``after[channel]``.

    Args:
        before, after: the residual stream of one token before and after the block, ``[D]``.
        parts: outputs of the block's modules for that token, ``[D]``, by name.
        channel: of the entry.

    Returns:
        None where most of the entry was there before the block, or no two outputs explain the change (blocks that
        normalise the stream itself).
    """
    change = (after.double() - before.double()).cpu()
    names = list(parts)
    if not names or abs(float(change[channel])) < 0.5 * abs(float(after[channel])):
        return None
    outputs = torch.stack([parts[name].double() for name in names]).cpu()
    for count in (1, 2):
        fits = []
        for chosen in combinations(range(len(names)), count):
            factors = outputs[list(chosen)].T
            by = torch.linalg.lstsq(factors, change[:, None], driver="gelsd").solution
            left = float((change - (factors @ by)[:, 0]).norm() / change.norm())
            fits.append((left, chosen, by[:, 0] * outputs[list(chosen), channel]))
        left, chosen, added = min(fits, key=lambda fit: fit[0], default=(1.0, (), change))
        if left <= _UNEXPLAINED:
            return names[chosen[int((added * change[channel].sign()).argmax())]]
    return None
