# SPDX-License-Identifier: Apache-2.0
"""A portfolio that is put together anew each period: what is held, what trading costs, and figures of its course."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ...recipe import Picture

__all__ = ["figures", "held", "portfolio", "wealth", "worth_picture"]

Array = NDArray[np.float64]


def held(scores: Array, share: float) -> Array:
    """Weights ``[S]`` that add to 1: equal ones of the ``share`` of shares with the highest scores, at least one.

    Args:
        scores: ``[S]``, NaN where a share cannot be bought. Of equal scores those come first that stand first.
        share: between 0 and 1, of the shares that can be bought.
    """
    there = np.flatnonzero(np.isfinite(scores))
    best = there[np.argsort(-scores[there], kind="stable")][: max(1, round(share * len(there)))]
    weights = np.zeros(len(scores))
    weights[best] = 1 / len(best)
    return weights


def portfolio(weights: Sequence[Array], returns: Sequence[Array], cost: float) -> tuple[Array, Array]:
    """Return of each period after costs, and what share of the worth was bought at its start, ``[T]`` each.

    At the start of a period the weights, which have drifted with the prices since the last one, are brought to what
    they should be; the first time everything is bought. ``cost`` is of what is bought and of what is sold, as a share.
    At the end nothing is sold.

    Args:
        weights: ``[S]`` of each period, adding to 1.
        returns: ``[S]`` of each period, as shares, NaN where a share has none and its weight is 0.
        cost: as a share.
    """
    net, bought, before = np.empty(len(weights)), np.empty(len(weights)), np.zeros(0)
    for t, (wanted, gains) in enumerate(zip(weights, returns, strict=True)):
        change = wanted - before if t else wanted
        bought[t] = change[change > 0].sum()
        worth = wanted * (1 + np.where(wanted > 0, gains, 0.0))
        net[t] = (1 - cost * np.abs(change).sum()) * worth.sum() - 1
        before = worth / worth.sum()
    return net, bought


def wealth(closes: Array, holds: Array, cost: float) -> Array:
    """Worth of 1 after each close ``[T]``, all of it in one share where ``holds [T]`` is 1, in cash where it is 0.

    At each close it is bought or sold at ``closes [T]`` for a ``cost``, a share of the worth.
    """
    grown = 1 + holds[:-1] * (closes[1:] / closes[:-1] - 1)
    kept = 1 - cost * np.abs(np.diff(holds, prepend=0.0))
    return np.asarray(np.cumprod(np.append(1.0, grown) * kept), np.float64)


def worth_picture(courses: Mapping[str, Array], cost: float, times: str, of: str = "") -> Picture:
    """Lines of what 1 became, ``[T]`` by name, at numbered times."""
    columns = [str(k) for k in range(len(next(iter(courses.values()))))]
    return Picture(
        f"{of}worth of 1, {100 * cost:g} % for each purchase and sale", list(courses), columns,
        [values.tolist() for values in courses.values()], ("worth", times), kind="lines",
    )  # fmt: skip


def figures(net: Array, per_year: int) -> Mapping[str, Array]:
    """Figures of the returns ``net [T]`` of periods in a row; each as a value of every period, whose mean it is.

    A value is the figure and what its period adds to the figure's deviation (the influence function), so that means
    over blocks of periods have the spread of the figure. Of the drawdown, the fall from its peak to its trough is held.

    - ``annual_return``: ``exp(per_year mean log(1 + r)) - 1``, in per cent;
    - ``sharpe``: ``sqrt(per_year) mean r / deviation of r``; left out where returns do not vary;
    - ``drawdown``: the largest loss from a peak, in per cent.
    """
    logs, n = np.log1p(net), len(net)
    growth = math.exp(per_year * logs.mean())
    made = {"annual_return": 100 * (growth - 1 + growth * per_year * (logs - logs.mean()))}
    away, deviation = net - net.mean(), net.std()
    if deviation > 1e-12:
        ratio = net.mean() / deviation
        made["sharpe"] = math.sqrt(per_year) * (ratio + away / deviation - ratio * ((away / deviation) ** 2 - 1) / 2)
    course = np.concatenate(([0.0], np.cumsum(logs)))
    trough = int(np.argmin(course - np.maximum.accumulate(course)))
    peak = int(np.argmax(course[: trough + 1]))
    lost = np.zeros(n)
    lost[peak:trough] = -n * logs[peak:trough]
    left = math.exp(-lost.mean())
    return {**made, "drawdown": 100 * (1 - left + left * (lost - lost.mean()))}
