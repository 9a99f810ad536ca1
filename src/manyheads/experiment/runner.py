# SPDX-License-Identifier: Apache-2.0
"""One experiment from beginning to end: plan, guard, measure what the journal lacks, and say what was measured."""

from __future__ import annotations

import datetime
import hashlib
import inspect
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import environment
from ..errors import UserError
from .design import Planned
from .executors import Executor, Serial, attention_planned_once, context, measure
from .journal import Journal, Results
from .rows import WorkUnit
from .task import RunContext, Task

if TYPE_CHECKING:
    from ..progress import Progress

__all__ = ["context", "measure", "run"]


def run(
    plan: Planned, out: str | Path, *, seed: int = 0, device: str = "cpu", data: Mapping[str, Any] | None = None,
    executor: Executor | None = None, progress: Progress | None = None, about: Mapping[str, Any] | None = None,
) -> Results:  # fmt: skip
    """Measure all of a planned experiment and keep the rows in ``out``.

    A run that was cut off goes on when it is called again with the same plan and folder.

    Args:
        plan: what is measured, see :meth:`.design.Experiment.at`.
        out: folder of the results.
        seed: of all draws.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        data: what the user gave the tasks: ``texts``, ...
        executor: where units run; this process when None.
        progress: is told how far the run is.
        about: more to keep in ``run.json``; ``options`` and ``command`` are empty when not given.

    Raises:
        UserError: anything that the caller can mend, before any work is done; an arm that keeps everything and is not
            the baseline.
    """
    where = executor or Serial()
    made = context(plan, seed, device, data, Path(out))
    for arm in plan.arms:
        for strategy in arm.strategies:
            if reason := plan.subject.unsupported_reason(strategy):
                raise UserError(reason)
    plan.subject.load(made.device)
    skipped = {task.key: reason for task in plan.tasks if (reason := task.unsupported_reason(made))}
    tasks = [task for task in plan.tasks if task.key not in skipped]
    if not tasks:
        raise UserError(f"nothing to measure: {next(iter(skipped.values()))}")
    units = _ordered([unit for task in tasks for unit in task.units(made)])
    journal = Journal(Path(out), _described(plan, made, seed, units, skipped, about or {}))
    waiting = [unit for unit in units if not journal.has(unit.key)]
    if not waiting and "finished" in journal.run:
        return Results.read(Path(out))
    if waiting:
        with attention_planned_once():
            for task in tasks:
                task.guard(made)
            for task in tasks:
                task.prepare(made)
    start = time.perf_counter()
    total = sum(unit.cost for unit in units)
    done = total - sum(unit.cost for unit in waiting)

    def said(part: float, message: str) -> None:
        nonlocal done
        done += part
        if progress is not None:
            progress(min(done, total), total, message)

    where.run(plan, made, waiting, journal, said)
    seconds = journal.run.get("seconds", 0.0) + time.perf_counter() - start
    return journal.finish(
        seconds=round(seconds, 2), finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        peak_rss_bytes=_peak_memory(),
    )  # fmt: skip


def _ordered(units: Sequence[WorkUnit]) -> list[WorkUnit]:
    """The units in their order, those that share something side by side."""
    groups: dict[str, list[WorkUnit]] = {}
    for unit in units:
        groups.setdefault(unit.shares or unit.key, []).append(unit)
    return [unit for group in groups.values() for unit in group]


def _described(
    plan: Planned, made: RunContext, seed: int, units: Sequence[WorkUnit], skipped: Mapping[str, str],
    about: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    from ..data.texts import digest
    from .subjects import CausalLM

    surroundings = environment.environment()
    texts = made.data.get("texts")
    return {
        "format": 2, "command": [], "options": {}, **about,
        "experiment": plan.described() | {"seed": seed, "device": str(made.device)},
        "size": plan.size,
        "model": plan.subject.identity() if isinstance(plan.subject, CausalLM) else plan.subject.described(),
        "texts": texts and {
            "files": len(texts), "characters": sum(len(text.content) for text in texts), "sha256": digest(texts),
        },
        "versions": {name: surroundings[name] for name in ("manyheads", "torch", "transformers")},
        "source": {task.key: _source(task) for task in plan.tasks},
        "environment": surroundings, "threads": _threads(), "skipped": dict(skipped),
        "units": [unit.key for unit in units],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _source(task: Task) -> str:
    """Hash of the files of a task and its bases: rows of another state of them are not gone on with."""
    files = [Path(inspect.getfile(cls)) for cls in type(task).__mro__ if issubclass(cls, Task)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def _peak_memory() -> int | None:
    """Most memory that this process has held, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # not POSIX
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
