# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads compare --train`` does with its options."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from manyheads.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from manyheads.progress import Progress

    from ..results import Results

__all__ = ["ONLY_HERE", "refuse", "run"]

ONLY_HERE = ("budget", "minutes", "seeds")
_ELSEWHERE = {
    "model": "it makes its own models", "budgets": "a training has one --budget, in tokens",
    "tasks": "it measures all of its tasks",
}  # fmt: skip


def refuse(options: dict[str, Any]) -> None:
    """Raise the UserError of an option that does not go with, or without, ``--train``."""
    if not options.get("train"):
        if wrong := [name for name in ONLY_HERE if name in options]:
            raise UserError(f"--{wrong[0]} goes with --train, which trains a model for each strategy; add it")
        return
    if wrong := [name for name in _ELSEWHERE if name in options]:
        raise UserError(f"--{wrong[0]} does not go with --train: {_ELSEWHERE[wrong[0]]}")
    if "budget" in options and "minutes" in options:
        raise UserError("give --budget or --minutes, not both")
    if len(options.get("lengths", [0])) != 1:
        raise UserError("--train has one training length; write for instance --lengths 256")


def run(options: dict[str, Any], folder: Path, progress: Progress) -> Results:
    """Train and compare as ``options`` say."""
    from manyheads.data.texts import read
    from manyheads.training.budget import Budget

    from .run import compare_trained, size_for

    device, minutes = options.get("device", "cpu"), options.get("minutes")
    budget = Budget.parse(options["budget"]) if "budget" in options else None
    if budget is not None and budget.unit == "steps":
        raise UserError("arms share a budget in tokens or time; write for instance --budget 2M or --budget 10m")
    if budget is not None and budget.unit == "seconds":
        minutes, budget = budget.amount / 60, None
    if minutes is None and "budget" not in options and device.startswith("cuda") and not options.get("quick"):
        minutes = 8.0  # a GPU's speed is not known beforehand
    size = size_for(
        device, options.get("quick", False), length=options.get("lengths", [None])[0],
        budget=int(budget.amount) if budget else None, samples=options.get("samples"),
        seeds=options.get("seeds"),
    )  # fmt: skip
    return compare_trained(
        read(options["text"]) if "text" in options else None, options.get("strategies"), size=size, minutes=minutes,
        seed=options.get("seed", 0), device=device, out=folder, options=options, progress=progress,
        command=["manyheads", *(a for a in sys.argv[1:] if a != "--debug")],
    )  # fmt: skip
