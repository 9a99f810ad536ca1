# SPDX-License-Identifier: Apache-2.0
"""Which module of a block writes an entry of the residual stream: attention, the MLP, or the norm behind one of them.

A block adds to its input what one or two of its modules give, in some architectures times a constant. Which they are is
found from the numbers of one token, so that no class has to be known: the change ``h_out - h_in [D]`` is explained by
one or two outputs ``[D]`` with a constant each. The one that adds most to the entry wrote it.
"""

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
        normalise the stream itself, numbers that are not finite).
    """
    change = (after.double() - before.double()).cpu()
    if not change.isfinite().all() or abs(float(change[channel])) < 0.5 * abs(float(after[channel])):
        return None
    outputs = {name: part.double().cpu() for name, part in parts.items() if part.isfinite().all()}
    for count in (1, 2):
        least, writer = _UNEXPLAINED, None
        for chosen in combinations(outputs, count):
            factors = torch.stack([outputs[name] for name in chosen], 1)
            by = torch.linalg.lstsq(factors, change[:, None], driver="gelsd").solution[:, 0]
            left = float((change - factors @ by).norm() / change.norm())
            if left < least:
                least, writer = left, chosen[int((by * factors[channel] * change[channel].sign()).argmax())]
        if writer is not None:
            return writer
    return None
