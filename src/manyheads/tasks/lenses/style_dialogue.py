# SPDX-License-Identifier: Apache-2.0
"""How often a reply follows its instruction as a dialogue grows, and how much the reply attends to it.

A small Llama, one to a seed, learns dialogues whose instruction names the style of the reply
(:mod:`manyheads.data.strategy_dialogue`), of one to four turns, the instruction in front or next to the last message,
half and half. It is judged under every arm's layout, the option ``form``: at all numbers of turns under the baseline's,
at the greatest under the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...data.strategy_dialogue import VOCAB, Form, strategy_dialogues
from ...experiment import Metric, Row, RunContext, WorkUnit
from ...training import train_lm
from .._statistics import rank_correlation
from ._trained import TrainedTask, llama, told

__all__ = ["StyleDialogue"]

_LEARNED_TURNS = 4  # most turns of a dialogue in training


@dataclass(frozen=True, kw_only=True)
class StyleDialogue(TrainedTask):
    """Accuracy, SRA and lift for each dialogue; rank correlations over turns for each training.

    Controls: two tokens of noise beside the instruction, which share its place but not its meaning, and the last layer
    alone.

    Attributes:
        dim, layers: of the model.
        batch: dialogues of a step.
        words: of a message.
        turns: to judge at, ascending.
        dialogues: to judge by, at each number of turns.
    """

    apart: ClassVar[bool] = False
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", "replies that follow the instruction", higher=True, kind="share"),
        Metric("sra", "share of attention on the instruction (SRA)"),
        Metric("lift", "attention on the instruction over that on as many tokens (lift)"),
        Metric("sra_beside", "share of attention on noise beside the instruction"),
        Metric("sra_last_layer", "share of attention on the instruction, last layer"),
        Metric("goes_with_accuracy", "rank correlation over turns with accuracy, 0 where that is constant"),
    )

    dim: int = 64
    layers: int = 2
    batch: int = 64
    words: int = 6
    turns: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16, 20)
    dialogues: int = 128

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed = unit.params["seed"]
        model = self._learned(run, unit, seed)
        curves: dict[str, list[float]] = {}
        for arm in run.arms:
            for turns in self.turns if arm == run.baseline else self.turns[-1:]:
                found = self._judged(run, model, arm.options.get("form", "standard"), turns)
                for name, values in found.items():
                    if arm == run.baseline:
                        curves.setdefault(name, []).append(float(values.mean()))
                    yield from self.each(name, arm, values, seed=seed, at={"turns": turns})
        right = curves.pop("accuracy")
        for name, curve in curves.items():
            together = rank_correlation(right, curve)
            value = together if np.isfinite(together) else 0.0  # what does not vary goes with nothing
            yield self.row("goes_with_accuracy", run.baseline, value, "turns", seed=seed, at={"of": name})

    def _learned(self, run: RunContext, unit: WorkUnit, seed: int) -> Any:
        def draw(step: int) -> tuple[Tensor, Tensor]:
            form: Form = "standard" if step // _LEARNED_TURNS % 2 else "c1_hf"
            source = run.torch_rng(train="style_dialogue", seed=seed, step=step)
            ids = strategy_dialogues(self.batch, 1 + step % _LEARNED_TURNS, form, source, self.words).ids
            reply = torch.zeros(self.batch, ids.shape[1] - 1, dtype=torch.bool)
            reply[:, -2:] = True
            return ids.to(run.device), reply.to(run.device)

        model = llama(run, VOCAB, self.dim, self.layers, 4, seed)
        train_lm(model, draw, self.steps, lr=3e-3, weight_decay=0.01, on_step=told(run, unit, self.steps))
        return model

    def _judged(self, run: RunContext, model: Any, form: Form, turns: int) -> dict[str, Any]:
        """Of every dialogue ``[N]``."""
        import manyheads

        from ...lenses.strategy_attention import sra

        source = run.torch_rng(test="style_dialogue", turns=turns)
        made = strategy_dialogues(self.dialogues, turns, form, source, self.words)
        ids = made.ids.to(run.device)
        length = ids.shape[1]
        roles = manyheads.TokenSpans(
            {"system": [[made.system]], "beside": [[made.beside]], "response": [[(length - 3, length - 1)]]}
        )
        lenses = ("strategy_attention", "strategy_attention:span=beside")
        with manyheads.watch(model, *lenses, roles=roles) as seen, torch.no_grad():
            best = model(ids).logits[:, -3:-1].argmax(-1)
        tables, beside = seen.compute(0).tables, seen.compute(1).tables
        return {
            "accuracy": (best == ids[:, -2:]).all(1).double().cpu().numpy(), "sra": sra(tables["sra"]),
            "lift": sra(tables["lift"]), "sra_beside": sra(beside["sra"]),
            "sra_last_layer": tables["sra"].values[:, -1].mean(-1),
        }  # fmt: skip
