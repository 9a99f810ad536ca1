# SPDX-License-Identifier: Apache-2.0
"""Training masked diffusion language models: LLaDA's bound on the likelihood (arXiv 2502.09992).

Of a row a share p of the tokens that count is hidden, p drawn anew for each row, and each hidden one counts 1 / p. A
batch is ``(ids, noisy, weights)``, all ``[B, T]``: the tokens, what the model reads, and how much each counts, 0 where
nothing is hidden.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..integrations.masked_diffusion import predicts_next

__all__ = ["Corrupted", "corrupt", "masked_diffusion_loss"]

Corrupted = tuple[Tensor, Tensor, Tensor]


def corrupt(ids: Tensor, asked: Tensor, mask: int, generator: torch.Generator, least: float = 1e-3) -> Corrupted:
    """Hide tokens: a share of each row, uniform in ``[least, 1]`` and spread evenly over the rows.

    Args:
        ids: ``[B, T]``.
        asked: which may be hidden, bool ``[B, T]``.
        mask: what hides them.
        generator: on the device of ``ids``.
        least: of the share.
    """
    rows = ids.shape[0]
    start = torch.rand((), generator=generator, device=ids.device)
    share = (start + torch.arange(rows, device=ids.device) / rows) % 1  # one of each stratum: less variance
    share = (least + (1 - least) * share)[:, None]
    hidden = (torch.rand(ids.shape, generator=generator, device=ids.device) < share) & asked
    counts = asked.sum().clamp(min=1)
    return ids, ids.masked_fill(hidden, mask), hidden / share / counts


def masked_diffusion_loss(model: nn.Module, batch: Corrupted) -> Tensor:
    """Bound on the negative log-likelihood of the tokens that count: nats/token, float32 scalar."""
    ids, noisy, weights = batch
    known: Any = model
    logits = known(input_ids=noisy, use_cache=False).logits.float()
    if predicts_next(known.config):
        logits, ids, weights = logits[:, :-1], ids[:, 1:], weights[:, 1:]
    each = cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    return (each * weights.flatten()).sum()
