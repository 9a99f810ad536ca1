# SPDX-License-Identifier: Apache-2.0
"""Whether a score that knows no reference goes with the quality of what it scores, and what is kept by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...experiment import Metric
from ...heads import HeadTable

__all__ = ["RANKED", "judged"]

RANKED = (
    Metric(
        "goes_with_quality", "rank correlation of the score with quality",
        what="Spearman's; a value is the product of both ranks' z-scores, whose mean it is",
    ),
    Metric(
        "beyond_length", "rank correlation with quality at equal length",
        what="Spearman's partial correlation: of what the lengths of source and output do not explain of both ranks",
    ),
    Metric(
        "kept_quality", "quality of the better half by the score", higher=True,
        what="mean over the half that the score ranks higher; a value is (2 kept - 1) (quality - mean) + mean",
    ),
)  # fmt: skip


def judged(score: Any, quality: Any, lengths: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Metric and its values ``[N]``, whose mean is the figure.

    Args:
        score: ``[N]``, more where the output is thought better; NaN ranks last.
        quality: ``[N]``, more where it is.
        lengths: ``[N]`` each, by name.
    """
    score = np.asarray(score, float)
    score = np.where(np.isfinite(score), score, np.min(score, initial=0.0, where=np.isfinite(score)) - 1)
    a, b, quality = _ranks(score), _ranks(quality), np.asarray(quality, float)
    yield "goes_with_quality", _z(a) * _z(b)
    known = np.stack([np.ones(len(a)), *(_ranks(x) for x in lengths.values())], 1)
    yield "beyond_length", _z(_left(a, known)) * _z(_left(b, known))
    kept = np.zeros(len(a))
    kept[np.argsort(-score, kind="stable")[: len(a) // 2]] = len(a) / (len(a) // 2)
    yield "kept_quality", quality.mean() + (kept - 1) * (quality - quality.mean())


def _ranks(values: Any) -> Any:
    """From the least, ties shared."""
    return -HeadTable("", ("",), np.asarray(values, float).reshape(1, -1)).ranks()[0]


def _left(values: Any, known: Any) -> Any:
    """What a linear regression on ``known [N, F]`` leaves of ``values [N]``."""
    return values - known @ np.linalg.lstsq(known, values, rcond=None)[0]


def _z(values: Any) -> Any:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 1e-9 * np.abs(values).max(initial=1.0) else 0 * values
