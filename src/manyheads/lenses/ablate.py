# SPDX-License-Identifier: Apache-2.0
"""Ablates heads, or scales them: the causal check of every score of heads.

What a head wrote can be replaced by nothing (``zero``), by its own mean over the tokens of the row (``mean``), by the
value of the first token, as if it attended to nothing else (``bos``), or be multiplied (``scale``). A query ablated by
``bos`` in a decoding step looks at the first key that is held.

    with manyheads.use(model, "ablate:heads=3.1+4.2"):
        model(**inputs)

The control of an ablation is the same number of random heads of the same layers: `manyheads.heads.layer_matched_heads`.
Shapes: outputs of heads ``[B, T, H, dv]``. Source: the common practice of the papers of this category; zeroing a head's
output before the output projection is the same as zeroing its slice of that projection.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..attention.reference import repeat_kv
from ..call import AttentionCall, Site
from ..calls.edits import Heads, heads_at, replace_heads, scale_heads
from ..strategy import AttentionPatch

__all__ = ["Ablate"]


@dataclass(frozen=True, kw_only=True)
class Ablate(AttentionPatch):
    """Heads ablated while a model is in use.

    Attributes:
        heads: which, as ``layer.head`` joined by ``+``.
        by: what replaces their outputs.
        factor: of ``by=scale``.
    """

    heads: Heads = field(default=(), metadata={"help": "heads as 3.1+4.2: layer.head, joined by +"})
    by: Literal["zero", "mean", "bos", "scale"] = field(
        default="zero", metadata={"help": "what their outputs become: zero, their mean, the first value, or scaled"}
    )
    factor: float = field(default=0.5, metadata={"help": "with by=scale: times what"})

    def selects(self, site: Site) -> bool:
        return super().selects(site) and bool(heads_at(self.heads, site))

    def patch(self, call: AttentionCall, out: Tensor) -> Tensor:
        heads = heads_at(self.heads, call.site, out.shape[2])
        if self.by in ("zero", "scale"):
            factor = torch.ones(out.shape[2], device=out.device)
            factor[heads] = 0.0 if self.by == "zero" else self.factor
            return scale_heads(out, factor)
        if self.by == "bos":
            seen = call.mask
            first = torch.zeros(out.shape[0], dtype=torch.long, device=out.device)
            if seen is not None:  # the first key that any query of the row sees
                first = seen.any(1).any(1).long().argmax(-1).expand(out.shape[0])
            values = repeat_kv(call.v, out.shape[2])[torch.arange(out.shape[0], device=out.device), :, first]
            return replace_heads(out, heads, values[:, None, heads])
        return replace_heads(out, heads, out[:, :, heads].mean(1, keepdim=True))
