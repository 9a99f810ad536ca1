# SPDX-License-Identifier: Apache-2.0
"""Rates of a detector at a threshold, each also as a value for every sample, of which intervals are made."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["equal_error_rate", "equal_error_rate_values"]


def _threshold(score: Any, label: Any) -> float:
    """The score from which on "yes" is said, where the shares of misses and of false alarms are nearest."""
    at = np.unique(score)  # and above all of them
    edges = np.append(at, np.inf)
    misses = np.searchsorted(np.sort(score[label]), edges, "left") / label.sum()
    alarms = 1 - np.searchsorted(np.sort(score[~label]), edges, "left") / (~label).sum()
    return float(edges[np.abs(misses - alarms).argmin()])


def equal_error_rate_values(score: Any, label: Any) -> Any:
    """``[N]``: a value for each sample, whose mean is :func:`equal_error_rate`.

    A sample that is judged wrongly at that threshold has N over twice the number of its label, another has 0. The
    spread of the values is that of the two shares of errors at a threshold that is held. NaN where a label is missing.
    """
    score, label = np.asarray(score, float), np.asarray(label, bool)
    if label.all() or not label.any():
        return np.full(len(score), np.nan)
    wrong = (score >= _threshold(score, label)) != label
    return wrong * len(score) / (2 * np.where(label, label.sum(), (~label).sum()))


def equal_error_rate(score: Any, label: Any) -> float:
    """Mean of the shares of misses and of false alarms at the threshold where they are nearest.

    Args:
        score: ``[N]``, higher for what should be labelled.
        label: ``[N]``, both kinds must be there.
    """
    return float(equal_error_rate_values(score, label).mean())
