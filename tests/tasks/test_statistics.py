# SPDX-License-Identifier: Apache-2.0
"""Statistics of tasks are those of scipy."""

import numpy as np
from scipy.stats import mannwhitneyu, spearmanr

from manyheads.tasks._statistics import auroc, auroc_values, rank_correlation
from tolerance import nearly


def test_auroc_and_rank_correlation_are_scipys():
    rng = np.random.default_rng(0)
    score, label = rng.integers(0, 6, 50).astype(float), rng.random(50) < 0.4
    expected = mannwhitneyu(score[label], score[~label]).statistic / (label.sum() * (~label).sum())
    assert auroc(score, label) == nearly(expected) and auroc(-score, label) == nearly(1 - expected)
    other = score + rng.normal(size=50)
    assert rank_correlation(score, other) == nearly(spearmanr(score, other).statistic)
    assert rank_correlation(score, other) != nearly(np.corrcoef(score, other)[0, 1])
    assert np.isnan(rank_correlation(score, np.ones(50)))


def test_values_of_auroc_have_its_mean_and_delongs_variance():
    rng = np.random.default_rng(1)
    score, label = rng.integers(0, 9, 80).astype(float), rng.random(80) < 0.4
    score += label
    one = np.zeros(80)
    values = auroc_values(score, label, one)
    assert values.mean() == nearly(auroc(score, label))
    high, low = score[label], score[~label]
    wins = (high[:, None] > low) + 0.5 * (high[:, None] == low)
    delong = wins.mean(1).var() / len(high) + wins.mean(0).var() / len(low)
    assert values.var() / 80 == nearly(delong)
    assert wins.var() / wins.size != nearly(delong)  # as if all pairs were independent
    stratum = rng.integers(0, 3, 80)
    pairs = [int((label & (stratum == k)).sum() * (~label & (stratum == k)).sum()) for k in range(3)]
    each = [auroc(score[stratum == k], label[stratum == k]) for k in range(3)]
    assert auroc_values(score, label, stratum).mean() == nearly(np.average(each, weights=pairs))
    # A score that tells the strata apart and nothing else tells nothing, where it would across them.
    told = (stratum == 0).astype(float)
    assert (
        auroc_values(told, stratum == 0, one).mean() == 1 and np.isnan(auroc_values(told, stratum == 0, stratum)).all()
    )
    assert auroc_values(told, label, stratum).mean() == nearly(0.5)
