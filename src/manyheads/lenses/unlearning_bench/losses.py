# SPDX-License-Identifier: Apache-2.0
"""What the objectives of unlearning are made of, as functions of logits, in float32 or better.

Sizes: N questions, Q tokens of an answer, V words.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid

from ...unlearning import Answers

__all__ = ["answer_nll", "balanced", "kl", "log_probability", "npo"]

_NONE = -100  # in place of a token behind a shorter answer


def answer_nll(said: Answers) -> Tensor:
    """L: mean negative log-likelihood of the answers' tokens, nats."""
    return cross_entropy(_exact(said.logits).flatten(0, 1), said.tokens.flatten(), ignore_index=_NONE)


def log_probability(said: Answers) -> Tensor:
    """Of each answer as a whole, ``[N]``, nats."""
    given = -cross_entropy(_exact(said.logits).transpose(1, 2), said.tokens, ignore_index=_NONE, reduction="none")
    return given.sum(1)


def kl(before: Answers, said: Answers) -> Tensor:
    """Mean over the answers' tokens of ``KL(p_before || p)``, nats: ``before`` is what is kept, and has no gradient."""
    old, new = (_exact(x.logits).log_softmax(-1) for x in (before, said))
    counted = said.tokens != _NONE
    each = (old.exp() * (old - new)).sum(-1)
    return (each * counted).sum() / counted.sum()


def npo(before: Answers, said: Answers, beta: float) -> Tensor:
    """``-2 / beta E log sigmoid(-beta log(p / p_before))``, p of the answer as a whole (Zhang et al., 2404.05868)."""
    apart = log_probability(said) - log_probability(before)
    return -2 / beta * logsigmoid(-beta * apart).mean()


def balanced(gradients: Sequence[Sequence[Tensor]], project: bool = True, norms: bool = True) -> list[Tensor]:
    """One gradient of each parameter: those of the terms at one norm, none against another, added.

    Each term's gradient, over all parameters, is scaled to the median of the terms' norms. Where two then have a
    negative inner product the part of each along the other, as that was before any projection, is taken out (PCGrad, Yu
    et al., 2001.06782; there others come in a random order, here in their own).

    Args:
        gradients: of each term, one for each parameter.
        project: take conflicting parts out.
        norms: scale to the median norm.
    """
    flat = torch.stack([torch.cat([g.flatten() for g in each]).float() for each in gradients])
    if norms:
        lengths = flat.norm(dim=1)
        flat = flat * (lengths.median() / lengths.clamp(min=1e-12))[:, None]
    made = flat.clone()
    if project:
        for i in range(len(flat)):
            for j in range(len(flat)):
                if i != j:
                    along = made[i] @ flat[j]
                    made[i] -= along.clamp(max=0) / flat[j].square().sum().clamp(min=1e-24) * flat[j]
    sizes = [g.numel() for g in gradients[0]]
    whole = made.sum(0).split(sizes)
    return [part.view_as(g).to(g.dtype) for part, g in zip(whole, gradients[0], strict=True)]


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
