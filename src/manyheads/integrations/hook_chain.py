# SPDX-License-Identifier: Apache-2.0
"""The strategies of open ports at one site, and their hooks on a call, in order."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..call import AttentionCall
from ..strategy import Strategy, overrides

__all__ = ["BoundStrategy", "HookChain"]


@dataclass(slots=True, eq=False)
class BoundStrategy:
    """One strategy of one open ``use`` at one site."""

    owner: Any
    strategy: Strategy
    state: dict[str, Any] = field(default_factory=dict)
    called: bool = False
    stored: bool = False


class HookChain:
    """Bound strategies sorted once by the hooks that they implement, so that a call does not look them up."""

    def __init__(self) -> None:
        self.entries: list[BoundStrategy] = []
        self._sort()

    def add(self, entries: list[BoundStrategy]) -> None:
        """Append the entries of one more port."""
        self.entries = self.entries + entries
        self._sort()

    def remove(self, owner: Any) -> None:
        """Take out the entries of a port that closes."""
        self.entries = [entry for entry in self.entries if entry.owner is not owner]
        self._sort()

    def _sort(self) -> None:
        having = {m: [e for e in self.entries if overrides(e.strategy, m)] for m in ("edit", "attend", "store")}
        self._editors = having["edit"]
        self._attenders = having["attend"]
        self.cache_strategy = having["store"][-1] if having["store"] else None
        self._after = [
            (e, overrides(e.strategy, "patch"), overrides(e.strategy, "watch"))
            for e in self.entries
            if overrides(e.strategy, "patch") or overrides(e.strategy, "watch")
        ]

    @property
    def has_hooks(self) -> bool:
        """Whether a strategy acts on a call, beyond storing keys and values."""
        return bool(self._editors or self._attenders or self._after)

    def mark_called(self) -> None:
        """Note that the site was called."""
        for entry in self.entries:
            if not entry.called:
                entry.called = True

    def state_of(self, entry: BoundStrategy) -> dict[str, Any] | None:
        """What a strategy keeps for the call at hand; None where it does not act on it."""
        return entry.state

    def edit(self, call: AttentionCall) -> AttentionCall:
        """The call after every ``edit``; the same object if nothing changed it."""
        for entry in self._editors:
            if (state := self.state_of(entry)) is not None:
                call = entry.strategy.edit(call.replace(state=state))
        return call

    def attend(self, call: AttentionCall) -> Tensor | None:
        """The output ``[B, T, H, dv]`` of the one strategy that computes it, None if none does."""
        for entry in self._attenders:
            if (state := self.state_of(entry)) is not None:
                return entry.strategy.attend(call.replace(state=state))
        return None

    def after(self, call: AttentionCall, out: Tensor) -> Tensor:
        """The output after every ``patch``; ``watch`` sees it as it is at its place."""
        for entry, patches, watches in self._after:
            if (state := self.state_of(entry)) is None:
                continue
            seen = call.replace(state=state)
            if patches:
                out = entry.strategy.patch(seen, out)
            if watches:
                entry.strategy.watch(seen, out)
        return out
