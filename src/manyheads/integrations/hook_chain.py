# SPDX-License-Identifier: Apache-2.0
"""The strategies of open ports at one site, and their hooks on a call, in order."""

import threading
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..call import AttentionCall
from ..strategy import AttentionCompute, AttentionEdit, AttentionPatch, AttentionWatch, Cache, Strategy

__all__ = ["BoundStrategy", "HookChain"]


@dataclass(slots=True, eq=False)
class BoundStrategy:
    """One strategy of one open ``use`` at one site."""

    owner: Any
    strategy: Strategy
    state: dict[str, Any] = field(default_factory=dict)
    called: bool = False
    stored: bool = False
    thread: threading.Thread | None = None  # that runs it, where it keeps something


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
        pairs = [(entry, entry.strategy) for entry in self.entries]
        self._editors = [(e, s) for e, s in pairs if isinstance(s, AttentionEdit)]
        self._attenders = [(e, s) for e, s in pairs if isinstance(s, AttentionCompute)]
        self._after = [
            (e, s.patch if isinstance(s, AttentionPatch) else None, s.watch if isinstance(s, AttentionWatch) else None)
            for e, s in pairs
            if isinstance(s, (AttentionPatch, AttentionWatch))
        ]
        self.cache_strategy = next(((e, s) for e, s in reversed(pairs) if isinstance(s, Cache)), None)

    @property
    def has_hooks(self) -> bool:
        """Whether a strategy acts on a call, beyond storing keys and values."""
        # Counted, since Dynamo of torch 2.11 cannot trace bool(list).
        return len(self._editors) + len(self._attenders) + len(self._after) > 0

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
        for entry, strategy in self._editors:
            if (state := self.state_of(entry)) is not None:
                call = strategy.edit(call.replace(state=state))
        return call

    def attend(self, call: AttentionCall) -> Tensor | None:
        """The output ``[B, T, H, dv]`` of the one strategy that computes it, None if none does."""
        for entry, strategy in self._attenders:
            if (state := self.state_of(entry)) is not None:
                return strategy.attend(call.replace(state=state))
        return None

    def after(self, call: AttentionCall, out: Tensor) -> Tensor:
        """The output after every ``patch``; ``watch`` sees it as it is at its place."""
        for entry, patch, watch in self._after:
            if (state := self.state_of(entry)) is None:
                continue
            seen = call.replace(state=state)
            if patch is not None:
                out = patch(seen, out)
            if watch is not None:
                watch(seen, out)
        return out
