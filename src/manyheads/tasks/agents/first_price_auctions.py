# SPDX-License-Identifier: Apache-2.0
"""Bidding in repeated first-price auctions under a budget: what is lost against the best, and how that grows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from ...data.auctions import beta_2_3, logged, simulated
from ...errors import UserError, refusal
from ...experiment import Metric, Row, RunContext, Task, WorkUnit
from ...recipe import Procedure
from .._field_training import strategy_of

__all__ = ["FirstPriceAuctions", "benchmark"]

_LEVELS = 400  # of bids in the benchmark
_PRICES = np.linspace(0, 1, 201) ** 2 * 20  # of the budget, among which the benchmark's is


@dataclass(frozen=True, kw_only=True)
class FirstPriceAuctions(Task):
    """Runs of T auctions with a budget of ``rho T``; a bidder is a procedure with bids for what was told before.

    The benchmark of a run is the paper's bound on what can be expected by who knows the distribution G of other bids,
    with the values that came: ``min over lambda of sum_t max_b (v_t - (1 + lambda) b) G(b) + lambda rho T``. G is the
    true one of ``simulated``; of ``ipinyou`` that of the other bids of the run itself, known in hindsight. A single run
    can exceed it by luck.

    Attributes:
        source_of: ``simulated``, or ``ipinyou``, a log in its order.
        rounds: T, of which the last is judged and all make the exponent.
        runs: of each; a log has those that it holds.
        rho: budget by auction.
        draw: number of the simulated auctions.
        only: names of the arms that are measured; all when empty.
        label: what it is called where an experiment has it several times.
    """

    subject: ClassVar[str] = "trainable"
    procedures: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("regret", "loss against the best, by auction", "utility/auction"),
        Metric("gain", "utility, by auction", "utility/auction", higher=True),
        Metric("spent", "share of the budget that is spent", "budget", what="never above 1", higher=True),
        Metric("exponent", "growth of the loss with the auctions", "power",
               what="slope of the logarithm of the mean loss of all runs; a run's value is its jackknife pseudo-value"),
    )  # fmt: skip

    source_of: Literal["simulated", "ipinyou"] = "simulated"
    rounds: tuple[int, ...] = (1000, 4000, 16000)
    runs: int = 20
    rho: float = 0.08
    draw: int = 0
    only: tuple[str, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        if not self.rounds or min(*self.rounds, self.runs, 10**9) < 2 or self.rho <= 0:
            raise UserError("rounds and runs are 2 or more, and rho, the budget by auction, is above 0")

    def unsupported_reason(self, run: RunContext) -> str | None:
        return refusal(lambda: self.auctions(self.rounds[-1]))

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, arm.key, float(sum(self.rounds)), f"{arm.key}: auctions", {"arm": arm.key})
            for arm in run.arms if not self.only or arm.name in self.only
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = run.arm_of(unit)
        if not isinstance(bidder := strategy_of(run, arm), Procedure):
            raise UserError(f"{arm.key} does not bid: give a procedure, such as fpabudget")
        mine: Any = self  # a procedure of this task asks for auctions alone
        for metric, name, value in bidder.run(mine, run.rng(auctions=0)):
            yield self.row(metric, arm, value, name)
        run.advance(unit.cost)

    def auctions(self, rounds: int) -> tuple[Any, Any]:
        """Values and other bids ``[S, rounds]``, the same for every bidder."""
        if self.source_of == "ipinyou":
            return logged(rounds)
        return simulated(self.runs, rounds, np.random.default_rng((self.draw, rounds)))

    def played(self, bids: Callable[[Any, Any, float], Any]) -> Iterable[tuple[str, str, float]]:
        """Metrics of each run of ``bids(values [S, T], others [S, T], rho) -> [S, T]``."""
        losses = []
        for rounds in self.rounds:
            values, others = self.auctions(rounds)
            made = bids(values, others, self.rho)
            won = made >= others
            gains, spent = ((x * won).sum(1) / rounds for x in (values - made, made))
            losses.append(self.best(values, others) - gains)
        for i, (loss, gain, paid) in enumerate(zip(losses[-1], gains, spent / self.rho, strict=True)):
            yield from (("regret", f"{i}", loss), ("gain", f"{i}", gain), ("spent", f"{i}", paid))
        if len({len(one) for one in losses}) == 1 and len(losses) > 1:
            totals = np.stack(losses) * np.array(self.rounds)[:, None]
            for i, value in enumerate(exponents(totals, self.rounds)):
                yield "exponent", f"{i}", float(value)

    def best(self, values: Any, others: Any) -> Any:
        """The benchmark of each run by auction, ``[S]``."""
        grid = np.linspace(0, 1, _LEVELS + 1)
        if self.source_of == "simulated":
            return np.array([benchmark(row, beta_2_3(grid), self.rho) for row in values])
        chances = [np.searchsorted(np.sort(row), grid, "right") / len(row) for row in others]
        return np.array([benchmark(row, chance, self.rho) for row, chance in zip(values, chances, strict=True)])


def benchmark(values: Any, chance: Any, rho: float) -> float:
    """``min_lambda mean_t max_b (v_t - (1 + lambda) b) G(b) + lambda rho`` for G at levels from 0 to 1.

    The maximum is convex in v, and taken at 201 values between which it is drawn straight: at most a hundred-thousandth
    too high.
    """
    grid, nodes = np.linspace(0, 1, len(chance)), np.linspace(0, 1, 201)
    gain, cost = np.outer(nodes, chance), grid * chance
    found = [
        np.interp(values, nodes, (gain - (1 + price) * cost).max(1)).mean() + price * rho for price in _PRICES
    ]  # fmt: skip
    return float(min(found))


def exponents(totals: Any, rounds: Iterable[int]) -> Any:
    """Jackknife pseudo-values ``[S]`` of the slope of ``log mean_s totals [R, S]`` over ``log rounds [R]``.

    NaN where a mean is not above 0.
    """
    where, n = np.log(np.asarray(list(rounds), float)), totals.shape[1]

    def slope(means: Any) -> float:
        return float(np.polyfit(where, np.log(means), 1)[0]) if (means > 0).all() else float("nan")

    without = [slope(np.delete(totals, i, 1).mean(1)) for i in range(n)]
    return n * slope(totals.mean(1)) - (n - 1) * np.array(without)
