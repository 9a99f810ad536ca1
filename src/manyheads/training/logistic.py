# SPDX-License-Identifier: Apache-2.0
"""Logistic regression with an L2 penalty, for a few hundred samples and as many features.

scikit-learn is no dependency; this is the part of it that a classifier over the heads of a model needs. Along the
principal axes of the features the curvature of the loss is at most a diagonal, a quarter of their squared singular
values: steps by it cost no more than a gradient, and Nesterov's acceleration makes some hundred of them do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Logistic", "cross_scores", "fit_logistic", "folds"]

_PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)  # on standardised features, of the sum of losses
_STEPS, _STOP = 5000, 1e-7  # at most; root of the mean squared gradient of a sample


@dataclass(frozen=True)
class Logistic:
    """A fitted classifier.

    Attributes:
        weights: ``[F]`` of standardised features.
        bias: added.
        mean, scale: ``[F]`` of the features it was fitted on.
        penalty: that was chosen.
    """

    weights: Any
    bias: float
    mean: Any
    scale: Any
    penalty: float

    def __call__(self, x: Any) -> Any:
        """Log-odds of ``x [N, F]``, ``[N]``."""
        return (np.asarray(x, float) - self.mean) / self.scale @ self.weights + self.bias


def fit_logistic(x: Any, y: Any, rng: Any, penalty: float | None = None) -> Logistic:
    """Fit labels ``y [N]`` (bool) by features ``x [N, F]``.

    Args:
        x: features; those that do not vary get no weight.
        y: labels of both kinds.
        rng: NumPy's generator of the parts of the inner cross-validation.
        penalty: half of it times the squared weights is added to the sum of the losses; the one of 1, 10, ... and
            10,000 that predicts best in threefold cross-validation within these samples when None.
    """
    x, y = np.asarray(x, float), np.asarray(y, bool)
    if penalty is None:
        part, losses = folds(y, 3, rng), np.zeros(len(_PENALTIES))
        for k in range(3):
            fitted = _fits(x[part != k], y[part != k], _PENALTIES)
            losses += [_loss(each(x[part == k]), y[part == k]) for each in fitted]
        penalty = _PENALTIES[int(np.argmin(losses))]
    return _fits(x, y, [penalty])[0]


def folds(y: Any, count: int, rng: Any) -> Any:
    """A part for each of ``y [N]``, ``[N]`` of 0 to ``count - 1``: every value of y is spread evenly over all."""
    part = np.empty(len(y), int)
    for value in np.unique(y):
        mine = np.flatnonzero(np.asarray(y) == value)
        part[rng.permutation(mine)] = (np.arange(len(mine)) + rng.integers(count)) % count
    return part


def cross_scores(x: Any, y: Any, part: Any, rng: Any) -> Any:
    """Log-odds ``[N]`` of each sample by a classifier that was fitted on the other parts."""
    made = np.empty(len(y))
    for k in np.unique(part):
        made[part == k] = fit_logistic(x[part != k], y[part != k], rng)(x[part == k])
    return made


def _loss(logits: Any, y: Any) -> float:
    return float(np.logaddexp(0, np.where(y, -logits, logits)).sum())


def _fits(x: Any, y: Any, penalties: Sequence[float]) -> list[Logistic]:
    """A classifier for each penalty; the weights of the optimum lie in the space of the samples."""
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-12, scale, np.inf)
    left, singular, right = np.linalg.svd((x - mean) / scale, full_matrices=False)
    kept = singular > 1e-9 * singular[0]
    left, singular, right = left[:, kept], singular[kept], right[kept]
    z = np.column_stack([left * singular, np.ones(len(x))])  # columns at right angles
    made = []
    for penalty in penalties:
        ridge = np.append(np.full(len(singular), penalty), 0.0)
        step = 1 / (np.append(singular**2, len(x)) / 4 + ridge)
        w = ahead = np.zeros(z.shape[1])
        momentum = 1.0
        for _ in range(_STEPS):
            gradient = z.T @ (1 / (1 + np.exp(-np.clip(z @ ahead, -500, 500))) - y) + ridge * ahead
            new, pace = ahead - step * gradient, (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            if gradient @ (new - w) > 0:  # uphill: the momentum is let go
                pace = 1.0
                momentum = 1.0
            ahead, w, momentum = new + (momentum - 1) / pace * (new - w), new, pace
            if gradient @ gradient < (_STOP * len(x)) ** 2:
                break
        made.append(Logistic(w[:-1] @ right, float(w[-1]), mean, scale, penalty))
    return made
