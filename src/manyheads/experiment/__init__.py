# SPDX-License-Identifier: Apache-2.0
"""One experiment: a subject, arms on equal budgets, tasks; rows of measurements, estimates with intervals, checks."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arms import Arm, over
    from .checks import Check, CheckResult, above, at_most, below, higher, lower, no_worse
    from .claim import Claim, Reported
    from .design import Experiment, Sizes
    from .estimates import Estimate
    from .journal import Results
    from .rows import Metric, Row, WorkUnit
    from .runner import run
    from .subjects import CausalLM, Pipeline, Subject, Trainable, Vision
    from .task import RunContext, Task

__all__ = [
    "Arm", "CausalLM", "Check", "CheckResult", "Claim", "Estimate", "Experiment", "Metric", "Pipeline", "Reported",
    "Results", "Row", "RunContext", "Sizes", "Subject", "Task", "Trainable", "Vision", "WorkUnit", "above", "at_most",
    "below", "higher", "lower", "no_worse", "over", "run",
]  # fmt: skip

_HOMES = {
    **dict.fromkeys(("Arm", "over"), "arms"),
    **dict.fromkeys(("Check", "CheckResult", "above", "at_most", "below", "higher", "lower", "no_worse"), "checks"),
    **dict.fromkeys(("Claim", "Reported"), "claim"),
    **dict.fromkeys(("Experiment", "Sizes"), "design"),
    **dict.fromkeys(("CausalLM", "Pipeline", "Subject", "Trainable", "Vision"), "subjects"),
    **dict.fromkeys(("Metric", "Row", "WorkUnit"), "rows"),
    **dict.fromkeys(("RunContext", "Task"), "task"),
    "Estimate": "estimates", "Results": "journal", "run": "runner",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
