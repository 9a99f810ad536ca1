# SPDX-License-Identifier: Apache-2.0
"""The one exception that is the user's to mend, and warnings that point at the user's line."""

import sys
import warnings
from collections.abc import Callable

_WITHIN = ("manyheads", "torch", "transformers")  # whose frames are not the user's


class UserError(ValueError):
    """A mistake in what the user gave: its text is one line saying what is wrong and what to do next.

    The command line prints it as ``error: <line>`` and exits with 2.
    """


def refusal(*needed: Callable[[], object]) -> str | None:
    """What the first UserError says where each of ``needed`` is called in turn; None where all can be had."""
    try:
        for each in needed:
            each()
    except UserError as error:
        return str(error)
    return None


def warn(message: str) -> None:
    """Warn in one line, at the line of the innermost caller that is neither ours, torch's nor transformers'."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).partition(".")[0] in _WITHIN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
