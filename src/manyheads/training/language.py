# SPDX-License-Identifier: Apache-2.0
"""Training language models: the loss of the next token, and the settings that arms of a comparison share.

``B`` sequences of ``T + 1`` tokens; a batch is ``ids [B, T + 1]``, or that and ``loss_mask [B, T]``: the predictions
that count (bool), or how much each counts (float); None for all.

A batch of a masked language model is ``(ids [B, T], labels [B, T])``: what it reads, with some tokens hidden, and what
stands there; -100 where nothing is asked, as in transformers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .budget import Budget
from .fit import BatchFn, Loss, TrainState, autocast, fit
from .optimizers import OptimizerName, optimizers_of
from .schedules import decay

__all__ = [
    "Batch", "masked_nll", "masked_token_loss", "next_token_loss", "predicted_tokens", "token_nll", "train_lm",
    "with_auxiliary",
]  # fmt: skip

Batch = Tensor | tuple[Tensor, Tensor | None]
_NOT_ASKED = -100


def next_token_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of the tokens that count, given all before each: nats/token, float32 scalar.

    While training, the model's ``auxiliary_loss()``, where it has one, is added.
    """
    ids, loss_mask = (batch, None) if isinstance(batch, Tensor) else batch
    each = cross_entropy(_logits(model(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten().long(), reduction="none")
    mean = each.mean() if loss_mask is None else (each * loss_mask.flatten()).sum() / loss_mask.sum().clamp(min=1)
    return with_auxiliary(mean, model)


def masked_token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the tokens asked for, given all that is read: nats/token, float32 scalar.

    While training, the model's ``auxiliary_loss()``, where it has one, is added.
    """
    ids, labels = batch
    loss = cross_entropy(_logits(model(ids)).flatten(0, 1), labels.flatten(), ignore_index=_NOT_ASKED)
    return with_auxiliary(loss, model)


def with_auxiliary(loss: Tensor, model: nn.Module) -> Tensor:
    """``loss`` and, while training, what parts of the model add to it (``auxiliary_loss()``, where it has one)."""
    more = getattr(model, "auxiliary_loss", None)
    return loss + more() if model.training and more is not None else loss


def predicted_tokens(batch: Batch) -> int:
    """Tokens that a batch is counted as: ``B * T``, whether they count in the loss or not."""
    ids = batch if isinstance(batch, Tensor) else batch[0]
    return ids.shape[0] * (ids.shape[1] - 1)


@torch.no_grad()
def token_nll(model: nn.Module, ids: Tensor, batch: int = 16) -> Tensor:
    """Negative log-likelihood of each next token, nats: ``ids [N, T + 1]`` -> float32 ``[N, T]`` on the CPU."""
    found = []
    for rows in ids.split(batch):
        with autocast(rows.device):
            logits = _logits(model(rows[:, :-1]))
        found.append(cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").cpu())
    return torch.cat(found)


@torch.no_grad()
def masked_nll(model: nn.Module, ids: Tensor, labels: Tensor, batch: int = 16) -> Tensor:
    """Negative log-likelihood of each token asked for, nats, 0 elsewhere: ``[N, T]`` -> float32 ``[N, T]``, CPU."""
    found = []
    for rows, asked in zip(ids.split(batch), labels.split(batch), strict=True):
        with autocast(rows.device):
            logits = _logits(model(rows))
        each = cross_entropy(logits.transpose(1, 2), asked, reduction="none", ignore_index=_NOT_ASKED)
        found.append(each.cpu())
    return torch.cat(found)


def train_lm(
    model: nn.Module, get_batch: BatchFn[Any], budget: Budget | str | int, *, lr: float = 3e-3,
    optimizer: OptimizerName = "adamw", weight_decay: float = 0.1, loss: Loss[Any] = next_token_loss,
    on_step: Callable[[TrainState], bool | None] | None = None,
) -> TrainState:  # fmt: skip
    """Train in place, as all arms are trained that are compared: warm-up, half a cosine down to a tenth, clipping.

    On a GPU the forward runs in bfloat16, weights and optimiser stay in float32, and steps are replayed as one graph.

    Args:
        model: gives logits for ids; left in evaluation mode.
        get_batch: see :func:`fit`.
        budget: as text, or a number of steps.
        lr: highest learning rate.
        optimizer: ``adamw`` or ``muon``.
        weight_decay: on matrices only.
        loss: of a model on a batch.
        on_step: see :func:`fit`.

    Raises:
        Diverged: the loss is NaN or infinite.
    """
    return fit(
        model, get_batch, loss, budget=budget, on_step=on_step,
        optimizers=optimizers_of(model, lr, optimizer, weight_decay=weight_decay), tokens_of=predicted_tokens,
        schedule=decay("cosine", warmup=0.1, floor=0.1), replayed=next(model.parameters()).device.type == "cuda",
    )  # fmt: skip


def _logits(out: Any) -> Tensor:
    """Of a decoder (logits and states), a model of transformers, or logits as they are, in float32."""
    logits: Tensor = out if isinstance(out, Tensor) else out[0] if isinstance(out, tuple) else out.logits
    return logits.float()
