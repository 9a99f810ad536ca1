# SPDX-License-Identifier: Apache-2.0
"""More slots for the lower layers, fewer for the upper ones.

Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069. Lower
layers spread their attention over the whole text, upper layers gather it on a few tokens, so equal budgets starve the
first and waste slots on the last. Beside the protected tokens (SnapKV's window), which every layer keeps, layer l of m
gets a budget on a straight line whose mean is the equal budget b:

    top = b / beta        bottom = 2 b - top        b_l = bottom - (bottom - top) * l / (m - 1)

If the bottom layer would get more than there is, it gets all there is and the line is flatter, as in the released code.
Steps are rounded towards b, so that the budgets of all layers sum to m * b exactly, and no layer is left empty.

Differs from the released code: that rounds the step down, which leaves the sum above m * b, and goes back to equal
budgets for a prompt shorter than 2 b. Layers are counted among the causal self-attention layers that the strategy acts
on. A sliding-window layer cannot hold more than its window, whatever its budget.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError
from ._view import CacheView
from ._wrap import Wrapper

__all__ = ["PyramidKV"]


@dataclass(frozen=True, kw_only=True)
class PyramidKV(Wrapper):
    """Budgets that fall in equal steps from the lowest layer to the highest, under the scores of ``base``.

    Attributes:
        beta: the highest layer's unprotected budget is the mean divided by this; 1 gives every layer the same.
    """

    beta: float = field(default=20.0, metadata={"help": "mean budget over that of the highest layer, at least 1"})

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise UserError(f"pyramidkv: beta is at least 1 (equal budgets), not {self.beta}")
        super().__post_init__()

    def head_budgets(self, view: CacheView, scores: Tensor, budgets: Tensor) -> Tensor | None:
        peers = [layer for layer in view.site.peers if self.layers is None or layer in self.layers]
        if len(peers) > 1 and view.site.layer in peers:
            mean = (budgets - self.protected).clamp(min=0)
            room = (view.counts[:, None] - self.protected).clamp(min=0) - mean
            least = torch.div(mean, self.beta, rounding_mode="floor").long().clamp(min=int(self.protected == 0))
            rise = torch.minimum(mean - least, room).clamp(min=0)  # of the bottom layer above the mean
            steps = len(peers) - 1
            above = rise * (steps - 2 * peers.index(view.site.layer))  # (b_l - mean) * steps: odd around the middle
            budgets = budgets + torch.div(above, steps, rounding_mode="trunc")
        uneven = super().head_budgets(view, scores, budgets)
        return budgets if uneven is None else uneven
