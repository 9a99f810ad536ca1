# SPDX-License-Identifier: Apache-2.0
"""Where units run: in this process, in local worker processes, or on a Ray cluster (extra ``[ray]``).

Units are independent and a unit's rows do not depend on where it ran, as far as the machine adds numbers up in the same
order: the results equal those of a serial run. Units of a task that times something run one at a time, in this process,
after all others.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import UserError
from ..workers import started
from .task import RunContext

if TYPE_CHECKING:
    from .design import Planned
    from .journal import Journal
    from .rows import Row, WorkUnit

__all__ = ["Executor", "Processes", "Ray", "Serial", "Told", "context", "measure"]

Told = Callable[[float, str], None]  # part of the work that was done, and what is going on
_PATIENCE = 2.0  # seconds that a worker has to end by itself
_TRIES = 2  # times that a unit is given to a worker before the run stops
_made: dict[str, tuple[Planned, RunContext]] = {}  # what a Ray worker was set up with, by run; it keeps the last alone


def context(
    plan: Planned, seed: int, device: str, data: Mapping[str, Any] | None, folder: Path | None = None
) -> RunContext:
    """What tasks share in this process; the subject is loaded when a task asks for it."""
    from ..models import placed

    return RunContext(
        subject=plan.subject, arms=plan.arms, seed=seed, seeds=plan.seeds, device=placed(device, None)[0],
        data=data or {}, folder=folder,
    )  # fmt: skip


def measure(plan: Planned, made: RunContext, unit: WorkUnit) -> list[Row]:
    """Rows of one unit; the same in every process."""
    import torch

    task = next(task for task in plan.tasks if task.key == unit.task)
    try:
        with attention_planned_once():
            return list(task.measure(made, unit))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the memory of {made.device} is too small for {unit.label}: run with fewer workers, shorter lengths or "
            "fewer samples; with fewer workers the finished units are kept"
        ) from error


@contextmanager
def attention_planned_once() -> Iterator[None]:
    """Without cuDNN's attention, which is planned anew for every length: a comparison meets hundreds of them."""
    import torch

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class Executor(Protocol):
    """Does units and writes their rows to the journal."""

    def run(self, plan: Planned, made: RunContext, units: Sequence[WorkUnit], journal: Journal, told: Told) -> None: ...


