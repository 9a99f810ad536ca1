# SPDX-License-Identifier: Apache-2.0
"""Prompts that end before a pronoun, each beside its counterfactual, and the log odds of the two pronouns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...data.gender_bias import TEMPLATES, Profession, professions
from ...errors import UserError
from ...strategy import Layers
from .._patching import Outputs, PatchedRuns, padded

__all__ = ["Asked", "PronounPrompts", "drawn", "pronouns"]

Asked = tuple[Profession, str]  # a profession and the template that it stands in


def drawn(count: int, seed: int, among: Sequence[Profession] | None = None) -> list[Asked]:
    """Prompts in an order that ``seed`` draws, professions of men and of women by turns; all in their order for 0.

    Args:
        count: of prompts; no pair of profession and template comes twice before all have come.
        seed: of the draw.
        among: professions; all of them when None.
    """
    known = list(professions() if among is None else among)
    if not count:
        return [(profession, template) for template in TEMPLATES for profession in known]
    source = np.random.default_rng(seed)
    sides = []
    for male in (True, False):
        mine = [profession for profession in known if profession.male == male]
        order = [mine[i] for i in source.permutation(len(mine))]
        start = int(source.integers(len(TEMPLATES)))
        rounds = [(order, start + shift) for shift in range(len(TEMPLATES))]
        sides.append([
            (p, TEMPLATES[(i + first) % len(TEMPLATES)]) for order, first in rounds for i, p in enumerate(order)
        ])  # fmt: skip
    mixed = [each for both in zip(*sides, strict=False) for each in both]
    if count > len(mixed):
        raise UserError(f"{len(known)} professions give {len(mixed)} balanced prompts, not {count}: 0 takes all")
    return mixed[:count]


def pronouns(tokenizer: Any) -> tuple[int, int]:
    """The first tokens of " he" and " she".

    Raises:
        UserError: they are the same.
    """
    he, she = (tokenizer.encode(word, add_special_tokens=False)[0] for word in (" he", " she"))
    if he == she:
        raise UserError("the tokenizer has the same first token for ' he' and ' she': this model cannot be asked")
    return he, she


class PronounPrompts:
    """Prompts that were read, with what their counterfactuals give.

    A profession taken for a man's is replaced by "woman", one taken for a woman's by "man"; the pronoun that goes with
    the stereotype is ``pro``, the other ``anti``.

    Attributes:
        asked: profession and template of each.
        runs: of the prompts.
        other: outputs of the heads in the counterfactual prompts, ``[N, H, dv]`` by site.
        other_logits: there, ``[N, V]``.
        odds: ``log P(anti) / P(pro)`` as the model is, ``[N]``.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, use: Callable[..., Any], asked: Sequence[Asked], layers: Layers = None
    ) -> None:  # fmt: skip
        self.asked = list(asked)
        texts = [template.format(profession.name) for profession, template in asked]
        turned = [template.format("woman" if profession.male else "man") for profession, template in asked]
        beside = PatchedRuns(model, use, padded(model, tokenizer, turned), layers)
        self.runs = PatchedRuns(model, use, padded(model, tokenizer, texts), layers)
        self.other: Outputs = beside.outputs
        self.other_logits = beside.plain
        he, she = pronouns(tokenizer)
        male = torch.tensor([profession.male for profession, _ in asked], device=self.runs.plain.device)
        self.pro, self.anti = torch.where(male, he, she), torch.where(male, she, he)
        self.odds = self.odds_of(self.runs.plain)

    @property
    def about(self) -> dict[str, int]:
        """What tables of scores were measured on: prompts, and tokens of the longest."""
        return {"prompts": len(self.asked), "tokens": self.runs.length}

    def odds_of(self, logits: Tensor) -> Tensor:
        """``log P(anti) / P(pro)`` of logits ``[N, V]``; what is added to all logits does not count."""
        return (logits.gather(1, self.anti[:, None]) - logits.gather(1, self.pro[:, None]))[:, 0]

    def effect(self, logits: Tensor) -> Tensor:
        """``[P_i(anti) / P_i(pro)] / [P(anti) / P(pro)] - 1`` of logits under an intervention, ``[N]``."""
        return torch.expm1(self.odds_of(logits) - self.odds)
