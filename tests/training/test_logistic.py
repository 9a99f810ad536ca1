# SPDX-License-Identifier: Apache-2.0
"""Penalised logistic regression: its optimum, scores of unseen samples, and nothing learned from noise."""

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as loss

from manyheads.tasks._statistics import auroc
from manyheads.training.logistic import cross_scores, fit_logistic, folds
from tolerance import is_close, is_far


def samples(n, f, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(2.0, 3.0, (n, f))
    return x, x[:, 0] - x[:, 1] + rng.normal(size=n) * 3 > 0, rng


def test_is_the_optimum_that_autograd_finds():
    """Fewer features than samples and more; a feature that does not vary gets no weight."""
    for n, f in ((60, 4), (30, 50)):
        x, y, rng = samples(n, f)
        x[:, -1] = 1.5
        found = fit_logistic(x, y, rng, penalty=10.0)
        z = torch.tensor((x - x.mean(0)) / np.where(x.std(0) > 0, x.std(0), np.inf))
        w = torch.tensor(found.weights, requires_grad=True)
        b = torch.tensor(found.bias, dtype=torch.float64, requires_grad=True)
        target = torch.tensor(y).double()
        (loss(z @ w + b, target, reduction="sum") + 5.0 * w.pow(2).sum()).backward()
        assert float(w.grad.abs().max()) < 1e-3 and abs(float(b.grad)) < 1e-3 and found.weights[-1] == 0
        assert is_close(found(x), (z @ w + b).detach())
        other = fit_logistic(x, y, rng, penalty=1.0)
        w.grad = None
        (loss(z @ torch.tensor(other.weights) + w * 0 @ w + other.bias, target) * 0).backward()
        assert is_far(other.weights, found.weights, 1e-2)


def test_cross_validation_tells_signal_from_noise():
    x, y, rng = samples(120, 40)
    part = folds(y, 4, rng)
    assert (
        max(np.bincount(part)) - min(np.bincount(part)) <= 2
        and max(np.bincount(part[y])) - min(np.bincount(part[y])) <= 1
    )
    told = auroc(cross_scores(x, y, part, rng), y)
    noise = [auroc(cross_scores(x, made := rng.permutation(y), folds(made, 4, rng), rng), made) for _ in range(4)]
    seen = auroc(fit_logistic(x, made := rng.permutation(y), rng, penalty=1.0)(x), made)
    assert told > 0.75 and abs(np.mean(noise) - 0.5) < 0.12
    assert seen > 0.8  # a classifier judged on what it was fitted on tells noise too


def test_the_penalty_grows_where_there_is_nothing_to_learn():
    x, y, rng = samples(90, 30)
    assert fit_logistic(x, rng.permutation(y), rng).penalty >= fit_logistic(x, y, rng).penalty
