# SPDX-License-Identifier: Apache-2.0
"""ACDC (Conmy et al., arXiv 2304.14997) with heads as its nodes: what can be patched without a loss leaves the circuit.

From the last layer to the first, every head is patched from the counterfactual on top of all heads that have left
before. If that moves the mean log odds of the two pronouns by less than ``threshold`` it stays patched and so has left;
the others are the circuit. The score of a head is how far the odds moved when its turn came.

The original prunes edges, with keys, queries and values apart, and the paper adds heads and MLPs that keep an edge.
Here an edge is a head's whole output at the last token, into all that reads it. The paper names no threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...causal_lens import CausalLens
from ...errors import UserError
from ...lens import LensResult, table_of
from .._patching import frozen
from .prompts import PronounPrompts, drawn

__all__ = ["Acdc"]


@dataclass(frozen=True, kw_only=True)
class Acdc(CausalLens):
    """Heads that cannot be patched from the counterfactual without moving the odds, in the presence of those that can.

    Attributes:
        threshold: in nats.
        prompts: how many.
        seed: of the draw.
    """

    threshold: float = field(default=0.01, metadata={"help": "nats of the mean log odds below which a head leaves"})
    prompts: int = field(default=32, metadata={"help": "prompts, half of either gender; 0 for all"})
    seed: int = field(default=0, metadata={"help": "of the prompts drawn"})

    def __post_init__(self) -> None:
        if self.threshold < 0 or self.prompts < 0:
            raise UserError("gender_components.acdc: threshold and prompts are 0 or more")

    def locate(self, model: nn.Module, tokenizer: Any, use: Callable[..., Any]) -> LensResult:
        with frozen(model):
            return self.pruned(PronounPrompts(model, tokenizer, use, drawn(self.prompts, self.seed), self.layers))

    @torch.no_grad()
    def pruned(self, prompts: PronounPrompts) -> LensResult:
        """What each head's turn moved, ``[N, L, H]``, and whether it is in the circuit."""
        runs = prompts.runs
        gates = {site: torch.zeros(1, z.shape[1], device=z.device) for site, z in prompts.other.items()}
        moved: dict[str, Tensor] = {site: torch.zeros(z.shape[:2]) for site, z in prompts.other.items()}
        now = prompts.odds
        for site in reversed(runs.sites):
            for head in reversed(range(gates[site.name].shape[1])):
                gates[site.name][0, head] = 1.0
                found = prompts.odds_of(runs.logits(prompts.other, gates))
                moved[site.name][:, head] = (found - now).cpu()
                if (found - now).mean().abs() < self.threshold:
                    now = found
                else:
                    gates[site.name][0, head] = 0.0
        rows = [moved[site.name].double().numpy() for site in runs.sites]
        kept = [1 - gates[site.name].double().cpu().numpy() for site in runs.sites]
        tables = {
            "moved": table_of("log odds moved when patched in turn (ACDC)", runs.sites, rows, **prompts.about),
            "circuit": table_of("in the circuit (ACDC)", runs.sites, kept, share=True, **prompts.about),
        }
        total, left = sum(row.size for row in kept), int(sum(row.sum() for row in kept))
        note = (
            f"{left} of {total} heads are in the circuit; with all others patched the log odds move by "
            f"{float((now - prompts.odds).mean()):.2f}, with every head by "
            f"{float((prompts.odds_of(prompts.other_logits) - prompts.odds).mean()):.2f} at most."
        )
        return LensResult(tables=tables, notes=[note])
