# SPDX-License-Identifier: Apache-2.0
"""Which heads make a language model expect "he" after a nurse or "she" after a captain: three causal methods.

Chintam, Beloch, Zuidema, Hanna and van der Wal, "Identifying and Adapting Transformer-Components Responsible for Gender
Bias in an English Language Model" (BlackboxNLP 2023). Prompts as "The nurse said that" end before a pronoun; in the
counterfactual the profession is "man" or "woman", of the other gender. At the last token z of a head, its output before
the projection, is replaced by z' of the counterfactual run, and the head's natural indirect effect is

    NIE = mean_i [P_i(anti) / P_i(pro)] / [P(anti) / P(pro)] - 1        (causal mediation analysis, CMA),

pro the pronoun that goes with the stereotype, i under the intervention. The same is measured with z' = 0 and with z'
the mean over the prompts (ablation), one head at a time; scores of the first order take one backward for all heads:

    attribution = d log odds / d g at g = 0, of z + g (z' - z)          (attribution patching)
    direct = (z' - z) W_O[h]^T . d log odds / d h_L                     (past all later layers, straight to the logits)

The other methods are parts of their own: ``gender_components.diff_mask`` learns which few heads do it together
(DiffMask+), ``gender_components.acdc`` takes heads out of the circuit one after the other (ACDC).

    manyheads inspect --model smollm2-135m-instruct --lens gender_components
    scores = GenderComponents().locate(model, tokenizer, manyheads.use).tables["nie"]
    manyheads.use(model, "ablate:heads=" + "+".join(scores.names(scores.top(10))))

Tuning the heads that were found, and nothing else, is ``python -m manyheads.recipes.gender_components``.

Shapes: z ``[N, H, dv]``, W_O ``[D, H * dv]``, h_L ``[N, D]`` the residual stream behind the last block. The paper takes
all 5,083 prompts of GPT-2 small (``prompts=0``); here some are drawn, as many of either gender. Components are heads:
MLPs are not scored. Only the last token is computed anew, which is exact (:mod:`.._patching`). Chosen here: ablations
by zero and by the mean at the last token too; the final norm is linear in ``direct``; where a norm follows the
projection (Gemma 2 and 3, OLMo 2) it is of what goes into that norm. A pronoun of several tokens counts by its first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...causal_lens import CausalLens
from ...errors import UserError
from ...heads import HeadTable, listed
from ...lens import LensResult, table_of
from .._patching import Outputs, ShiftResidual, frozen
from .acdc import Acdc
from .diff_mask import DiffMask
from .prompts import PronounPrompts, drawn

__all__ = ["Acdc", "DiffMask", "GenderComponents", "PronounPrompts", "ablation_outputs", "drawn", "effects",
           "first_order"]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class GenderComponents(CausalLens):
    """What the preference for a pronoun loses when a head is patched from the counterfactual, or ablated.

    Attributes:
        prompts: how many.
        top: heads of each score that are compared.
        seed: of the draw.
    """

    prompts: int = field(default=48, metadata={"help": "prompts, half of either gender; 0 for all 5,083 of the paper"})
    top: int = field(default=10, metadata={"help": "heads of each score that are compared"})
    seed: int = field(default=0, metadata={"help": "of the prompts drawn"})

    def __post_init__(self) -> None:
        if self.prompts < 0 or self.top < 1:
            raise UserError("gender_components: prompts is 0 or more, top 1 or more")

    def locate(self, model: nn.Module, tokenizer: Any, use: Callable[..., Any]) -> LensResult:
        with frozen(model):
            prompts = PronounPrompts(model, tokenizer, use, drawn(self.prompts, self.seed), self.layers)
            zero, mean = (ablation_outputs(prompts, by) for by in ("zero", "mean"))
            tables = {
                "nie": effects(prompts, prompts.other, "natural indirect effect (CMA)"),
                "zero": effects(prompts, zero, "effect of ablation, by zero"),
                "mean": effects(prompts, mean, "effect of ablation, by the mean"),
                **first_order(prompts),
            }
        shift = prompts.odds_of(prompts.other_logits) - prompts.odds
        bias = (prompts.odds < 0).double().mean()
        notes = [
            f"The pronoun of the stereotype is the likelier one in {bias:.0%} of {len(prompts.asked)} prompts; the "
            f"counterfactual moves the log odds by {shift.mean():.2f}.",
            f"Largest indirect effects: {listed(tables['nie'], tables['nie'].top(5))}.",
            *_agreement(tables, self.top),
        ]
        if (dtype := next(model.parameters()).dtype).itemsize < 4:
            notes.append(f"The model computes in {str(dtype)[6:]}, which hides small effects: load it in float32.")
        return LensResult(tables=tables, notes=notes)


def effects(prompts: PronounPrompts, other: Outputs, name: str) -> HeadTable:
    """The effect of each head alone, replaced by ``other``: ``[N, L, H]``."""
    rows: dict[str, list[Tensor]] = {}
    for site, _, logits in prompts.runs.each_head(other):
        rows.setdefault(site.name, []).append(prompts.effect(logits))
    return _table(name, prompts, {site: torch.stack(each, 1) for site, each in rows.items()})


def ablation_outputs(prompts: PronounPrompts, by: str) -> Outputs:
    """What takes a head's place: nothing (``zero``), or its mean over the prompts (``mean``); ``[1, H, dv]`` a site."""
    factor = {"zero": 0.0, "mean": 1.0}[by]
    return {site: factor * z.mean(0, keepdim=True) for site, z in prompts.runs.outputs.items()}


def first_order(prompts: PronounPrompts) -> dict[str, HeadTable]:
    """``attribution`` and, where all output projections are known, ``direct``, from one backward: ``[N, L, H]``."""
    runs = prompts.runs
    gates = {s: z.new_zeros(z.shape[:2], dtype=runs.plain.dtype).requires_grad_() for s, z in runs.outputs.items()}
    weights = {site.name: site.output().detach().to(runs.plain.dtype) for site in runs.sites if site.output is not None}
    known = len(weights) == len(runs.sites)
    width = next(iter(weights.values())).shape[0] if known else 0
    shift = runs.plain.new_zeros(len(runs), width).requires_grad_()
    odds = prompts.odds_of(runs.logits(prompts.other, gates, *([ShiftResidual(by=shift)] if known else []))).sum()
    *slopes, back = torch.autograd.grad(odds, [*gates.values(), shift], allow_unused=not known)
    made = {"attribution": _table("attribution patching", prompts, dict(zip(gates, slopes, strict=True)))}
    if known:
        rows = {}
        for site, z in runs.outputs.items():
            through = (back @ weights[site]).unflatten(1, z.shape[1:])
            rows[site] = ((prompts.other[site] - z) * through).sum(-1)
        made["direct"] = _table("direct effect on the log odds", prompts, rows)
    return made


def _table(name: str, prompts: PronounPrompts, rows: dict[str, Tensor]) -> HeadTable:
    sites = prompts.runs.sites
    return table_of(name, sites, [rows[site.name].double().cpu().numpy() for site in sites], **prompts.about)


def _agreement(tables: dict[str, HeadTable], count: int) -> list[str]:
    """How many of their first heads each two scores share, beside what chance gives."""
    total = int(np.isfinite(tables["nie"].mean).sum())
    count = min(count, total // 2)
    pairs = [f"{one} and {two} {tables[one].overlap(tables[two], count)[0]}" for one, two in combinations(tables, 2)]
    chance = count * count / total
    return [f"Of their first {count} heads two scores share (by chance {chance:.1f}): {', '.join(pairs)}."]
