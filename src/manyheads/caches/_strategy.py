# SPDX-License-Identifier: Apache-2.0
"""The base of the eviction strategies: a policy and the store that carries it out."""

from dataclasses import dataclass

from ..call import Site
from ._policy import CachePolicy
from ._store import PolicyStore

__all__ = ["EvictionStrategy"]


@dataclass(frozen=True, kw_only=True)
class EvictionStrategy(CachePolicy):
    """Base of the strategies that keep what :class:`CachePolicy` says in a :class:`PolicyStore`."""

    def store(self, site: Site) -> PolicyStore:
        return PolicyStore(self, site)
