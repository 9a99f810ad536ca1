# SPDX-License-Identifier: Apache-2.0
"""Do methods that look for the heads behind a pronoun find the same, and does the pronoun hang on them?

Heads are found on half of the professions. On the others they are patched together from the counterfactual, or ablated,
beside as many random heads of the same layers; the odds of the two pronouns are what moves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ._pronouns import PronounTask, exact

__all__ = ["PronounHeads"]

METHODS = ("gate", "moved", "mean", "zero", "direct", "attribution")  # that are compared with nie


@dataclass(frozen=True, kw_only=True)
class PronounHeads(PronounTask):
    """The arms whose option ``heads`` names heads; the baseline says what the methods share.

    Attributes:
        draws: of random heads.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("stereotyped", "prompts whose stereotype has the likelier pronoun", kind="share"),
        Metric("shared_head", "first heads of CMA that another method shares", higher=True, kind="share"),
        Metric("odds_moved", "log odds moved towards the other pronoun", "nats", higher=True),
    )

    draws: int = 3

    def _arms(self, run: RunContext) -> list[Arm]:
        return [arm for arm in run.arms if arm == run.baseline or arm.options.get("heads", "all") != "all"]

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, arm.key, 10.0 if arm == run.baseline else 1.0, arm.key, {"arm": arm.key}, "located")
            for arm in self._arms(run)
        ]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = run.arm_of(unit)
        if arm == run.baseline:
            yield from self._shared(run, arm)
        prompts = run.kept(("judged", self.judged), lambda: self.asked(run, exact(run), "judged", self.judged))
        names = [(f"{template.format(profession.name)}", profession.name) for profession, template in prompts.asked]
        if arm == run.baseline:
            for (sample, about), odds in zip(names, prompts.odds.tolist(), strict=True):
                yield self.row("stereotyped", arm, odds < 0, sample, context=about)
            run.advance(unit.cost)
            return
        from ...lenses.gender_components import ablation_outputs

        draws = self.draws if arm.options["heads"] == "random" else 1
        for by in ("patched", "mean", "zero"):
            other = prompts.other if by == "patched" else ablation_outputs(prompts, by)
            moved = torch.zeros_like(prompts.odds)
            for draw in range(draws):
                gates = _gates(prompts.runs, self.heads(run, arm, draw))
                moved += (prompts.odds_of(prompts.runs.logits(other, gates)) - prompts.odds) / draws
            for (sample, about), value in zip(names, moved.tolist(), strict=True):
                yield self.row("odds_moved", arm, value, sample, context=about, at={"by": by})
        run.advance(unit.cost)

    def _shared(self, run: RunContext, arm: Arm) -> Iterator[Row]:
        """A row for each of the first heads of CMA and each other method."""
        tables = self.scores(run)
        nie = tables["nie"]
        count = min(self.top, nie.values[0].size // 4)
        for method in METHODS:
            theirs = set(tables[method].top(count))
            for head in nie.top(count):
                (name,) = nie.names([head])
                yield self.row("shared_head", arm, head in theirs, name, at={"with": method})


def _gates(runs: object, heads: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Gates ``[1, H]``, open at ``heads``, of the sites that have any."""
    from ...calls.edits import heads_at
    from ...lenses._patching import PatchedRuns

    assert isinstance(runs, PatchedRuns)
    made = {}
    for site in runs.sites:
        count = runs.outputs[site.name].shape[1]
        if chosen := heads_at(heads, site, count):
            gate = torch.zeros(1, count, device=runs.plain.device)
            gate[0, chosen] = 1.0
            made[site.name] = gate
    return made
