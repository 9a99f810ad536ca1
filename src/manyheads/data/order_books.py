# SPDX-License-Identifier: Apache-2.0
"""Limit order books: a simulator whose days differ by their seed, and files of one's own (LOBSTER, FI-2010).

The simulator. Prices are whole ticks. At each event one of these happens, in proportion to its rate:

- limit orders come at each side ``i = 1, 2, ..`` ticks from the other side's best price, at a rate that falls with
  ``i``, with sizes of a geometric law;
- cancellations take one lot, in proportion to the lots that lie within reach, while more than a few do;
- market orders take a geometric size from the best price on, through as many prices as it needs, but never more than
  half of the lots within reach.

Two hidden processes make something predictable; each is a mean-reverting (Ornstein-Uhlenbeck) one of variance 1:

- flow ``x``, over some 300 events: buyers' market orders come at ``exp(signal * x)`` times their rate, sellers' at
  ``exp(-signal * x)``. It is seen in time alone: in what happened to the best prices.
- pressure ``z``, over some 300 events: limit orders *behind* the best prices come at ``exp(z)`` times their rate on
  the bid side and ``exp(-z)`` on the ask side, and market orders follow it as they do ``x``. It is seen across the
  levels of one snapshot.

With ``signal=0`` market orders follow neither, and what is left is what queues say of the next move. This is no
market: it has no news, no clock, no memory beyond the two.
"""

import csv
import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np

from ..errors import UserError

__all__ = ["COLUMNS", "LEVELS", "TAKES", "BookDay", "book_days", "read_book", "simulated_day"]

LEVELS = 10
COLUMNS = tuple(
    f"{side} {what} {level}" for level in range(1, LEVELS + 1) for side in ("ask", "bid") for what in ("price", "size")
)  # order of LOBSTER's and FI-2010's files
TAKES = (
    "a folder of order books of three days or more, each LOBSTER's *_orderbook_10.csv, or an FI-2010 file "
    "(*NoAuction_DecPre*.txt)"
)
_REACH = 24  # prices of a side that orders come to
_EDGE = 4096  # prices that a day may move over
_LIMIT, _MARKET, _CANCEL = 0.7, 1.2, 0.05  # rates: at a side's nearest price, of a side, of a lot that lies
_FEW = 12  # lots within reach that are not cancelled
_SIZE, _TAKEN = 0.3, 0.12  # of geometric sizes of limit and market orders
_MEMORY = 300.0  # events that the hidden processes remember
_BURN_IN = 200  # snapshots that are not kept
_EVERY = 5  # events from one snapshot to the next
_JUMP = 0.05  # of a price: where a file goes on with another share


@dataclass(frozen=True, slots=True, eq=False)
class BookDay:
    """Snapshots of one book on one day.

    Attributes:
        name: of the day, or of the part of a file.
        day: group: all that may not be parted.
        values: float64 ``[T, 40]``, columns as :data:`COLUMNS`, prices in any unit.
    """

    name: str
    day: str
    values: np.ndarray


def simulated_day(seed: int, snapshots: int = 1000, signal: float = 0.8) -> BookDay:
    """A day of the simulator, after a burn-in; prices start at 10,000 ticks."""
    rng = np.random.default_rng((59, seed))
    book = _Book(rng, signal)
    for _ in range(_BURN_IN):
        book.step()
    rows = np.empty((snapshots, 4 * LEVELS))
    for t in range(snapshots):
        book.step()
        rows[t] = book.snapshot()
    return BookDay(f"simulated {seed}", f"simulated {seed}", rows)


