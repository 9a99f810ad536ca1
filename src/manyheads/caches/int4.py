# SPDX-License-Identifier: Apache-2.0
"""Store every token in four bits: the plain baseline of caches in few bits, of keys and values or of latents (MLA).

Nothing is dropped, nothing kept in the model's dtype, and no channel scaled. Symmetric INT4 with a bfloat16 scale for
each group of channels of a token and head: 4.5 bits a number in groups of 32. What a cache of latents keeps, the latent
and its rotary key, is stored alike; the module expands what is read back. Sliding-window layers stay as they are.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention.codec import INT4
from ..call import AttentionCall, Site, Store
from ..errors import UserError
from ..strategy import Cache

__all__ = ["Int4"]


@dataclass(frozen=True, kw_only=True)
class Int4(Cache):
    """Every token in four bits.

    Attributes:
        group: channels that share a scale; a head with fewer, or the rest of one, is filled up with zeros.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self"})

    group: int = field(default=32, metadata={"help": "channels that share a scale, an even number"})

    def __post_init__(self) -> None:
        if self.group < 2 or self.group % 2:
            raise UserError(f"int4: group is an even number of channels, 2 or more, not {self.group}")

    def selects(self, site: Site) -> bool:
        return super().selects(site) and site.causal and site.window is None

    def store(self, site: Site) -> "Int4Store":
        return Int4Store(self, site)


class Int4Store(Store):
    """Codes and scales of one layer, for keys and for values: ``[B, Hs, S, n, g / 2]`` and ``[B, Hs, S, n]``."""

    def __init__(self, strategy: Int4, site: Site) -> None:
        super().__init__(site)
        self.size = strategy.group
        self.reset()

    def reset(self) -> None:
        self._held: list[tuple[Tensor, Tensor]] = []
        self._widths = [0, 0]
        self._dtype = torch.float32

    @property
    def seen(self) -> int:
        return self._held[0][0].shape[2] if self._held else 0

    @property
    def rows(self) -> int | None:
        return self._held[0][0].shape[0] if self._held else None

    @property
    def keys(self) -> Tensor | None:
        return self._read(0) if self._held else None

    @property
    def values(self) -> Tensor | None:
        return self._read(1) if self._held else None

    @property
    def held(self) -> list[Tensor | None]:
        return [x for pair in self._held for x in pair]

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take the next T tokens; return all of them as they are read back."""
        new = [self._encoded(x) for x in (k, v)]
        self._widths, self._dtype = [k.shape[-1], v.shape[-1]], k.dtype
        if self._held:
            new = [
                (torch.cat([old[0], made[0]], 2), torch.cat([old[1], made[1]], 2))
                for old, made in zip(self._held, new, strict=True)
            ]
        self._held = new
        return self._read(0), self._read(1)

    def mask(self, call: AttentionCall) -> AttentionCall:
        """Nothing is dropped: the model's own mask holds."""
        return call

    def evict(self, call: AttentionCall) -> None:
        """Nothing is dropped."""

    def reorder(self, rows: Tensor) -> None:
        self._held = [(codes[rows.to(codes.device)], scale[rows.to(scale.device)]) for codes, scale in self._held]

    def crop(self, count: int) -> None:
        end = max(0, self.seen - count)
        self._held = [(codes[:, :, :end].clone(), scale[:, :, :end].clone()) for codes, scale in self._held]

    def state_dict(self) -> dict[str, Any]:
        return {"held": self._held, "widths": self._widths, "dtype": self._dtype}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._held, self._widths, self._dtype = state["held"], state["widths"], state["dtype"]

    def _encoded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        width = x.shape[-1]
        size = min(self.size, width + width % 2)
        return INT4.encode(pad(x, (0, -width % size)).unflatten(-1, (-1, size)))

    def _read(self, which: int) -> Tensor:
        codes, scale = self._held[which]
        return INT4.decode(codes, scale, self._dtype).flatten(-2)[..., : self._widths[which]]
