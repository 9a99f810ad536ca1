# SPDX-License-Identifier: Apache-2.0
"""A subject that is nothing and tasks of random numbers, in a module that worker processes can import."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from manyheads.errors import UserError
from manyheads.experiment import Arm, Experiment, Metric, Sizes, Subject, Task, WorkUnit


class Nothing(Subject):
    kind = "nothing"
    kinds = ()
    name = "nothing"

    def load(self, device):
        pass


@dataclass(frozen=True, kw_only=True)
class Draws(Task):
    """Contexts that all arms share, and what an arm adds to each.

    ``dies``: unit on which the worker is killed, once while ``mark`` does not exist, or always when ``mark`` is empty.
    """

    subject: ClassVar[str] = "nothing"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("loss", "loss", "nats"),
        Metric("right", "right", higher=True, kind="share", floor=0.5),
    )
    samples: int = 12
    per_unit: int = 3
    label: str = ""
    dies: int = -1
    mark: str = ""
    fails: int = -1

    def units(self, run):
        count = self.samples // self.per_unit
        return [WorkUnit(self.key, f"{i}", 1.0, f"draws {i}", {"first": i * self.per_unit}) for i in range(count)]

    def measure(self, run, unit):
        first = unit.params["first"]
        if first == self.fails * self.per_unit:
            raise UserError("this unit is not for you")
        if first == self.dies * self.per_unit and not (self.mark and Path(self.mark).exists()):
            if self.mark:
                Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        for i in range(first, first + self.per_unit):
            context = run.rng(context=i).normal()
            for arm in run.arms:
                own = run.rng(context=i, arm=arm.key).normal()
                shift = float(arm.options.get("shift", 0.0))
                yield self.row(
                    "loss", arm, context + 0.1 * own + shift, f"{i}", at={"length": 8}, about={"é\u2028": "x"}
                )
                yield self.row("right", arm, own + shift < 1.2, f"{i}")
        run.advance(unit.cost)


@dataclass(frozen=True, kw_only=True)
class Here(Draws):
    """Says in which process it ran."""

    alone: ClassVar[bool] = True

    def measure(self, run, unit):
        for arm in run.arms:
            yield self.row("loss", arm, os.getpid(), unit.name)


def experiment(*tasks, shift=1.0, **sizes):
    arms = (Arm("worse", options={"shift": shift}), Arm("same"))
    return Experiment(subject=Nothing(), arms=arms, tasks=tasks or (Draws(),), sizes=Sizes(**sizes), seeds=1)