class _Book:
    """Lots by price on each side, as lists, for one event touches few of them."""

    def __init__(self, rng: np.random.Generator, signal: float) -> None:
        self.rng, self.signal, self.x, self.z = rng, signal, 0.0, 0.0
        self.base, middle = 10_000 - _EDGE // 2, _EDGE // 2
        self.bids, self.asks = [0] * _EDGE, [0] * _EDGE
        for i in range(1, _REACH + 1):
            self.bids[middle - i], self.asks[middle + i] = 8, 8
        self.bid, self.ask = middle - 1, middle + 1
        falls = [(1.0 + 0.15 * (i - 1)) ** -1.2 for i in range(1, _REACH + 1)]
        self.near, self.deep = _LIMIT * sum(falls[:2]), _LIMIT * sum(falls[2:])
        self.cumulated = list(accumulate(falls))
        self.rates: tuple[float, ...] = ()  # of limit orders at the best prices and behind them, and of market orders
        self.left: list[float] = []

    def uniform(self) -> float:
        if not self.left:
            self.left = self.rng.random(4096).tolist()
        return self.left.pop()

    def geometric(self, p: float) -> int:
        return 1 + int(math.log(1.0 - self.uniform()) / math.log(1.0 - p))

    def step(self) -> None:
        """What happens up to the next snapshot: the hidden processes move, then there are a few events."""
        keep = math.exp(-_EVERY / _MEMORY)
        away = math.sqrt(1 - keep**2) * self.rng.standard_normal(2)
        self.x, self.z = keep * self.x + float(away[0]), keep * self.z + float(away[1])
        push, lean = math.exp(self.signal * (self.x + self.z) / math.sqrt(2)), math.exp(0.6 * self.z)
        self.rates = (
            self.near, self.near, self.deep * lean, self.deep / lean, _MARKET * push, _MARKET / push,
        )  # fmt: skip
        for _ in range(_EVERY):
            self.event()

    def event(self) -> None:
        """One event."""
        lots = sum(self.bids[self.bid - _REACH + 1 : self.bid + 1]), sum(self.asks[self.ask : self.ask + _REACH])
        rates = (*self.rates, _CANCEL * lots[0] * (lots[0] > _FEW), _CANCEL * lots[1] * (lots[1] > _FEW))
        at, kind = self.uniform() * sum(rates), 0
        while kind < 7 and at >= rates[kind]:
            at -= rates[kind]
            kind += 1
        if kind < 4:
            self._limit(kind % 2 == 0, deep=kind >= 2)
        elif kind < 6:
            self._market(kind == 4, lots[5 - kind] // 2)
        else:
            self._cancel(kind == 6, lots[kind - 6])
        self._settle()

    def _limit(self, buys: bool, deep: bool) -> None:
        low, high = (self.cumulated[1], self.cumulated[-1]) if deep else (0.0, self.cumulated[1])
        i = 1 + bisect_right(self.cumulated, low + self.uniform() * (high - low))
        i, size = min(i, _REACH), self.geometric(_SIZE)
        if buys:
            self.bids[self.ask - i] += size
        else:
            self.asks[self.bid + i] += size

    def _market(self, buys: bool, most: int) -> None:
        left, side = min(self.geometric(_TAKEN), most), self.asks if buys else self.bids
        at, step = (self.ask, 1) if buys else (self.bid, -1)
        while left:
            taken = min(left, side[at])
            side[at] -= taken
            left -= taken
            at += step

    def _cancel(self, bids: bool, lots: int) -> None:
        at, side = int(self.uniform() * lots), self.bids if bids else self.asks
        price, step = (self.bid, -1) if bids else (self.ask, 1)
        while at >= side[price]:
            at -= side[price]
            price += step
        side[price] -= 1

    def _settle(self) -> None:
        """Best prices again; no ask lies at or below what the best bid was, and no bid at or above the best ask."""
        ask = self.bid + 1
        while ask < _EDGE and not self.asks[ask]:
            ask += 1
        bid = ask - 1
        while bid and not self.bids[bid]:
            bid -= 1
        if not bid or ask == _EDGE:
            raise RuntimeError("a side of the simulated book is empty: its rates do not hold together")
        self.ask, self.bid = ask, bid

    def snapshot(self) -> list[float]:
        """Ten levels that hold something, or, where fewer do, empty prices behind them."""
        asks = [p for p in range(self.ask, self.ask + 4 * LEVELS) if self.asks[p]][:LEVELS]
        bids = [p for p in range(self.bid, self.bid - 4 * LEVELS, -1) if self.bids[p]][:LEVELS]
        while len(asks) < LEVELS:
            asks.append(asks[-1] + 1)
        while len(bids) < LEVELS:
            bids.append(bids[-1] - 1)
        return [
            value
            for a, b in zip(asks, bids, strict=True)
            for value in (self.base + a, self.asks[a], self.base + b, self.bids[b])
        ]


def book_days(folder: Path) -> list[BookDay]:
    """Days of the user's folder, sorted by name.

    Raises:
        UserError: it holds none, or a file is no order book.
    """
    paths = sorted([*folder.glob("*orderbook*.csv"), *folder.glob("*NoAuction*.txt")])
    if not paths:
        raise UserError(f"{folder} holds no order book; it should be {TAKES}")
    return [day for path in paths for day in read_book(path)]


def read_book(path: Path) -> list[BookDay]:
    """Snapshots of a file: LOBSTER's order book of ten levels, or FI-2010's, cut where another share begins.

    A day is LOBSTER's date, or FI-2010's file as a whole, which does not say where days end.

    Raises:
        UserError: it is neither.
    """
    lobster = path.suffix == ".csv"
    try:
        if lobster:
            with path.open(encoding="utf-8") as lines:
                values = np.array([row[: 4 * LEVELS] for row in csv.reader(lines) if row], np.float64)
        else:
            values = np.loadtxt(path, ndmin=2)[: 4 * LEVELS].T
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no order book ({error}); it should be {TAKES}") from error
    if values.ndim != 2 or values.shape[1] != 4 * LEVELS or not len(values):
        raise UserError(f"{path} has not the {4 * LEVELS} columns of ten levels")
    if not (np.isfinite(values).all() and (values[:, [0, 2]] > 0).all() and (values[:, 0] >= values[:, 2]).all()):
        raise UserError(f"{path} has prices that are none: of FI-2010 take the files of DecPre, which are not z-scored")
    date = re.search(r"\d{4}-\d{2}-\d{2}", path.stem)
    day = date[0] if lobster and date else path.stem
    mid = (values[:, 0] + values[:, 2]) / 2
    cuts = np.flatnonzero(np.abs(np.diff(mid)) > _JUMP * mid[:-1]) + 1
    parts = np.split(values, cuts)
    return [BookDay(path.stem if len(parts) == 1 else f"{path.stem} {i}", day, one) for i, one in enumerate(parts)]
