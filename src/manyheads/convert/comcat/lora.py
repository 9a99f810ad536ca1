# SPDX-License-Identifier: Apache-2.0
"""What the adaptor of COMCAT is compared with: LoRA, and Custom Diffusion's new keys and values.

LoRA (arXiv 2106.09685) adds ``B A`` of rank ``rank`` to each projection of a cross-attention, B at zero first. With
``rank=0`` the whole matrices of ``parts`` are trained, which for ``parts=kv`` are the weights that Custom Diffusion
(arXiv 2212.04488) trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ...conditioning import AdaptedSite, AttentionAdaptor, FrozenAttention
from ...errors import UserError

__all__ = ["LoRAAdaptor", "LoRABranch"]


class LoRABranch(nn.Module):
    """Attention whose projections ``parts`` have a change added."""

    def __init__(self, site: AdaptedSite, rank: int, parts: str) -> None:
        super().__init__()
        wide = site.heads * site.head_dim
        shapes = {"q": (site.dim, wide), "k": (site.context, wide), "v": (site.context, wide), "o": (wide, site.dim)}
        self.changes = nn.ModuleDict()
        for part in parts:
            inside, out = shapes[part]
            last = nn.Linear(rank or inside, out, bias=False)
            nn.init.zeros_(last.weight)
            self.changes[part] = nn.Sequential(nn.Linear(inside, rank, bias=False), last) if rank else last

    def forward(self, frozen: FrozenAttention, x: Tensor, context: Tensor) -> Tensor:
        def changed(part: str, own: Tensor, read: Tensor) -> Tensor:
            return own + self.changes[part](read) if part in self.changes else own

        whole = changed("q", frozen.q(x), x), changed("k", frozen.k(context), context)
        q, k, v = (
            part.unflatten(-1, (frozen.heads, -1)).transpose(1, 2)
            for part in (*whole, changed("v", frozen.v(context), context))
        )
        y = scaled_dot_product_attention(q, k, v, scale=frozen.scale).transpose(1, 2).flatten(2)
        return changed("o", frozen.out(y), y)


@dataclass(frozen=True, kw_only=True)
class LoRAAdaptor(AttentionAdaptor):
    """See the head of this file."""

    rank: int = field(default=4, metadata={"help": "of the change of each projection; 0: whole matrices"})
    parts: str = field(default="qkvo", metadata={"help": "projections that are changed, of q, k, v and o"})

    def __post_init__(self) -> None:
        if self.rank < 0 or not self.parts or set(self.parts) - set("qkvo") or len(set(self.parts)) < len(self.parts):
            raise UserError(f"rank is 0 or more, and parts are of q, k, v and o, each once, not {self.parts!r}")

    def branches(self, sites: Mapping[str, AdaptedSite]) -> dict[str, nn.Module]:
        return {name: LoRABranch(site, self.rank, self.parts) for name, site in sites.items()}
