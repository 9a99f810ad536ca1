# SPDX-License-Identifier: Apache-2.0
"""Errors of a detector at a threshold that its scores choose, as a value for every sample: intervals are made of them.

``score [N]`` is higher for what should be labelled, ``label [N]`` is a bool; both labels occur, or NaN is stated.
"""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["detection_cost", "eer_errors", "equal_error_rate_values"]


def _rates(score: Any, label: Any) -> tuple[Any, Any, Any]:
    """Every threshold from which on "yes" can be said, and the shares of misses and of false alarms at each."""
    edges = np.append(np.unique(score), np.inf)  # and above all of them
    yes, no = np.sort(score[label]), np.sort(score[~label])
    misses = np.searchsorted(yes, edges, "left") / len(yes)
    return edges, misses, 1 - np.searchsorted(no, edges, "left") / len(no)


def eer_errors(score: Any, label: Any) -> Any:
    """Which samples are judged wrongly where the shares of misses and of false alarms are nearest, bool ``[N]``.

    Their share is an equal error rate: the two shares differ by less than one sample of the rarer label unless scores
    are tied.
    """
    score, label = np.asarray(score, float), np.asarray(label, bool)
    edges, misses, alarms = _rates(score, label)
    return (score >= edges[np.abs(misses - alarms).argmin()]) != label


def equal_error_rate_values(score: Any, label: Any) -> Any:
    """``[N]``: a value for each sample, whose mean is that of the shares of misses and of false alarms at that place.

    A sample that is judged wrongly has N over twice the number of its label, another has 0: one of :func:`eer_errors`
    where labels are as many. The spread of the values is that of the two shares of errors at a threshold that is held.
    NaN where a label is missing.
    """
    label = np.asarray(label, bool)
    if label.all() or not label.any():
        return np.full(len(label), np.nan)
    return eer_errors(score, label) * len(label) / (2 * np.where(label, label.sum(), (~label).sum()))


def detection_cost(score: Any, label: Any, target: float = 0.1) -> Any:
    """What each sample adds to the least normalised detection cost, ``[N]``: their mean is minDCF.

    Cost of a miss and of a false alarm 1, ``target`` is the prior of the label; 1 is that of a system that says the
    likelier of the two to all samples.
    """
    score, label = np.asarray(score, float), np.asarray(label, bool)
    edges, misses, alarms = _rates(score, label)
    wrong = (score >= edges[(target * misses + (1 - target) * alarms).argmin()]) != label
    each = np.where(label, target / label.sum(), (1 - target) / (~label).sum()) * len(label) / min(target, 1 - target)
    return wrong * each
