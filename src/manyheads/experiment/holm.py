# SPDX-License-Identifier: Apache-2.0
"""Several checks judged together: Holm's correction, as wider intervals (Scandinavian Journal of Statistics 6, 1979).

Of m checks the one whose effect is furthest from its bound, in standard errors, is judged by an interval of
1 - 0.05 / m, the next by one of 1 - 0.05 / (m - 1), and so on until one spans its bound; those that are left keep its
level. The chance that any word of the claim is wrong is then 5 % at most, and words still follow from intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import NormalDist

from .checks import Check, CheckResult, power, word_of
from .estimates import BOTH, CONTEXTS, REPEATS, SEEDS, Estimate, t_below, t_quantile

__all__ = ["holm"]

_ALPHA = 0.05
_NORMAL = NormalDist()


def holm(results: Sequence[CheckResult], checks: Sequence[Check]) -> tuple[CheckResult, ...]:
    """The results with wider intervals, and the words that follow; what is not testable is not counted."""
    made = list(results)
    chances = {
        i: _chance(found.effect, check)
        for i, (found, check) in enumerate(zip(results, checks, strict=True))
        if found.word != "not testable here"
        and found.effect is not None
        and found.effect.bounded
        and not check.relative
    }
    level, failed = _ALPHA, False
    for k, i in enumerate(sorted(chances, key=lambda i: chances[i])):
        level = level if failed else _ALPHA / (len(chances) - k)
        failed = failed or chances[i] > level
        made[i] = _wider(results[i], checks[i], level, len(chances))
    return tuple(made)


def _few(found: Estimate) -> bool:
    return found.interval in (CONTEXTS, SEEDS, BOTH, REPEATS)


def _quantile(found: Estimate, level: float) -> float:
    return t_quantile(1 - level / 2, found.groups - 1) if _few(found) else _NORMAL.inv_cdf(1 - level / 2)


def _edge(check: Check, bound: float) -> float:
    """What an interval has to clear on the claimed side."""
    return bound - check.sign * check.margin if check.tolerant else bound


def _chance(found: Estimate | None, check: Check) -> float:
    """Two-sided chance of an effect so far from its edge."""
    assert found is not None
    edge = _edge(check, float(check.than) if isinstance(check.than, int | float) else 0.0)
    half = found.value - found.low if found.value > edge else found.high - found.value
    if half <= 0:
        return 0.0 if found.value != edge else 1.0
    t = abs(found.value - edge) / half * _quantile(found, _ALPHA)
    return 2 * (1 - (t_below(t, found.groups - 1) if _few(found) else _NORMAL.cdf(t)))


def _wider(result: CheckResult, check: Check, level: float, count: int) -> CheckResult:
    found = result.effect
    assert found is not None
    factor = _quantile(found, level) / _quantile(found, _ALPHA)
    wide = dataclasses.replace(
        found,
        low=found.value - factor * (found.value - found.low),
        high=found.value + factor * (found.high - found.value),
    )
    word = word_of(wide, check, result.bound)
    detectable, needed = power(wide, check, result.bound)
    return dataclasses.replace(
        result, word=word if result.word else None, detectable=detectable,
        needed=needed if word == "inconclusive" else None,
        effect=dataclasses.replace(wide, interval=f"{found.interval}, Holm of {count}"),
    )  # fmt: skip
