# SPDX-License-Identifier: Apache-2.0
"""Logistic regression with an L2 penalty, for a few hundred samples and as many features, by Newton's method.

scikit-learn is no dependency; this is the part of it that a classifier over the heads of a model needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Logistic", "cross_scores", "fit_logistic", "folds"]

_PENALTIES = (1.0, 10.0, 100.0, 1000.0)  # on standardised features, of the sum of losses
_STEPS = 50


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
        penalty: half of it times the squared weights is added to the sum of the losses; the one of 1, 10, 100 and
            1,000 that predicts best in threefold cross-validation within these samples when None.
    """
    x, y = np.asarray(x, float), np.asarray(y, bool)
    if penalty is None:
        part = folds(y, 3, rng)
        losses = [
            sum(_loss(_solve(x[part != k], y[part != k], each)(x[part == k]), y[part == k]) for k in range(3))
            for each in _PENALTIES
        ]
        penalty = _PENALTIES[int(np.argmin(losses))]
    return _solve(x, y, penalty)


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


def _solve(x: Any, y: Any, penalty: float) -> Logistic:
    """In the space of the samples: weights of the penalised optimum lie in it, and it is smaller than that of heads."""
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-12, scale, np.inf)
    left, singular, right = np.linalg.svd((x - mean) / scale, full_matrices=False)
    z = np.column_stack([left * singular, np.ones(len(x))])
    ridge = np.append(np.full(len(singular), penalty), 1e-6)  # the bias all but free
    w = np.zeros(z.shape[1])

    def objective(w: Any) -> float:
        return _loss(z @ w, y) + 0.5 * float(ridge @ w**2)

    value = objective(w)
    for _ in range(_STEPS):
        chance = 1 / (1 + np.exp(-np.clip(z @ w, -40, 40)))
        gradient = z.T @ (chance - y) + ridge * w
        curvature = (z * (chance * (1 - chance))[:, None]).T @ z + np.diag(ridge)
        step, length = np.linalg.solve(curvature, gradient), 1.0
        while length > 1e-4 and (new := objective(w - length * step)) > value:
            length /= 2
        if length <= 1e-4 or value - new < 1e-9 * (1 + abs(value)):
            break
        w, value = w - length * step, new
    return Logistic(w[:-1] @ right, float(w[-1]), mean, scale, penalty)
