# SPDX-License-Identifier: Apache-2.0
"""Comparisons by training, until they are an experiment too; all others are :mod:`manyheads.comparison`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .train.run import compare_trained

__all__ = ["compare_trained"]


def __getattr__(name: str) -> Any:
    """Import a public name on first use."""
    if name == "compare_trained":
        return import_module(f"{__name__}.train.run").compare_trained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
