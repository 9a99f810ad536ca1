# SPDX-License-Identifier: Apache-2.0
"""Detectors of made-up answers: scores that are greater where an answer is likelier wrong.

Some need no training: entropy and log-probability of the answer's tokens, their attention on the source and back over
the prompt. Three are logistic regressions: on what the logits say (``uncertainty``), on source mass and lookback ratio
of every layer and head (``attention``, as Lookback Lens, arXiv 2407.07071), and on ``both``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..training.logistic import cross_scores, fit_logistic, folds
from .answers import Answer

__all__ = ["CLASSIFIERS", "UNTRAINED", "JudgedAnswers", "judged", "split"]

UNTRAINED: dict[str, Callable[[Answer], float]] = {
    "entropy": lambda a: float(a.entropy.mean()),
    "highest entropy": lambda a: float(a.entropy.max()),
    "log-probability": lambda a: float(-a.logprob.mean()),
    "least probability": lambda a: float(-a.logprob.min()),
    "source mass": lambda a: float(-a.mass.mean()),
    "lookback": lambda a: float(-a.lookback.mean()),
}
CLASSIFIERS = ("uncertainty", "attention", "both")
_PARTS = 3  # of the answers a classifier is fitted on, for scores of answers that it did not see


@dataclass(frozen=True)
class JudgedAnswers:
    """Answers as arrays over N of them.

    Attributes:
        wrong: bool ``[N]``.
        kind, level, origin: ``[N]`` of the questions; levels as ``kind/level``; what has one origin is not independent.
        confidence: ``[N]`` probabilities of the answers.
        untrained: scores ``[N]`` of the detectors that need no training.
        features: ``[N, F]`` of each classifier; ``level`` knows the question's alone, the control of the others.
    """

    wrong: Any
    kind: Any
    level: Any
    origin: Any
    confidence: Any
    untrained: dict[str, Any]
    features: dict[str, Any]

    def parts(self, count: int, rng: Any) -> Any:
        """``[N]`` of 0 to ``count - 1``: parts that have as many of every kind, right and wrong, by chance."""
        return folds(np.unique([f"{k}/{w}" for k, w in zip(self.kind, self.wrong, strict=True)], False, True)[1],
                     count, rng)  # fmt: skip

    def crossed(self, name: str, part: Any, rng: Any, wrong: Any = None) -> Any:
        """Scores ``[N]``, those of a classifier fitted on the other parts, to labels other than the true if given."""
        if name in self.untrained:
            return self.untrained[name]
        return cross_scores(self.features[name], self.wrong if wrong is None else wrong, part, rng)

    def scores(self, name: str, fit: Any, use: Any, rng: Any) -> tuple[Any, Any]:
        """Scores of the answers ``fit`` and ``use`` (indices), no classifier having seen what it scores or ``use``."""
        if name in self.untrained:
            return self.untrained[name][fit], self.untrained[name][use]
        x, y = self.features[name][fit], self.wrong[fit]
        own = cross_scores(x, y, folds(y, _PARTS, rng), rng)
        return own, fit_logistic(x, y, rng)(self.features[name][use])


def judged(answers: Sequence[Answer]) -> JudgedAnswers:
    """The arrays of ``answers``."""
    uncertainty = np.array([
        [a.entropy.mean(), a.entropy.max(), a.entropy[0], a.logprob.mean(), a.logprob.min(), len(a.tokens)]
        for a in answers
    ])  # fmt: skip
    heads = np.array([a.heads.ravel() for a in answers])
    heads = np.where(np.isfinite(heads), heads, 0.0)  # layers have different numbers of heads in some models
    features = dict(zip(CLASSIFIERS, (uncertainty, heads, np.column_stack([uncertainty, heads])), strict=True))
    level = np.array([f"{a.question.kind}/{a.question.level}" for a in answers])
    return JudgedAnswers(
        np.array([not a.right for a in answers]), np.array([a.question.kind for a in answers]), level,
        np.array([a.question.origin or f"question {i}" for i, a in enumerate(answers)]),
        np.array([a.confidence for a in answers]),
        {name: np.array([score(a) for a in answers]) for name, score in UNTRAINED.items()},
        {**features, "level": (level[:, None] == np.unique(level)).astype(float)},
    )  # fmt: skip


def split(count: int, rng: Any) -> tuple[Any, Any]:
    """Indices of two random halves of ``count``, the first no larger."""
    order = rng.permutation(count)
    return order[: count // 2], order[count // 2 :]
