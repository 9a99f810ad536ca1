# SPDX-License-Identifier: Apache-2.0
"""The customization half of COMCAT: a thin branch beside the products of each head of a frozen cross-attention.

Of the products that :mod:`.comcat` factorises, a text-to-image model learns a new concept by a change of low rank r:

    logits of head i    x^T (W_Q^T W_K + A_Q^T A_K) c         A_Q [r, D], A_K [r, C]
    its output          (W_O W_V + A_O A_V) c, weighed        A_O [D, r], A_V [r, C]

for queries x of D and a caption c of C channels. That is attention with heads of d + r channels, so that attention
itself stays one call. A_K and A_O begin at zero, and the model as it was. 2 H r (D + C) numbers a layer are trained and
kept; the paper has r = 2.

Open in the text that we had: whether a branch is of each head, as here, or of all together. ``r`` of the logits and of
the output are one. Custom Diffusion's class images, and the learned vector of the new word, are not here.

    manyheads.recipes.new_object trains one, manyheads.integrations.adapted.adapted opens a denoiser with it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...conditioning import AdaptedSite, AttentionAdaptor, FrozenAttention
from ...errors import UserError

__all__ = ["HeadAdaptor", "HeadBranch"]


class HeadBranch(nn.Module):
    """Attention with ``rank`` more channels in every head."""

    def __init__(self, site: AdaptedSite, rank: int) -> None:
        super().__init__()
        wide = site.heads * rank
        self.q, self.o = nn.Linear(site.dim, wide, bias=False), nn.Linear(wide, site.dim, bias=False)
        self.k, self.v = (nn.Linear(site.context, wide, bias=False) for _ in range(2))
        nn.init.zeros_(self.k.weight)
        nn.init.zeros_(self.o.weight)

    def forward(self, frozen: FrozenAttention, x: Tensor, context: Tensor) -> Tensor:
        def heads(own: Tensor, added: Tensor) -> Tensor:
            parts = [part.unflatten(-1, (frozen.heads, -1)).transpose(1, 2) for part in (own, added)]
            return torch.cat(parts, -1)

        q = heads(frozen.q(x), self.q(x))
        k, v = heads(frozen.k(context), self.k(context)), heads(frozen.v(context), self.v(context))
        y = scaled_dot_product_attention(q, k, v, scale=frozen.scale).transpose(1, 2)
        rank = self.o.in_features // frozen.heads
        out: Tensor = frozen.out(y[..., :-rank].flatten(2)) + self.o(y[..., -rank:].flatten(2))
        return out


@dataclass(frozen=True, kw_only=True)
class HeadAdaptor(AttentionAdaptor):
    """See the head of this file."""

    rank: int = field(default=2, metadata={"help": "of the change of each product of a head"})

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank is at least 1, not {self.rank}")

    def branches(self, sites: Mapping[str, AdaptedSite]) -> dict[str, nn.Module]:
        return {name: HeadBranch(site, self.rank) for name, site in sites.items()}
