# SPDX-License-Identifier: Apache-2.0
"""DiffMask+: learned gates that say which k heads, patched together from the counterfactual, turn the pronoun.

Every head has a location phi, shared by all prompts, 0 at first. For each prompt a gate is drawn from the hard-concrete
distribution (Louizos et al., arXiv 1712.01312): s = sigmoid((logit u + phi) / tau), g = clamp(s (r - l) + l, 0, 1) with
tau = 0.2, l = -0.2, r = 1.0, so that P(g > 0) = sigmoid(phi - tau log(-l / r)). With z <- (1 - g) z + g z' the loss is

    KL_Bernoulli(sigmoid(logits) || sigmoid(patched logits)), mean over the vocabulary
        + mean P(pro) / P_i(anti) + lambda (E|g|_0 - k),

least in phi and greatest in lambda, which is held within 0 and 200; both by Adam. The released code's loss, of which
the first term keeps all else as it is. The paper trains 200 epochs of all prompts (27,000 steps of 32) at a rate of
1e-3; here the default is a hundredth of the steps at a higher rate. Chosen here: lambda starts at 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ...causal_lens import CausalLens
from ...errors import UserError
from ...heads import listed
from ...lens import LensResult, table_of
from .._patching import frozen
from .prompts import PronounPrompts, drawn

__all__ = ["DiffMask", "bernoulli_kl", "hard_concrete", "open_probability"]

_TAU, _LOW, _HIGH = 0.2, -0.2, 1.0
_MOST = 200.0  # of lambda


def hard_concrete(phi: Tensor, u: Tensor) -> Tensor:
    """Gates in 0..1 of locations ``phi`` and uniform draws ``u`` of any shape that broadcasts."""
    s = torch.sigmoid((torch.logit(u) + phi) / _TAU)
    return (s * (_HIGH - _LOW) + _LOW).clamp(0, 1)


def open_probability(phi: Tensor) -> Tensor:
    """``P(g > 0)`` of a gate."""
    return torch.sigmoid(phi - _TAU * math.log(-_LOW / _HIGH))


def bernoulli_kl(logits: Tensor, patched: Tensor) -> Tensor:
    """Mean over all entries of the divergence of two Bernoulli distributions with these logits, nats."""
    p = torch.sigmoid(logits)
    yes, no = logsigmoid(logits) - logsigmoid(patched), logsigmoid(-logits) - logsigmoid(-patched)
    return (p * yes + (1 - p) * no).mean()


@dataclass(frozen=True, kw_only=True)
class DiffMask(CausalLens):
    """Heads that turn the pronoun together, by gates that are learned.

    Attributes:
        k: heads whose gates may be open.
        steps, batch: of the training, and prompts of a step.
        lr: of the locations and of lambda.
        seed: of prompts and gates.
    """

    k: int = field(default=10, metadata={"help": "heads whose gates may be open"})
    steps: int = field(default=270, metadata={"help": "of the training; 27,000 in the paper"})
    batch: int = field(default=32, metadata={"help": "prompts of a step"})
    lr: float = field(default=0.1, metadata={"help": "rate of Adam; 0.001 in the paper"})
    seed: int = field(default=0, metadata={"help": "of prompts and gates"})

    def __post_init__(self) -> None:
        if min(self.k, self.steps, self.batch) < 1 or not self.lr > 0:
            raise UserError("gender_components.diff_mask: k, steps and batch are at least 1, and lr is above 0")

    def locate(self, model: nn.Module, tokenizer: Any, use: Callable[..., Any]) -> LensResult:
        with frozen(model):
            parts = max(1, min(8, self.steps // 4))  # batches that take turns, each read once
            asked = drawn(parts * self.batch, self.seed)
            batches = [asked[i::parts] for i in range(parts)]
            return self.fitted([PronounPrompts(model, tokenizer, use, part, self.layers) for part in batches])

    def fitted(self, batches: list[PronounPrompts]) -> LensResult:
        """The probability that each head's gate is open, after training on ``batches`` by turns."""
        sites, device = batches[0].runs.sites, batches[0].odds.device
        phi = {s: torch.zeros(z.shape[1], device=device, requires_grad=True) for s, z in batches[0].other.items()}
        weight = torch.zeros((), device=device, requires_grad=True)
        optimizers = [torch.optim.Adam(list(phi.values()), self.lr), torch.optim.Adam([weight], self.lr, maximize=True)]
        source = torch.Generator().manual_seed(self.seed)
        for step in range(self.steps):
            prompts = batches[step % len(batches)]
            loss, spare = self.loss(prompts, phi, source)
            for optimizer in optimizers:
                optimizer.zero_grad()
            (loss + weight * spare).backward()
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                weight.clamp_(0, _MOST)
        rows = [open_probability(phi[site.name].detach())[None].double().cpu().numpy() for site in sites]
        table = table_of("probability that the gate is open (DiffMask+)", sites, rows, share=True)
        expected = float(sum(row.sum() for row in rows))
        note = f"{expected:.1f} gates are expected open, where k = {self.k}: {listed(table, table.top(self.k))}."
        return LensResult(tables={"gate": table}, notes=[note])

    def loss(self, prompts: PronounPrompts, phi: dict[str, Tensor], source: torch.Generator) -> tuple[Tensor, Tensor]:
        """The loss without its constraint, and ``E|g|_0 - k``."""
        count, device = len(prompts.runs), prompts.odds.device
        gates = {}
        for site, location in phi.items():
            u = torch.rand(count, len(location), generator=source).clamp(1e-6, 1 - 1e-6)
            gates[site] = hard_concrete(location, u.to(device))
        patched = prompts.runs.logits(prompts.other, gates)
        before = prompts.runs.plain.log_softmax(-1).gather(1, prompts.pro[:, None])
        after = patched.log_softmax(-1).gather(1, prompts.anti[:, None])
        opened = torch.stack([open_probability(location).sum() for location in phi.values()]).sum()
        return bernoulli_kl(prompts.runs.plain, patched) + (before - after).exp().mean(), opened - self.k
