# SPDX-License-Identifier: Apache-2.0
"""The base of the eviction strategies: a policy and the store that carries it out."""

from dataclasses import dataclass, field

from ..call import Site
from ..errors import UserError
from ._policy import CachePolicy
from ._store import PolicyStore

__all__ = ["EvictionStrategy", "LastQueries"]


@dataclass(frozen=True, kw_only=True)
class EvictionStrategy(CachePolicy):
    """Base of the strategies that keep what :class:`CachePolicy` says in a :class:`PolicyStore`."""

    def store(self, site: Site) -> PolicyStore:
        return PolicyStore(self, site)


@dataclass(frozen=True, kw_only=True)
class LastQueries(EvictionStrategy):
    """Base of the strategies in which the last queries vote, whose own keys stay.

    Attributes:
        window_size: queries that vote; their own keys are never dropped.
    """

    window_size: int = field(default=32, metadata={"help": "last queries that vote, kept themselves"})

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise UserError(f"{self.slug}: window_size counts queries and is at least 1")
        object.__setattr__(self, "recent", max(self.recent, self.window_size))
        super().__post_init__()

    @property
    def window(self) -> int:
        return self.window_size
