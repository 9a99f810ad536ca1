# SPDX-License-Identifier: Apache-2.0
"""Statistics that several tasks make a value of."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["auroc", "rank_correlation"]


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
