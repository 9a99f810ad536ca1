# SPDX-License-Identifier: Apache-2.0
"""Makes chosen heads sharper or more even: their logits are divided by a temperature.

    with manyheads.use(model, "head_temperature:heads=3.1+4.2,temperature=0.5"):
        model.generate(**inputs)

``softmax(scale q k^T / temperature)``: below 1 a head attends to fewer keys, above 1 to more, and at 1 nothing changes.
The queries are divided, before a cap on the logits (Gemma 2) where there is one; biases and learned sinks stay as they
are. It acts on prompts and on every token that is generated, behind caches of any kind. Shapes: queries
``[B, H, T, d]``. Source: the temperature of a softmax, per head as in the learned ones of Swin v2 (arXiv 2111.09883).
"""

from dataclasses import dataclass, field

import torch

from ..call import AttentionCall, Site
from ..calls.edits import Heads, heads_at
from ..errors import UserError
from ..strategy import AttentionEdit

__all__ = ["HeadTemperature"]


@dataclass(frozen=True, kw_only=True)
class HeadTemperature(AttentionEdit):
    """Logits of chosen heads divided by a temperature.

    Attributes:
        heads: which, as ``layer.head`` joined by ``+``.
        temperature: above 0.
    """

    heads: Heads = field(default=(), metadata={"help": "heads as 3.1+4.2: layer.head, joined by +"})
    temperature: float = field(default=0.5, metadata={"help": "their logits are divided by it: below 1 is sharper"})

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"head_temperature: the temperature is above 0, not {self.temperature}")

    def selects(self, site: Site) -> bool:
        return super().selects(site) and bool(heads_at(self.heads, site))

    def edit(self, call: AttentionCall) -> AttentionCall:
        heads = heads_at(self.heads, call.site, call.q.shape[1])
        by = torch.ones(call.q.shape[1], 1, 1, dtype=call.q.dtype, device=call.q.device)
        by[heads] = 1 / self.temperature
        return call.replace(q=call.q * by)
