# SPDX-License-Identifier: Apache-2.0
"""Whether strategies acted in every run, and not only once: counted at each attention module, looked at on closing."""

import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..call import Site
from ..errors import UserError
from ..strategy import Cache
from .hook_chain import BoundStrategy, recomputing

__all__ = ["Passes", "in_one_thread", "missed", "stack_of"]


@dataclass(slots=True)
class Passes:
    """What has happened at one attention module. Compiled code is not counted: replays of it do not come by here.

    Attributes:
        entered: forwards of the module.
        ran: attention computations that came to the port.
        stored: those of a store of ours.
    """

    entered: int = 0
    ran: int = 0
    stored: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def enter(self) -> None:
        """The module is called."""
        with self._lock:
            self.entered += 1

    def run(self, stored: bool) -> None:
        """Its attention comes to the port."""
        with self._lock:
            self.ran += 1
            self.stored += stored

    def since(self, before: "Passes") -> "Passes":
        """What has happened after ``before``."""
        return Passes(
            self.entered - before.entered, self.ran - before.ran, self.stored - before.stored
        )  # fmt: skip

    def copy(self) -> "Passes":
        return self.since(Passes())


def in_one_thread(entries: Iterable[BoundStrategy]) -> None:
    """Refuse a second thread at strategies that keep something from call to call: it would mix two sequences.

    Caches keep theirs with the sequence, and strategies without memory nothing: any number of threads may run. Looked
    at before a call and after it, in which a strategy may keep something for the first time.
    """
    for entry in entries:
        if (entry.state or entry.watches) and not recomputing() and entry.keeper.taken():
            raise UserError(
                f"{entry.strategy.spec} keeps what it sees from call to call and was called in two threads: run the "
                "model in one thread, or in one after the other has ended"
            )


def stack_of(name: str) -> str:
    """What the attention modules of one stack of blocks have in common: their path without numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def missed(done: Sequence[tuple[Site, BoundStrategy, Passes]]) -> list[str]:
    """Sentences on where the strategies of a port did not act in every run; none where they did.

    Layers of one stack of blocks run equally often; a part of the model that was not needed is no fault.
    """
    said: dict[tuple[int, str], str] = {}  # once for a strategy, whatever the number of its sites
    stacks: dict[tuple[int, str], tuple[int, str]] = {}
    for site, entry, passes in done:
        strategy, one = entry.strategy, id(entry.strategy)
        if not passes.entered:
            continue
        if passes.ran < passes.entered:
            said.setdefault(
                (one, "passed"),
                f"{strategy.spec} acted in {passes.ran} of {passes.entered} runs of {site.name}; in the others its "
                "attention did not reach the port: it failed, or attn_implementation was set inside the block",
            )
        if isinstance(strategy, Cache) and 0 < passes.stored < passes.ran:
            said.setdefault(
                (one, "stored"),
                f"{strategy.spec} kept the cache in {passes.stored} of {passes.ran} runs of {site.name}; the others "
                "ran without a cache",
            )
        most, there = stacks.setdefault((one, stack_of(site.name)), (passes.ran, site.name))
        if passes.ran != most:
            said.setdefault(
                (one, "layers"),
                f"{strategy.spec} acted {passes.ran} times at {site.name} and {most} times at {there}: not "
                "every run went through all layers",
            )
    return list(said.values())
