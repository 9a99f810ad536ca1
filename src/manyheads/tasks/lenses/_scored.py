# SPDX-License-Identifier: Apache-2.0
"""Whether a score that knows no reference goes with the quality of what it scores, and what is kept by it.

The score of an output is an arm's: an ``attention_confidence``, with the option ``without`` less one part of it, with
``shuffled`` that of weights that stand at random source tokens; or by the option ``score`` the mean log-probability of
its tokens (``likelihood``), its shortness (``length``), or a draw (``chance``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...calls.statistics import Statistic
from ...experiment import Arm, Metric, RunContext
from ...heads import HeadTable
from ...lens import AttentionView, LensResult
from ...lenses.attention_confidence import AttentionConfidence, Soft

__all__ = ["RANKED", "by_prompt", "judged", "score_of"]

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


@dataclass(frozen=True, kw_only=True)
class Shuffled(AttentionConfidence):
    """The same of weights that stand at random source tokens, drawn anew for each target token."""

    def statistics(self, view: AttentionView) -> dict[str, Statistic]:
        made: Any = super().statistics(view)["sums"]
        return {"sums": _ShuffledSoft(made.columns, made.rows, made.heads, made.whole)}


class _ShuffledSoft(Soft):
    def update(self, rows: Tensor, start: int, length: int) -> None:
        drawn = torch.rand(rows.shape[0], 1, *rows.shape[2:], generator=torch.Generator().manual_seed(start))
        order = (drawn.to(rows.device) + (~self.columns)[:, None, None]).argsort(-1)  # source tokens come first
        super().update(rows.gather(-1, order.expand_as(rows)), start, length)


def score_of(
    run: RunContext, arm: Arm, seed: int, lengths: Any, likelihood: Callable[[], Any],
    look: Callable[[AttentionConfidence], Mapping[str, Any]], system: int = 0,
) -> Any:  # fmt: skip
    """What an arm thinks of each output, ``[N]``, more where it thinks it better.

    Args:
        run, arm, seed: at hand.
        lengths: ``[N]``, tokens of the outputs.
        likelihood: gives the mean log-probability of each output's tokens.
        look: gives the confidence and its parts through a lens, by name.
        system: which of several systems' outputs these are: chance draws for each.
    """
    score = arm.options.get("score", "")
    if score == "chance":
        return run.rng(score="chance", seed=seed, system=system).permutation(len(lengths)).astype(float)
    if score == "length":
        return -np.asarray(lengths, float)
    if score == "likelihood":
        return np.asarray(likelihood())
    lens: Any = arm.strategy
    if arm.options.get("shuffled"):
        lens = Shuffled(**{f.name: getattr(lens, f.name) for f in fields(lens)})
    seen = look(lens)
    return seen["confidence"] - seen.get(arm.options.get("without", ""), 0.0)


def by_prompt(found: LensResult) -> dict[str, Any]:
    """What ``attention_confidence`` says of each output, ``[N]`` by name."""
    records = sorted(found.records["sentences"], key=lambda record: record["prompt"])
    return {name: np.array([record[name] for record in records]) for name in records[0]}


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
