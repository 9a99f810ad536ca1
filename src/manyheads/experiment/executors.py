# SPDX-License-Identifier: Apache-2.0
"""Where units run: in this process, in local worker processes, or on an existing Ray cluster (extra ``[ray]``).

Units are independent and a unit's rows do not depend on where it ran, so that the results equal those of a serial run.
Units of a task that times something run one at a time, in this process, after all others.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UserError

if TYPE_CHECKING:
    from .design import Planned
    from .journal import Journal
    from .rows import Row, WorkUnit
    from .task import RunContext

__all__ = ["Executor", "Processes", "Ray", "Serial", "Told"]

Told = Callable[[float, str], None]  # part of the work that was done, and what is going on
_TRIES = 2  # times that a unit is given to a worker before the run stops
_work: dict[str, Any] = {}  # what a worker process was set up with; filled by `_set_up` in that process alone


class Executor(Protocol):
    """Does units and writes their rows to the journal."""

    def run(self, plan: Planned, made: RunContext, units: Sequence[WorkUnit], journal: Journal, told: Told) -> None: ...


class Serial:
    """In this process, in order; a unit that another process has done meanwhile is left out."""

    def run(self, plan: Planned, made: RunContext, units: Sequence[WorkUnit], journal: Journal, told: Told) -> None:
        from .runner import measure

        for unit in units:
            left = unit.cost
            if not journal.has(unit.key):
                told(0.0, unit.label)

                def advance(part: float, label: str = unit.label) -> None:
                    nonlocal left
                    part = min(part, left)
                    left -= part
                    told(part, label)

                made.advance = advance
                journal.add(unit.key, measure(plan, made, unit))
            told(left, "")


def _split(plan: Planned, units: Sequence[WorkUnit]) -> tuple[list[WorkUnit], list[WorkUnit]]:
    """Units that may run beside others, and those that may not."""
    alone = {task.key for task in plan.tasks if task.alone}
    return [unit for unit in units if unit.task not in alone], [unit for unit in units if unit.task in alone]


@dataclass(frozen=True)
class Processes:
    """In ``workers`` processes of this machine, each with its share of the cores; they share a GPU if there is one."""

    workers: int

    def run(self, plan: Planned, made: RunContext, units: Sequence[WorkUnit], journal: Journal, told: Told) -> None:
        """Spread the units; a worker that dies loses its unit, which is tried once more.

        Raises:
            UserError: a unit killed its worker twice.
        """
        beside, alone = _split(plan, units)
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        sent = (plan, made.seed, str(made.device), made.data, str(journal.folder), threads)
        waiting = [(unit, 1) for unit in beside]
        while waiting:
            lost = self._round([unit for unit, _ in waiting], sent, journal, told)
            tries = {unit.key: count for unit, count in waiting}
            waiting = [(unit, tries[unit.key] + 1) for unit in lost]
            if stuck := [unit for unit, count in waiting if count > _TRIES + self.workers]:
                raise UserError(
                    f"a worker died on {stuck[0].key} again and again, for want of memory perhaps; "
                    "run with fewer --workers, the finished units are kept"
                )
        Serial().run(plan, made, alone, journal, told)

    def _round(
        self, units: Sequence[WorkUnit], sent: tuple[Any, ...], journal: Journal, told: Told
    ) -> list[WorkUnit]:  # fmt: skip
        """Do the units in one pool; those that a dead worker left undone are returned."""
        pool = ProcessPoolExecutor(
            min(self.workers, len(units)), multiprocessing.get_context("spawn"), _set_up, sent
        )  # fmt: skip
        with pool:
            futures: dict[Future[list[Row]], WorkUnit] = {pool.submit(_do, unit): unit for unit in units}
            pending = set(futures)
            while pending:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in done:
                    unit = futures[future]
                    try:
                        rows = future.result()
                    except BrokenProcessPool:
                        return [unit for unit in units if not journal.has(unit.key)]
                    journal.add(unit.key, rows)
                    told(unit.cost, unit.label)
        return []


@dataclass(frozen=True)
class Ray:
    """On a Ray cluster: ``address`` as ``ray.init`` takes it, ``local`` for one of this machine.

    Every node must be able to load the subject by its name. A GPU is asked for when the run is on one.
    """

    address: str

    def run(self, plan: Planned, made: RunContext, units: Sequence[WorkUnit], journal: Journal, told: Told) -> None:
        """Spread the units; Ray itself tries a unit again whose worker dies.

        Raises:
            UserError: Ray is not installed, or the cluster cannot be reached.
        """
        try:
            import ray
        except ImportError:
            raise UserError("--ray needs Ray: pip install 'manyheads[ray]'") from None
        beside, alone = _split(plan, units)
        started = not ray.is_initialized()
        if started:
            try:
                ray.init(address=self.address, log_to_driver=False, include_dashboard=False)
            except Exception as error:
                raise UserError(f"no Ray cluster at {self.address} ({str(error).splitlines()[0]})") from error
        try:
            gpus = 1 if made.device.type == "cuda" else 0
            sent = ray.put((plan, made.seed, str(made.device), made.data, None, 1))
            remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_TRIES)(_set_up_and_do)
            futures = {remote.remote(sent, unit): unit for unit in beside}
            while futures:
                done, _ = ray.wait(list(futures), num_returns=1)
                unit = futures.pop(done[0])
                journal.add(unit.key, ray.get(done[0]))
                told(unit.cost, unit.label)
        finally:
            if started:
                ray.shutdown()
        Serial().run(plan, made, alone, journal, told)


def _set_up(
    plan: Planned, seed: int, device: str, data: Mapping[str, Any], folder: str | None, threads: int
) -> None:  # fmt: skip
    """Make this process ready for units: called once in each worker."""
    import torch

    from .runner import context

    torch.set_num_threads(threads)
    made = context(plan, seed, device, data, Path(folder) if folder else None)
    plan.subject.load(made.device)
    _work.update(plan=plan, made=made)


def _do(unit: WorkUnit) -> list[Row]:
    from .runner import measure

    return measure(_work["plan"], _work["made"], unit)


def _set_up_and_do(sent: tuple[Any, ...], unit: WorkUnit) -> list[Row]:
    """For workers that cannot be set up beforehand; they are kept between units, and so is what was loaded."""
    if not _work:
        _set_up(*sent)
    return _do(unit)
