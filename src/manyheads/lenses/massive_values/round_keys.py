# SPDX-License-Identifier: Apache-2.0
"""Keys rounded to few bits, with the massive channels kept exact or not: what quantisation costs through them.

*Massive Values in Self-Attention Modules are the Key to Contextual Knowledge Understanding* (arXiv 2502.01563) finds
that methods of quantisation that leave massive values intact (AWQ, SmoothQuant) keep what is read from the prompt,
others less. Here is the mechanism alone, round to nearest of the keys as attention sees them:

    s_t = max_j |K_tj| / (2^(bits - 1) - 1)          K_tj -> s_t round(K_tj / s_t),

one scale for each token and head over the channels that are rounded (``per=token``), or one for each channel over the
tokens (``per=channel``). ``keep`` leaves ``channels`` of each head as they are: the largest by norm over the tokens,
the smallest, or random ones. As many channels are kept whichever they are, so that arms with one ``channels`` have
equal bits. A massive channel sets the scale of its token: kept, it makes the step of all the others smaller.

Nothing is saved: the cache holds whole keys, and they are rounded whenever they are looked at. Shapes: keys
``[B, Hkv, S, d]``.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...call import AttentionCall
from ...errors import UserError
from ...strategy import AttentionEdit

__all__ = ["RoundKeys"]


@dataclass(frozen=True, kw_only=True)
class RoundKeys(AttentionEdit):
    """Keys of self-attention rounded to nearest while a model is in use."""

    bits: int = field(default=3, metadata={"help": "of a rounded number, its sign counted"})
    per: Literal["token", "channel"] = field(default="token", metadata={"help": "what has a scale of its own"})
    keep: Literal["top", "random", "bottom"] = field(default="top", metadata={"help": "which channels stay exact"})
    channels: int = field(default=0, metadata={"help": "channels of each head that stay exact"})
    seed: int = field(default=0, metadata={"help": "of keep=random"})

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.channels < 0:
            raise UserError("massive_values.round_keys needs bits from 2 to 8 and channels of 0 or more")

    def edit(self, call: AttentionCall) -> AttentionCall:
        if call.site.kind == "cross":
            return call
        seen = None if call.mask is None else call.mask.any(1).any(1)  # keys that anyone sees are no padding
        return call.replace(k=self._rounded(call.k, seen, call.site.index))

    def _rounded(self, k: Tensor, seen: Tensor | None, salt: int) -> Tensor:
        heads, dim = k.shape[1], k.shape[3]
        if self.channels >= dim:
            raise UserError(f"heads have {dim} channels: channels={self.channels} leaves nothing to round")
        exact = k.float()
        known = exact if seen is None else exact.masked_fill(~seen[:, None, :, None], 0)
        if self.keep == "random":  # the same in every row, so that a batch is its rows
            generator = torch.Generator().manual_seed(1_000_003 * self.seed + salt)
            order = torch.rand(heads, dim, generator=generator).argsort(-1).to(k.device).expand(len(k), -1, -1)
        else:
            order = known.square().sum(2).argsort(dim=-1, descending=self.keep == "top", stable=True)
        kept = torch.zeros(len(k), heads, dim, dtype=torch.bool, device=k.device)
        kept = kept.scatter(2, order[..., : self.channels], True)[:, :, None]
        rounded = known.masked_fill(kept, 0)
        largest = rounded.abs().amax(3 if self.per == "token" else 2, keepdim=True)
        scale = (largest / (2 ** (self.bits - 1) - 1)).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.where(kept, exact, (known / scale).round() * scale).to(k.dtype)
