# SPDX-License-Identifier: Apache-2.0
"""Scores of tokens that arms stand for: WAAD and FAI of the attention, entropy of the prediction, and blind draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...experiment import Arm, RunContext

__all__ = ["peaks_of", "score_of", "scores"]

PEAKS = 0.1  # share of the tokens that are peaks


def scores(
    run: RunContext, model: Any, ids: Tensor, first: int, number: int = 0
) -> tuple[list[dict[str, Any]], Tensor]:  # fmt: skip
    """Scores of each row of ``ids [N, T]`` by name, ``[T]``, NaN where there is none; the logits, on the CPU.

    Args:
        run: gives the blind draws.
        model: whose attention and predictions are looked at, row by row.
        ids: tokens.
        first: token from which on a response goes, to the last.
        number: of the first row, which tells its blind draws from those of others.
    """
    import manyheads

    roles = manyheads.TokenSpans({"response": [[(first, ids.shape[1])]]})
    with manyheads.watch(model, "reasoning_rhythm", roles=roles) as seen, torch.no_grad():
        logits = torch.cat([model(rows).logits.float().cpu() for rows in ids.split(8)])
    series = seen.compute().series
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).double().numpy()
    made = []
    for n in range(len(ids)):
        fai = np.array(series["fai"][n], float)
        fai[0] = np.nan  # the start is no candidate
        blind = run.rng(scores="blind", row=number + n).random(ids.shape[1])
        found = {"waad": np.array(series["waad"][n], float), "fai": fai, "entropy": entropy[n], "random": blind}
        made.append({name: np.where(np.isfinite(fai), score, np.nan) for name, score in found.items()})
    return made, logits


def peaks_of(score: Any) -> Any:
    """Which tokens of a score ``[T]`` are its peaks, bool ``[T]``."""
    from ...lenses.reasoning_rhythm import peaks

    return peaks(torch.from_numpy(score)[None], PEAKS)[0].numpy()


def score_of(arm: Arm) -> str:
    """The score that an arm stands for, its option ``score``; blind draws without one."""
    return str(arm.options.get("score", "random"))
