# SPDX-License-Identifier: Apache-2.0
"""Many shares at one time: what is known of each at the end of a period, beside the others, and what came then."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ...data.stocks import Prices
from ...errors import UserError

__all__ = ["HISTORY", "PERIODS", "CrossSection", "Outcome", "cross_sections", "quantile_classes"]

Array = NDArray[np.float64]
HISTORY = 20  # periods that are kept of each share
PERIODS = {"day": 252, "week": 52, "month": 12}  # to a year
_FEWEST = 5  # shares of a cross-section


@dataclass(frozen=True, slots=True, eq=False)
class CrossSection:
    """Shares at the end of a period.

    Attributes:
        names: of all shares of the set, the same at every time.
        rows: return and turnover of the last periods, the last one last, float64 ``[S, 20, 2]``: z-scores over the
            shares that are there, period by period; 0 where one is not.
        there: whether all these periods of a share are known, bool ``[S]``.
        date: the last day of the period.
    """

    names: tuple[str, ...]
    rows: Array
    there: NDArray[np.bool_]
    date: str

    def __neg__(self) -> CrossSection:
        """The same with every number negated."""
        return replace(self, rows=-self.rows)

    def among(self, chosen: NDArray[np.intp]) -> CrossSection:
        """The same with these shares alone; their numbers stay."""
        there = np.zeros_like(self.there)
        there[chosen] = self.there[chosen]
        return replace(self, there=there)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What came of the shares of a cross-section in the next period.

    Attributes:
        returns: in per cent, ``[S]``, NaN where it is not known.
        places: rank of the return among those known, 0 for the lowest and 1 for the highest, ``[S]``, NaN likewise.
    """

    returns: Array
    places: Array


def quantile_classes(places: Array, classes: int, share: float) -> NDArray[np.int64]:
    """Class of each of ``places [S]``: 0 for the highest, ``classes - 1`` for the lowest, -1 between classes.

    Each class has ``share`` of all shares; what is left, ``1 - classes * share``, lies in equal parts between them.
    Intervals are closed below, the highest also above. NaN has no class.
    """
    gap = (1 - classes * share) / (classes - 1)
    lows = np.array([i * (share + gap) for i in range(classes)]) - 1e-9
    found = np.searchsorted(lows, np.nan_to_num(places), "right") - 1
    inside = (places < lows[found] + share) | (found == classes - 1)
    return np.where(np.isfinite(places) & inside, classes - 1 - found, -1).astype(np.int64)


def cross_sections(shares: Sequence[Prices], period: str) -> Iterator[tuple[CrossSection, Outcome | None]]:
    """Of every period that 20 others and enough shares stand before, in the order of time; the last has no outcome.

    A return is that of the adjusted close from the last day of a period to that of the next. Turnover, which needs a
    number of shares that prices do not tell, is the volume of a period over its mean in the 20 periods that are read.
    A week is from Monday to Sunday.

    Raises:
        UserError: there is none.
    """
    days = [_periods(share, period) for share in shares]
    every = np.unique(np.concatenate(days))
    closes, volumes = np.full((2, len(every), len(shares)), np.nan)
    last = np.zeros(len(every), "datetime64[D]")
    for s, (share, of_day) in enumerate(zip(shares, days, strict=True)):
        there, first = np.unique(of_day, return_index=True)
        at, ends = np.searchsorted(every, there), np.append(first[1:], len(of_day)) - 1
        closes[at, s] = share.column("adjusted")[ends]
        volumes[at, s] = np.add.reduceat(share.column("volume"), first)
        last[at] = np.maximum(last[at], share.dates[ends])
    returns = 100 * (closes[1:] / closes[:-1] - 1)
    found = False
    for t in range(HISTORY - 1, len(returns)):
        seen, traded = returns[t - HISTORY + 1 : t + 1], volumes[t - HISTORY + 2 : t + 2]
        there = np.isfinite(seen).all(0)
        if there.sum() < _FEWEST:
            continue
        usual = traded.mean(0)
        turnover = np.where(usual > 0, traded / np.where(usual > 0, usual, 1.0), 1.0)
        rows = np.stack([_z_score(np.where(there, x, np.nan)) for x in (seen, turnover)], 2).transpose(1, 0, 2)
        section = CrossSection(tuple(share.name for share in shares), rows, there, str(last[t + 1]))
        found = True
        yield section, _outcome(np.where(there, returns[t + 1], np.nan)) if t + 1 < len(returns) else None
    if not found:
        raise UserError(
            f"no {period} has {_FEWEST} shares with {HISTORY} {period}s of prices before it; give more, or longer ones"
        )


def _periods(share: Prices, period: str) -> NDArray[np.int64]:
    """Number of the period of each day, ascending."""
    if period == "month":
        return share.dates.astype("datetime64[M]").astype(np.int64)
    number = share.dates.astype(np.int64)
    return (number + 3) // 7 if period == "week" else number  # day 0 was a Thursday


def _z_score(x: Array) -> Array:
    """Mean 0 and variance 1 over the columns of ``[T, S]`` that are not NaN, which become 0; so does what is equal."""
    away = x - np.nanmean(x, 1, keepdims=True)
    spread = np.sqrt(np.nanmean(away**2, 1, keepdims=True))
    found: Array = np.nan_to_num(away / np.where(spread < 1e-9, 1.0, spread))
    return found


def _outcome(returns: Array) -> Outcome:
    known = np.flatnonzero(np.isfinite(returns))
    places = np.full(len(returns), np.nan)
    if len(known) > 1:
        below = np.searchsorted(np.sort(returns[known]), returns[known], "left")
        through = np.searchsorted(np.sort(returns[known]), returns[known], "right") - 1
        places[known] = (below + through) / (2 * (len(known) - 1))
    return Outcome(returns, places)
