# SPDX-License-Identifier: Apache-2.0
"""Processes for tasks: a pool that is started once and stays up, or those that torchrun has started.

    pool = processes(run, 4, "gloo")
    found = pool.run(function, *args)  # function(world, *args) of each process, by rank

Under torchrun the first process runs the experiment, all others :func:`serve`.
"""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist

from ...errors import UserError
from ...experiment import RunContext
from ...parallel import Processes, World

__all__ = ["Pool", "leads", "processes", "serve", "size", "started"]

_DAY = timedelta(days=1)  # for which others wait while the first one plans


class Pool(Protocol):
    """What runs a function in each process."""

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(world, *args)`` gives in each process, by rank, as by :class:`.Processes`."""


class _Started:
    """A pool that is opened at its first call, and again after a call that failed; it ends with its run."""

    def __init__(self, size: int, backend: str, limit: float) -> None:
        self._given = size, backend, limit
        self._open: tuple[Processes, Callable[[], Any]] | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        if self._open is None:
            size, backend, limit = self._given
            stack = ExitStack()
            made = stack.enter_context(Processes(size, backend, limit=limit))
            self._open = made, weakref.finalize(self, stack.close)
        try:
            return self._open[0].run(function, *args)
        except BaseException:
            close, self._open = self._open[1], None
            close()
            raise


class _Present:
    """The processes of torchrun, of which this is the first."""

    def __init__(self, backend: str) -> None:
        self._world, self._talk = _joined(backend)
        weakref.finalize(self, _dismiss, self._talk)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        dist.broadcast_object_list([(function, args)], 0, self._talk)
        return _answered(self._world, self._talk, function, args)


def processes(run: RunContext, ranks: int, backend: str, limit: float = 300.0) -> Pool:
    """So many processes, the same ones for a whole run.

    Args:
        run: keeps them.
        ranks: how many.
        backend: ``gloo`` or ``nccl``.
        limit: seconds that a call may take; under torchrun calls have no limit.

    Raises:
        UserError: torchrun has started another number of them.
    """
    if not started():
        pool: Pool = run.kept(("processes", ranks, backend, limit), lambda: _Started(ranks, backend, limit))
        return pool
    here = size(backend)
    if ranks != here:
        raise UserError(f"torchrun has started {here} processes, not {ranks}: give --world {here}, or leave it away")
    present: Pool = run.kept(("processes", backend), lambda: _Present(backend))
    return present


def started() -> bool:
    """Whether torchrun has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def size(backend: str) -> int:
    """How many processes torchrun has started."""
    return _joined(backend)[0].size


def leads(backend: str) -> bool:
    """Whether this process runs the experiment: the only one, or torchrun's first."""
    return not started() or _joined(backend)[0].rank == 0


def serve(backend: str) -> None:
    """Run what the first process of torchrun asks for, until it ends."""
    world, talk = _joined(backend)
    while True:
        asked: list[Any] = [None]
        dist.broadcast_object_list(asked, 0, talk)
        if asked[0] is None:
            return
        _answered(world, talk, *asked[0])


@cache
def _joined(backend: str) -> tuple[World, dist.ProcessGroup]:
    if backend == "nccl":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group(backend)
    return World(), dist.new_group(backend="gloo", timeout=_DAY)


def _answered(world: World, talk: dist.ProcessGroup, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
    """What each process found, in the first of them; whose error is raised there and in the one that met it."""
    error: Exception | None = None
    found = None
    try:
        found = function(world, *args)
    except UserError as met:
        error = met
    except Exception:
        error = RuntimeError(f"process {world.rank}:\n{traceback.format_exc()}")
    every: list[Any] | None = [None] * world.size if world.rank == 0 else None
    dist.gather_object((error, found), every, 0, talk)
    for failure, _ in every or [(error, None)]:
        if failure is not None:
            raise failure
    return [one for _, one in every or ()]


def _dismiss(talk: dist.ProcessGroup) -> None:
    dist.broadcast_object_list([None], 0, talk)
