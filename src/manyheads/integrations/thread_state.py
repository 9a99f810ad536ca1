# SPDX-License-Identifier: Apache-2.0
"""What an attention module's forward leaves for its attention function, which is called in the midst of it."""

import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..call import Store

__all__ = ["Running", "ThreadState"]


@dataclass(slots=True)
class Running:
    """What one forward of a module has found so far."""

    store: Store | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    hidden: Tensor | None = None  # that the module was given
    past: Cache | None = None  # of the sequence that the queries belong to
    lent: bool = False  # keys of another layer, that a store of ours holds
    compiling: bool = False  # torch traces it

    def clear(self) -> None:
        """Its attention is computed: an open port does not keep a cache alive."""
        self.store = self.rotary = self.hidden = self.past = None


class ThreadState:
    """The forward that a module is in, for each thread its own.

    torch.compile cannot trace what belongs to a thread: there it is one for all, as the compiled code is, and what
    begins outside of it is left for it to find.
    """

    def __init__(self) -> None:
        self._here = threading.local()
        self._shared = Running()

    def begin(self) -> Running:
        """A forward begins in this thread."""
        if torch.compiler.is_compiling():
            self._shared.clear()
            self._shared.lent, self._shared.compiling = False, True
            return self._shared
        self._here.running = self._shared = Running()
        return self._shared

    @property
    def now(self) -> Running:
        """The forward that this thread is in."""
        if torch.compiler.is_compiling():
            self._shared.compiling = True
            return self._shared
        return getattr(self._here, "running", self._shared)
