# SPDX-License-Identifier: Apache-2.0
"""Statistics that several tasks make a value of."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["auroc", "auroc_values", "rank_correlation", "rank_correlation_values"]


def auroc(score: Any, label: Any) -> float:
    """Chance that a labelled entry of ``score [N]`` exceeds one that is not, ties half; both kinds must be there."""
    high, low = score[label], np.sort(score[~label])
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.mean() / (2 * len(low)))


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's, of two arrays of one shape; NaN where one does not vary, and below three values."""
    from ..heads import HeadTable

    one, two = (HeadTable("", ("",), np.asarray(x, float).reshape(1, -1)) for x in (a, b))
    return one.correlation(two)


def rank_correlation_values(a: Any, b: Any) -> Any:
    """Jackknife pseudo-values ``n r - (n - 1) r_i`` of :func:`rank_correlation`, ``[n]``; r_i is without pair i."""
    a, b, n = np.asarray(a, float), np.asarray(b, float), len(a)
    without = [rank_correlation(np.delete(a, i), np.delete(b, i)) for i in range(n)]
    return n * rank_correlation(a, b) - (n - 1) * np.array(without)


def auroc_values(score: Any, label: Any, stratum: Any) -> Any:
    """``[N]``: a value for each entry, whose mean is :func:`auroc` over pairs of the same ``stratum [N]``.

    Strata count by their pairs. A value is that mean and, times N, what the entry adds to its deviation from the truth
    (its placement among the entries of the other label), so that the spread of the values is DeLong's variance, and
    those of two scores on the same entries can be compared in pairs. NaN where no stratum has both labels.
    """
    score, label, stratum = np.asarray(score, float), np.asarray(label, bool), np.asarray(stratum)
    made, total, pairs = np.zeros(len(score)), 0.0, 0
    for each in np.unique(stratum):
        high, low = (np.flatnonzero((stratum == each) & (label == kind)) for kind in (True, False))
        if not (len(high) and len(low)):
            continue
        wins = (score[high, None] > score[low]) + 0.5 * (score[high, None] == score[low])
        mean, weight = wins.mean(), wins.size
        made[high] += weight * (wins.mean(1) - mean) / len(high)
        made[low] += weight * (wins.mean(0) - mean) / len(low)
        total, pairs = total + weight * mean, pairs + weight
    if not pairs:
        return np.full(len(score), np.nan)
    return (total + len(score) * made) / pairs
