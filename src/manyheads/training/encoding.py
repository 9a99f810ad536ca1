# SPDX-License-Identifier: Apache-2.0
"""Training of an encoder of texts on classes, scores, lists to be ranked, or pairs that belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, normalize

from ..integrations.bidirectional import dropped_out
from .budget import Budget
from .fit import BatchFn, TrainState, fit
from .lora import adapters
from .schedules import decay

__all__ = ["Examples", "Kind", "class_loss", "list_loss", "pair_loss", "score_loss", "tune"]

Kind = Literal["all", "lora", "head"]
_SCALE = 20.0  # of cosines
Examples = tuple[Mapping[str, Tensor], Tensor]  # what an encoder reads, and what is to be said of it


def class_loss(encoder: Any, batch: Examples) -> Tensor:
    """Cross-entropy to labels ``[B]``, nats."""
    read, labels = batch
    return cross_entropy(encoder(read).float(), labels)


def score_loss(encoder: Any, batch: Examples) -> Tensor:
    """Squared error to scores ``[B]``."""
    read, scores = batch
    found: Tensor = (encoder(read).float()[:, 0] - scores).square().mean()
    return found


def list_loss(encoder: Any, batch: Examples) -> Tensor:
    """``-sum_i y_i log softmax(s)_i`` over each list, the mean over lists of grades y ``[B, G]`` that sum to 1."""
    read, grades = batch
    scores = encoder(read).float()[:, 0].view_as(grades)
    return -(grades / grades.sum(1, keepdim=True) * log_softmax(scores, 1)).sum(1).mean()


def pair_loss(encoder: Any, batch: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """InfoNCE: ``-log softmax(20 cos(q_i, d_j))_i`` over all texts d of the batch, those that fit first.

    Args:
        encoder: its head is not asked.
        batch: queries, what fits each, and perhaps others for each, which are hard to tell from that.
    """
    query, *texts = (normalize(encoder.embed(read).float(), dim=-1) for read in batch)
    return cross_entropy(_SCALE * query @ torch.cat(texts).T, torch.arange(len(query), device=query.device))


def tune(
    encoder: Any, get_batch: BatchFn[Any], loss: Callable[[Any, Any], Tensor], budget: Budget | TrainState | str | int,
    *, lr: float, head_lr: float | None = None, train: Kind = "all", rank: int = 16, bf16: bool | None = None,
    on_step: Callable[[TrainState], bool | None] | None = None,
) -> TrainState:  # fmt: skip
    """Train an encoder in place, in float32, with the dropout of its design; in evaluation mode at the end.

    Args:
        encoder: a :class:`manyheads.models.text_encoder.TextEncoder`.
        get_batch: batches by number, on the encoder's device.
        loss: of the encoder on a batch.
        budget: of the training.
        lr: highest rate of the model's weights or adapters.
        head_lr: of pooler and head, which begin with nothing learned; as ``lr`` when None.
        train: ``all`` weights; adapters of low rank (``lora``) and pooler and head; or the last two alone (``head``).
        rank: of adapters.
        bf16: forward in bfloat16; None for on a GPU.
        on_step: told the state after each step.

    Raises:
        Diverged: the loss is NaN or infinite.
    """
    encoder.float()
    with ExitStack() as stack:
        stack.enter_context(dropped_out(encoder.model, encoder.design.dropout))
        if train == "head":
            encoder.model.requires_grad_(False)
            stack.callback(encoder.model.requires_grad_, True)
        stack.enter_context(adapters(encoder.model, rank if train == "lora" else 0))
        body = [p for p in encoder.model.parameters() if p.requires_grad]
        top = [p for name, p in encoder.named_parameters() if not name.startswith("model.")]
        groups = [{"params": some, "lr": rate} for some, rate in ((body, lr), (top, head_lr or lr)) if some]
        return fit(
            encoder, get_batch, loss, budget=budget, bf16=bf16, on_step=on_step, tokens_of=_tokens,
            optimizers=[torch.optim.AdamW(groups, weight_decay=0.01)], schedule=decay("linear", warmup=0.1),
        )  # fmt: skip


def _tokens(batch: Sequence[Any]) -> int:
    return sum(read["input_ids"].numel() for read in batch if isinstance(read, Mapping))
