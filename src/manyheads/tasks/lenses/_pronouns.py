# SPDX-License-Identifier: Apache-2.0
"""Heads that a model's choice of a pronoun hangs on, found on some professions and judged on the others."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

import manyheads

from ...data.gender_bias import Profession, professions
from ...errors import refusal
from ...experiment import Arm, CausalLM, RunContext, seeding
from ...heads import Head, HeadTable, layer_matched_heads
from ..text._text_task import model_of
from ._windows import WindowTask

if TYPE_CHECKING:
    from ...lenses.gender_components import PronounPrompts

__all__ = ["PronounTask", "exact"]


def exact(run: RunContext) -> Any:
    """A float32 copy of the subject's model: log odds of pronouns are smaller than what bfloat16 rounds away."""
    return run.kept("float32 copy", lambda: copy.deepcopy(model_of(run)).float().eval())


@dataclass(frozen=True, kw_only=True)
class PronounTask(WindowTask):
    """Base of the tasks on pronouns behind professions.

    Half of the professions of either gender are for finding heads, the others for judging; a run draws which.
    ``options`` of an arm: ``heads``, the score by which its heads are chosen (``nie``, ``mean``, ``zero``, ``gate``,
    ``moved``, ``direct``, ``attribution``), ``random`` for as many others of the layers of those of ``nie``.

    Attributes:
        prompts: that heads are found on.
        judged: prompts that arms are judged on, about other professions.
        top: heads that are chosen.
        mask_steps: of DiffMask+.
    """

    prompts: int = 64
    judged: int = 96
    top: int = 10
    mask_steps: int = 270

    def unsupported_reason(self, run: RunContext) -> str | None:
        if reason := super().unsupported_reason(run):
            return reason
        from ...lenses.gender_components.prompts import pronouns

        return refusal(professions, lambda: pronouns(cast(CausalLM, run.subject).tokenizer))

    def part(self, run: RunContext, use: str) -> list[Profession]:
        """Professions of a use: ``found`` or ``judged``."""
        known = professions()
        order = [known[i] for i in run.rng(professions="half").permutation(len(known))]
        chosen: list[Profession] = []
        for male in (True, False):
            mine = [profession for profession in order if profession.male == male]
            half = len(mine) // 2
            chosen += mine[:half] if use == "found" else mine[half:]
        return chosen

    def asked(self, run: RunContext, model: Any, use: str, count: int) -> PronounPrompts:
        """``count`` prompts about professions of a use, read by ``model``."""
        from ...lenses.gender_components import PronounPrompts, drawn

        tokenizer = cast(CausalLM, run.subject).tokenizer
        asked = drawn(count, seeding.number(run.seed, prompts=use), self.part(run, use))
        return PronounPrompts(model, tokenizer, manyheads.use, asked)

    def scores(self, run: RunContext) -> Mapping[str, HeadTable]:
        """Every score of heads, by its name, on the professions that heads are found on."""

        def locate() -> dict[str, HeadTable]:
            from ...lenses._patching import frozen
            from ...lenses.gender_components import Acdc, DiffMask, ablation_outputs, effects, first_order

            model = exact(run)
            with frozen(model), torch.enable_grad():
                prompts = self.asked(run, model, "found", self.prompts)
                tables = {"nie": effects(prompts, prompts.other, "NIE"), **first_order(prompts)}
                for by in ("zero", "mean"):
                    tables[by] = effects(prompts, ablation_outputs(prompts, by), by)
                mask = DiffMask(k=self.top, steps=self.mask_steps, seed=run.seed)
                tables["gate"] = mask.fitted([prompts]).tables["gate"]
                tables["moved"] = Acdc().pruned(prompts).tables["moved"]
            return tables

        return cast(dict[str, HeadTable], run.kept(("pronoun heads", self.prompts, self.top, self.mask_steps), locate))

    def heads(self, run: RunContext, arm: Arm, draw: int = 0) -> tuple[str, ...]:
        """The heads of an arm, as ``layer.head``; those of the draw of that number where they are random."""
        how = str(arm.options["heads"])
        table = self.scores(run)["nie" if how == "random" else how]
        best: list[Head] = table.top(min(self.top, table.values[0].size // 4))
        if how == "random":
            seed = seeding.number(run.seed, random="heads", draw=draw)
            best = layer_matched_heads(best, table.values.shape[2], seed, best)
        return table.names(best)
