# SPDX-License-Identifier: Apache-2.0
"""The strategies of open ports at one site, and their hooks on a call, in order."""

import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..call import AttentionCall
from ..strategy import AttentionCompute, AttentionEdit, AttentionPatch, AttentionWatch, Cache, Residual, Strategy

__all__ = ["BoundStrategy", "Forward", "HookChain", "recomputing"]


class Keeper:
    """The one thread that may run a strategy that keeps something, at all sites of a port together."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def taken(self) -> bool:
        """Whether another thread that still runs was here first; if not, it is this one's from now on."""
        here = threading.current_thread()
        if self._thread is here:
            return False
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = here
            return self._thread is not here


@dataclass(slots=True, eq=False)
class BoundStrategy:
    """One strategy of one open ``use`` at one site.

    Attributes:
        state: its scratch there.
        states: every scratch: one, or one for each place in a forward.
        current: that of the call at hand, another one only where a watching strategy tells calls apart.
        forward: of the model, for a watching strategy.
        places: for a watching strategy, by place in a forward, the number of the call in it and what it keeps there.
        keeper: one for all sites of a port.
    """

    owner: Any
    strategy: Strategy
    state: dict[str, Any] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(init=False)
    current: dict[str, Any] = field(init=False)
    forward: "Forward | None" = None
    places: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    watches: bool = field(init=False)  # what it keeps is of what it sees from call to call
    place: int = -1
    called: bool = False
    stored: bool = False
    keeper: Keeper = field(default_factory=Keeper)

    def __post_init__(self) -> None:
        self.current, self.states = self.state, [self.state]
        self.watches = isinstance(self.strategy, AttentionWatch | Residual)

    def enter(self) -> None:
        """A call of the site begins: choose the scratch that belongs to it."""
        if not self.called:
            self.called = True
        if self.forward is None:
            return
        if recomputing():
            self.current = {}
            return
        self.place = self.place + 1 if self.forward.running else 0
        if self.place == len(self.places):
            if self.place:
                self.states.append({})
            self.places.append((self.forward.calls, self.states[-1]))
        self.forward.calls += 1
        self.current = self.places[self.place][1]


@dataclass(slots=True, eq=False)
class Forward:
    """The forward that a model is in.

    Attributes:
        entries: what watches it.
        running: whether it is under way.
        calls: attention calls in it so far.
    """

    entries: list[BoundStrategy] = field(default_factory=list)
    running: bool = False
    calls: int = 0

    def begin(self, *_: Any) -> None:
        """The model is entered."""
        self.running, self.calls = True, 0
        for entry in self.entries:
            entry.place = -1

    def end(self, *_: Any) -> None:
        """The model is left, be it by an error."""
        self.running = False


def recomputing() -> bool:
    """Whether a backward pass is under way: what runs in it is what gradient checkpointing runs once more."""
    return torch._C._current_graph_task_id() != -1


class HookChain:
    """Bound strategies sorted once by the hooks that they implement, so that a call does not look them up.

    Attributes:
        has_hooks: a strategy acts on a call, beyond storing keys and values.
        has_changes: one edits a call or answers it.
        follower: the one strategy that acts, which watches and may take a token without a call.
    """

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
        watchers = [(e, s) for e, s in pairs if isinstance(s, AttentionWatch)]
        self._entered = [(e, s) for e, s in watchers if type(s).entering is not AttentionWatch.entering]
        self._after = [
            (e, s.patch if isinstance(s, AttentionPatch) else None, s.watch if isinstance(s, AttentionWatch) else None)
            for e, s in pairs
            if isinstance(s, (AttentionPatch, AttentionWatch))
        ]
        self.cache_strategy = next(((e, s) for e, s in reversed(pairs) if isinstance(s, Cache)), None)
        self.has_changes = bool(self._editors or self._attenders)
        self.has_hooks = self.has_changes or bool(self._after)
        alone = len(self._after) == len(watchers) == 1 and not self.has_changes
        self.follower = next((w for w in watchers if alone and type(w[1]).follow is not AttentionWatch.follow), None)

    def mark_called(self) -> None:
        """A call of the site begins."""
        for entry in self.entries:
            entry.enter()

    def entering(self, past: Any) -> None:
        """The module is about to run with the cache ``past``."""
        for entry, strategy in self._entered:
            for state in entry.states:
                strategy.entering(state, past)

    def state_of(self, entry: BoundStrategy) -> dict[str, Any] | None:
        """What a strategy keeps for the call at hand; None where it does not act on it."""
        return entry.current

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
            last = entry is self._after[-1][0]  # the call is no one else's any more: it needs no copy
            seen = call if last else call.replace(state=state)
            seen.state = state
            if patch is not None:
                out = patch(seen, out)
            if watch is not None:
                watch(seen, out)
        return out
