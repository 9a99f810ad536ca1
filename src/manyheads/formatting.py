# SPDX-License-Identifier: Apache-2.0
"""How numbers, shares, sizes and intervals are written: one way for tables, pages and sentences."""

import math

__all__ = ["budget", "first_line", "interval", "number", "percent", "size"]


def number(value: float) -> str:
    """Three significant digits: ``0.1234`` -> ``0.123``; a dash where there is no number."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 1e5 or magnitude < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.0f}" if magnitude >= 1000 else f"{value:.3g}"


def percent(share: float, signed: bool = False) -> str:
    """``0.25`` -> ``25 %``."""
    return f"{100 * share:{'+' if signed else ''}.0f} %"


def size(count: float) -> str:
    """Bytes in powers of ten: ``20971520`` -> ``21.0 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def budget(value: int | float) -> str:
    """A share of the tokens or a number of slots: ``0.25`` -> ``25 %``; ``64`` -> ``64 slots``."""
    return f"{value} slots" if isinstance(value, int) else f"{100 * value:g} %"


def interval(low: float, high: float, share: bool = False) -> str:
    """``0.1, 0.25`` -> ``0.1 to 0.25``; of a share ``10 to 25``, in percents."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "no interval"
    if share:
        return f"{100 * low:.0f} to {100 * high:.0f}"
    return f"{number(low)} to {number(high)}"


def first_line(error: Exception) -> str:
    """The first sentence of an error's text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")[:160]
