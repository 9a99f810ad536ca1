# SPDX-License-Identifier: Apache-2.0
"""Processes of this machine that stay up and run what they are given, so that torch is loaded once for many tries.

    with Processes(4) as pool:
        found = pool.run(function, *args)  # function(world, *args) of each process, by rank

Where a program was started by torchrun there is no need of them.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from ..errors import UserError
from ..workers import started
from ._context import World

__all__ = ["Processes"]

_START = 60.0  # seconds that loading torch may take beyond the limit of a call


class Processes:
    """A group of processes with a :class:`World` each; opened by ``with``.

    Attributes:
        size: how many.
        backend: ``gloo`` on CPUs, ``nccl`` with a GPU for each.
    """

    def __init__(self, size: int, backend: str = "gloo", *, node: int = 0, limit: float = 60.0) -> None:
        """Start nothing yet.

        Args:
            size: processes.
            backend: of torch.distributed.
            node: processes that count as one machine; 0 for all.
            limit: seconds that a call of :meth:`run` may take.

        Raises:
            UserError: fewer GPUs than processes of nccl.
        """
        if size < 1:
            raise UserError(f"{size} processes share nothing: at least 1")
        if backend == "nccl" and torch.cuda.device_count() < size:
            raise UserError(f"nccl wants a GPU for each of {size} processes; here are {torch.cuda.device_count()}: "
                            "fewer processes, or gloo")  # fmt: skip
        self.size, self.backend, self.node, self.limit = size, backend, node, limit
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        meeting = Path(self._folder.name, "meeting").as_uri()
        for rank in range(self.size):
            mine, theirs = multiprocessing.Pipe()
            about = (theirs, rank, self.size, self.backend, self.node, meeting)
            self._processes.append(started(_work, about))
            theirs.close()
            self._pipes.append(mine)
        self._gather(_START + self.limit)  # each says when it is there
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            with suppress(OSError):  # it has ended
                pipe.send(None)
        for process in self._processes:
            process.join(5 if kind is None else 0)
            process.kill()
            process.join()
        self._pipes, self._processes = [], []
        if self._folder is not None:
            self._folder.cleanup()

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(world, *args)`` gives in each process, by rank.

        Args:
            function: of a module, that can be pickled, and so its arguments and what it gives.

        Raises:
            UserError: what a process raised of that kind.
            RuntimeError: a process raised something else, ended, or the limit has passed; all are ended then.
        """
        if not self._pipes:
            raise RuntimeError("the processes have not been started, or have ended: open them with `with`")
        for pipe in self._pipes:
            pipe.send((function, args))
        return self._gather(self.limit)

    def _gather(self, limit: float) -> list[Any]:
        """What each process sends next."""
        found: dict[int, Any] = {}
        until = time.monotonic() + limit
        while len(found) < self.size:
            pipes = {pipe: rank for rank, pipe in enumerate(self._pipes) if rank not in found}
            ready = wait(list(pipes), max(0.0, until - time.monotonic()))
            if not ready:
                self._end()
                missing = sorted(pipes.values())
                raise RuntimeError(f"processes {missing} did not finish within {limit:g} s")
            for pipe, rank in pipes.items():
                if pipe not in ready:
                    continue
                try:
                    error, found[rank] = pipe.recv()
                except EOFError:
                    error = RuntimeError(f"process {rank} ended")
                if error is not None:
                    self._end()
                    raise error
        return [found[rank] for rank in range(self.size)]

    def _end(self) -> None:
        for process in self._processes:
            process.kill()
        for pipe in self._pipes:
            pipe.close()
        self._pipes = []


def _work(pipe: Connection, rank: int, size: int, backend: str, node: int, meeting: str) -> None:
    """One process: runs what comes until nothing does. Sends an error or None, and what it found."""
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, meeting, timeout=timedelta(minutes=10), rank=rank, world_size=size)
    world = World(node)
    pipe.send((None, None))
    try:
        while (job := pipe.recv()) is not None:
            function, args = job
            try:
                pipe.send((None, function(world, *args)))
            except UserError as error:
                pipe.send((error, None))
            except BaseException:  # goes to the one who asked
                pipe.send((RuntimeError(f"process {rank}:\n{traceback.format_exc()}"), None))
    except EOFError:  # the one who asked has ended
        pass
    finally:
        dist.destroy_process_group()