class Serial:
    """In this process, in order; a unit that another process has done meanwhile is left out."""

    def run(self, plan: Planned, made: RunContext, units: Sequence[WorkUnit], journal: Journal, told: Told) -> None:
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

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise UserError("--workers counts processes: give 1 or more")

    def run(self, plan: Planned, made: RunContext, units: Sequence[WorkUnit], journal: Journal, told: Told) -> None:
        """Spread the units; a worker that dies loses its unit and no other, and the unit is tried once more.

        Raises:
            UserError: a unit killed its worker twice, or is the user's to mend.
            RuntimeError: a unit failed; the text is the worker's traceback.
        """
        beside, alone = _split(plan, units)
        threads = max(1, (os.cpu_count() or 1) // self.workers)
        sent = (plan, made.seed, str(made.device), made.data, str(journal.folder), threads)
        waiting, tries = deque(beside), dict.fromkeys((unit.key for unit in beside), 0)
        with ExitStack() as stack:
            idle: list[_Worker] = []
            busy: dict[Connection, tuple[_Worker, WorkUnit]] = {}
            while waiting or busy:
                while waiting and len(busy) < self.workers:
                    if not idle:
                        idle.append(worker := _Worker(sent))
                        stack.callback(worker.stop)
                    worker, unit = idle.pop(), waiting.popleft()
                    tries[unit.key] += 1
                    worker.give(unit)
                    busy[worker.pipe] = worker, unit
                for pipe in multiprocessing.connection.wait(list(busy)):
                    worker, unit = busy.pop(pipe)  # type: ignore[call-overload]
                    rows = worker.take(unit)
                    if rows is not None:
                        journal.add(unit.key, rows)
                        told(unit.cost, unit.label)
                        idle.append(worker)
                    elif tries[unit.key] < _TRIES:
                        waiting.append(unit)
                    else:
                        raise UserError(_lethal(unit))
        Serial().run(plan, made, alone, journal, told)


def _lethal(unit: WorkUnit) -> str:
    return (
        f"a worker died on {unit.key}, and another when it was tried again, for want of memory perhaps; "
        "run with fewer workers, the finished units are kept"
    )


class _Worker:
    """A process that does one unit at a time, so that it is known which one it died on."""

    def __init__(self, sent: tuple[Any, ...]) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self._process = started(_serve, (theirs, sent))
        theirs.close()  # so that the pipe ends when the worker does

    def give(self, unit: WorkUnit) -> None:
        """Set the worker to work; one that has died is found out by :meth:`take`."""
        try:
            self.pipe.send(unit)
        except OSError:
            self.stop()

    def take(self, unit: WorkUnit) -> list[Row] | None:
        """Rows of the unit that is done, None if the worker died on it."""
        try:
            rows, error, mendable = self.pipe.recv()
        except (EOFError, OSError):
            return None
        if error is not None:
            raise UserError(error) if mendable else RuntimeError(f"{unit.key} failed in a worker:\n{error}")
        found: list[Row] = rows
        return found

    def stop(self) -> None:
        """End the process: an idle one by itself, so that it tidies up, one at work by force."""
        self.pipe.close()
        self._process.join(_PATIENCE)
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection, sent: tuple[Any, ...]) -> None:
    """Do units that come through the pipe until it ends: ``(rows, None, False)``, or ``(None, error, mendable)``."""
    ready: tuple[Planned, RunContext] | None = None
    while True:
        try:
            unit = pipe.recv()
        except EOFError:
            return
        try:
            ready = ready or _set_up(*sent)
            answer: tuple[list[Row] | None, str | None, bool] = measure(*ready, unit), None, False
        except UserError as error:
            answer = None, str(error), True
        except Exception:
            answer = None, traceback.format_exc(), False
        try:
            pipe.send(answer)
        except OSError:  # nobody waits for it any more
            return


@dataclass(frozen=True)
class Ray:
    """On a Ray cluster: ``address`` as ``ray.init`` takes it, ``local`` for one of this machine.

    Every node must be able to load the subject by its name. A GPU is asked for when the run is on one. There is no
    folder that units share.
    """

    address: str

    def run(self, plan: Planned, made: RunContext, units: Sequence[WorkUnit], journal: Journal, told: Told) -> None:
        """Spread the units; Ray itself tries a unit again whose worker dies.

        Raises:
            UserError: Ray is not installed, or the cluster cannot be reached, or a unit killed its worker twice.
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
            remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=_TRIES - 1)(_do_remotely)
            name = uuid.uuid4().hex
            futures = {remote.remote(name, sent, unit): unit for unit in beside}
            while futures:
                done, _ = ray.wait(list(futures), num_returns=1)
                unit = futures.pop(done[0])
                try:
                    rows = ray.get(done[0])
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
                    raise UserError(_lethal(unit)) from error
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, UserError):
                        raise error.cause from None
                    raise
                journal.add(unit.key, rows)
                told(unit.cost, unit.label)
        finally:
            if started:
                ray.shutdown()
        Serial().run(plan, made, alone, journal, told)


def _set_up(
    plan: Planned, seed: int, device: str, data: Mapping[str, Any], folder: str | None, threads: int
) -> tuple[Planned, RunContext]:  # fmt: skip
    """Make this process ready for units."""
    import torch

    torch.set_num_threads(threads)
    made = context(plan, seed, device, data, Path(folder) if folder else None)
    plan.subject.load(made.device)
    return plan, made


def _do_remotely(run: str, sent: tuple[Any, ...], unit: WorkUnit) -> list[Row]:
    """A unit in a worker of Ray, which is kept between units, and with it what was loaded for the same run."""
    if run not in _made:
        _made.clear()
        _made[run] = _set_up(*sent)
    return measure(*_made[run], unit)
