# SPDX-License-Identifier: Apache-2.0
"""Store every token in 8-bit floats, as servers do: the plain baseline of caches in few bits.

Nothing is dropped, nothing kept in the model's dtype, and no channel scaled. A vector is stored as e4m3 with one scale
for each token and head; servers with one scale for a whole layer lose more to outlying tokens.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from ..attention.budget import Budget
from ..attention.codec import KVCodec, kv_codec
from ..call import Site
from ..errors import UserError
from ._store import PolicyStore
from ._strategy import EvictionStrategy

__all__ = ["FP8"]


@dataclass(frozen=True, kw_only=True)
class FP8(EvictionStrategy):
    """Every token, in d bytes and 2 of scale for a vector of d channels; sliding-window layers stay as they are."""

    has_budget: ClassVar[bool] = False

    budget: Budget = field(default=1.0, metadata={"help": "always 1.0"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget != 1.0 or isinstance(self.budget, int):
            raise UserError(f"fp8 keeps every token: its budget is 1.0, not {self.budget}")

    @property
    def lossless(self) -> bool:
        return False

    @property
    def codec(self) -> KVCodec:
        return kv_codec("fp8")

    def store(self, site: Site) -> PolicyStore:
        if site.latent is not None:
            raise UserError(f"fp8 cannot store {site.name}: its cache holds latents")
        return super().store(site)
