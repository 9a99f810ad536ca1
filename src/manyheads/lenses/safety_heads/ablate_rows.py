# SPDX-License-Identifier: Apache-2.0
"""Zeroes other heads in every row of a batch: ablation of heads that were ranked prompt by prompt.

Shapes: outputs of heads ``[B, T, H, dv]``.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...call import AttentionCall, Site
from ...calls.edits import heads_at, scale_heads
from ...errors import UserError
from ...strategy import AttentionPatch

__all__ = ["AblateRows"]


@dataclass(frozen=True, kw_only=True)
class AblateRows(AttentionPatch):
    """Heads ablated while the model is in use, other ones in every row.

    Attributes:
        heads: for each row of the batch, ``layer.head`` of those to zero.
    """

    heads: tuple[tuple[str, ...], ...] = field(default=(), metadata={"help": "for each row its heads, as layer.head"})

    def selects(self, site: Site) -> bool:
        return super().selects(site) and any(heads_at(row, site) for row in self.heads)

    def patch(self, call: AttentionCall, out: Tensor) -> Tensor:
        if len(self.heads) != len(out):
            raise UserError(f"heads are given for {len(self.heads)} rows, and the batch has {len(out)}")
        factor = torch.ones(len(out), out.shape[2], device=out.device)
        for row, heads in zip(factor, self.heads, strict=True):
            row[heads_at(heads, call.site, out.shape[2])] = 0.0
        return scale_heads(out, factor)
