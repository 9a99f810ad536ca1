# SPDX-License-Identifier: Apache-2.0
"""Ablates heads, or scales them: the causal check of every score of heads.

What a head wrote can be replaced by nothing (``zero``), by its own mean over the tokens of the row (``mean``), by the
value of the first token, as if it attended to nothing else (``bos``), or be multiplied (``scale``).

All act while a model generates, too. Behind a cache ``mean`` is that of all tokens of the row so far, the one at hand
among them: a prompt's tokens all get the mean over the prompt, each later token that of what has come. Padding counts
in no mean. A query ablated by ``bos`` in a decoding step looks at the first key that is held.

    with manyheads.use(model, "ablate:heads=3.1+4.2"):
        model(**inputs)

The control of an ablation is the same number of random heads of the same layers: `manyheads.heads.layer_matched_heads`.
Shapes: outputs of heads ``[B, T, H, dv]``. Source: the common practice of the papers of this category; zeroing a head's
output before the output projection is the same as zeroing its slice of that projection.
"""

import weakref
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
        return replace_heads(out, heads, _mean_so_far(call, out[:, :, heads]))


def _mean_so_far(call: AttentionCall, out: Tensor) -> Tensor:
    """Mean ``[B, 1, n, dv]`` over the tokens of each row in this call and, behind a cache, in those before it."""
    tokens = out.new_ones(*out.shape[:2], 1, 1)
    if call.mask is not None and call.site.kind == "self":
        size, length = call.k.shape[2], call.q.shape[2]
        seen = call.mask.any(1).expand(len(out), -1, -1)  # [B, T or 1, S]; a query sees itself unless it is padding
        row = torch.arange(length, device=out.device)
        tokens = seen[:, row if seen.shape[1] > 1 else row * 0, row + size - length][..., None, None].to(out.dtype)
    total, count = (out * tokens).float().sum(1, keepdim=True), tokens.float().sum(1, keepdim=True)
    before = call.state.get("so far")
    if before is not None and int(call.step) and before[0]() is call.past and before[1] == int(call.step):
        total, count = total + before[2], count + before[3]
    if call.past is not None:
        end = int(call.step) + call.q.shape[2]
        call.state["so far"] = weakref.ref(call.past), end, total.detach(), count.detach()
    return total / count.clamp(min=1)
