# SPDX-License-Identifier: Apache-2.0
"""What can be measured: one file a task, below the folder of its field, found by its name.

A task loads its data, states its metrics, and gives one value for every sample. ``load("niah_single")`` imports no
other.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path

from ..errors import UserError
from ..experiment.task import Task

__all__ = ["load", "names"]

_FOLDER = Path(__file__).parent


@cache
def _homes() -> dict[str, str]:
    """Module of each task by its name; helpers begin with an underscore."""
    found = {}
    for path in sorted(_FOLDER.glob("*/[a-z]*.py")):
        found[path.stem] = f"{__name__}.{path.parent.name}.{path.stem}"
    return found


def names(field: str | None = None) -> list[str]:
    """Names of all tasks, or of those of a field, sorted."""
    return sorted(name for name, home in _homes().items() if field in (None, home.split(".")[-2]))


def load(name: str) -> type[Task]:
    """The class of the task called ``name``.

    Raises:
        UserError: there is none; the message holds the nearest names.
    """
    from ..catalog import nearest

    if name not in _homes():
        close = nearest(name, names())
        raise UserError(
            f"unknown task {name!r}: " + (f"did you mean {close[0]}?" if close else f"there are {', '.join(names())}")
        )
    module = import_module(_homes()[name])
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one Task, not {[c.__name__ for c in found]}")
    return found[0]
