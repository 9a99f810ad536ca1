# SPDX-License-Identifier: Apache-2.0
"""Not to answer where a score is too high: thresholds with guarantees, and what answering more costs.

Scores are greater where an answer is likelier wrong; an answer is given where its score is at most the threshold.

- :func:`conformal_threshold` bounds false alarms: a right answer is held back with probability ``alarm`` at most, over
  calibration and use together (split conformal prediction).
- :func:`controlled_threshold` bounds the risk of what is answered: with probability ``1 - delta`` over the calibration,
  answers given are wrong with probability ``risk`` at most. Candidates, fixed beforehand, are tested from the strictest
  on by the exact binomial bound, and the first that fails ends it (fixed-sequence testing; Learn then Test, arXiv
  2110.01052), so that nothing is paid for testing many.

Both need answers to come that are like those of the calibration (exchangeable; independent, for the second).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import UserError
from .risk_bounds import binomial_cdf

__all__ = ["area", "calibration_error", "candidates", "conformal_threshold", "controlled_threshold", "risk_coverage"]

_COVERAGES = np.arange(4, 21) / 20  # shares answered that candidates aim at


def conformal_threshold(scores: Any, alarm: float) -> float:
    """The ``ceil((m + 1)(1 - alarm))``-th smallest of the m ``scores`` of right answers; infinite where m is too small.

    Raises:
        UserError: ``alarm`` is no probability between 0 and 1.
    """
    if not 0 < alarm < 1:
        raise UserError(f"a share of false alarms lies between 0 and 1, not {alarm}")
    ordered = np.sort(np.asarray(scores, float))
    rank = math.ceil((len(ordered) + 1) * (1 - alarm) - 1e-9)
    return float(ordered[rank - 1]) if rank <= len(ordered) else math.inf


def candidates(scores: Any) -> Any:
    """Thresholds at which a fifth to all of ``scores``, none of them used for the calibration, would be answered."""
    return np.unique(np.quantile(np.asarray(scores, float), _COVERAGES, method="higher"))


def controlled_threshold(scores: Any, wrong: Any, tried: Any, risk: float, delta: float = 0.1) -> float:
    """The loosest threshold whose answers are wrong with probability ``risk`` at most; ``-inf`` where none is shown.

    Args:
        scores: ``[N]`` of answers for calibration.
        wrong: bool ``[N]``.
        tried: thresholds, see :func:`candidates`; chosen without these answers.
        risk: bound of the share of wrong ones among the answers given.
        delta: probability with which that may fail.
    """
    scores, wrong, chosen = np.asarray(scores, float), np.asarray(wrong, bool), -math.inf
    for threshold in np.sort(tried):
        given = scores <= threshold
        # The exact upper bound is at most the risk where so few errors are so unlikely at it.
        if not given.any() or binomial_cdf(int(wrong[given].sum()), int(given.sum()), risk) > delta:
            break
        chosen = float(threshold)
    return chosen


def risk_coverage(scores: Any, wrong: Any) -> tuple[Any, Any]:
    """Shares answered, ascending, and of wrong ones among them, one for each score; ties are given at once."""
    scores, wrong = np.asarray(scores, float), np.asarray(wrong, float)
    order = np.argsort(scores, kind="stable")
    last = np.append(np.diff(scores[order]) > 0, True)
    count = np.flatnonzero(last) + 1
    return count / len(scores), np.cumsum(wrong[order])[last] / count


def area(coverage: Any, risk: Any) -> float:
    """Area under the curve of risk over coverage: the mean risk over all shares that could be answered."""
    return float((np.diff(coverage, prepend=0.0) * risk).sum())


def calibration_error(confidence: Any, right: Any, bins: int = 10) -> float:
    """Expected calibration error: over bins of equal width, the mean distance of confidence from the share right."""
    confidence, right = np.asarray(confidence, float), np.asarray(right, float)
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    gap = np.bincount(place, confidence, bins) - np.bincount(place, right, bins)
    return float(np.abs(gap).sum() / count.sum())
