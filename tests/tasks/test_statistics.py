# SPDX-License-Identifier: Apache-2.0
"""Statistics of tasks are those of scipy."""

import numpy as np
from scipy.stats import mannwhitneyu, spearmanr

from manyheads.tasks._statistics import auroc, rank_correlation
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
