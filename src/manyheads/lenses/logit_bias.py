# SPDX-License-Identifier: Apache-2.0
"""Adds a number to chosen logits: some rows look more, or less, at some columns.

The softmax of what it leads to is the model's own, so a bias b multiplies the odds of a key by e^b, and a very negative
one hides it. It goes through the float mask of the model's fast kernel, so that no map is made, and it carries
gradients. Shapes: logits ``[B, H, T, S]``; rows and columns are places in a sequence, padding counted, the same for
every row of a batch.

    with manyheads.use(model, "logit_bias:columns=0-11,amount=2"):
        model(**inputs)  # everyone looks more at the first twelve tokens

Source: the common practice of prompt emphasis (attention steering); a column's weight w becomes
``w e^b / (1 + w (e^b - 1))``.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..call import AttentionCall, Site
from ..calls.edits import Heads, add_bias, heads_at
from ..strategy import AttentionEdit, Layers

__all__ = ["LogitBias"]


@dataclass(frozen=True, kw_only=True)
class LogitBias(AttentionEdit):
    """A bias on the logits of chosen rows and columns.

    Attributes:
        amount: nats added.
        columns, rows: places of keys and queries, as ``0-11+20``; all when not given.
        heads: which heads, as ``layer.head`` joined by ``+``; all when none is named.
    """

    amount: float = field(default=1.0, metadata={"help": "nats added to the logits; negative looks away"})
    columns: Layers = field(default=None, metadata={"help": "places of the keys, as 0-11+20; all when not given"})
    rows: Layers = field(default=None, metadata={"help": "places of the queries, likewise"})
    heads: Heads = field(default=(), metadata={"help": "heads as 3.1+4.2, layer.head; all when none is named"})

    def selects(self, site: Site) -> bool:
        return super().selects(site) and (not self.heads or bool(heads_at(self.heads, site)))

    def edit(self, call: AttentionCall) -> AttentionCall:
        (_, count, length, _), size = call.q.shape, call.k.shape[2]
        device = call.q.device
        start = 0 if call.site.kind == "cross" else size - length  # keys end where queries do
        rows = _among(torch.arange(start, start + length, device=device), self.rows)
        columns = _among(torch.arange(size, device=device), self.columns)
        bias = self.amount * (rows[:, None] & columns).to(call.q.dtype)[None, None]
        if self.heads:
            chosen = torch.zeros(count, device=device, dtype=call.q.dtype)
            chosen[heads_at(self.heads, call.site, count)] = 1
            bias = bias * chosen[None, :, None, None]
        return add_bias(call, bias)


def _among(places: Tensor, wanted: tuple[int, ...] | None) -> Tensor:
    """Which places are wanted, boolean."""
    if wanted is None:
        return torch.ones_like(places, dtype=torch.bool)
    return torch.isin(places, torch.tensor(wanted, device=places.device))
