# SPDX-License-Identifier: Apache-2.0
"""Memory that a computation leaves behind, on any device: the storages it made that are still alive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Held"]


class Held(TorchDispatchMode):
    """Notes every storage that is made within a ``with`` block, without keeping it alive."""

    def __init__(self, *before: Tensor) -> None:
        """Do not count storages that were there before."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._before = {x.untyped_storage()._cdata for x in before}
        self._made: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                at = storage._cdata
                known = self._made.get(at)
                if at not in self._before and (known is None or known[0].expired()):
                    self._made[at] = StorageWeakRef(storage), storage.nbytes()
        return out

    @property
    def nbytes(self) -> int:
        """Bytes of those that are still alive."""
        return sum(size for reference, size in self._made.values() if not reference.expired())
