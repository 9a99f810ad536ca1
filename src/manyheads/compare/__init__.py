# SPDX-License-Identifier: Apache-2.0
"""Strategies side by side on one model and text: quality, memory and speed, each with its uncertainty."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .results import Results
    from .runner import compare
    from .summary import summarise
    from .train.run import compare_trained

__all__ = ["Results", "compare", "compare_trained", "summarise"]

_HOMES = {"Results": "results", "compare": "runner", "compare_trained": "train.run", "summarise": "summary"}


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
