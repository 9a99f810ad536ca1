# SPDX-License-Identifier: Apache-2.0
"""Train a small decoder on whatever is drawn for it: one loop for all arms, so that arms differ in nothing else.

AdamW (beta 0.9, 0.95) or Muon (arXiv 2502.16982: torch's, for the matrices of the blocks, AdamW for embeddings, norms,
gates and biases), linear warm-up and then half a cosine down to a tenth, gradients clipped by their norm. On a GPU the
forward runs in bfloat16; weights and optimiser stay in float32.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from .decoder import Decoder

__all__ = ["Draw", "Optimizer", "nats", "train"]

Optimizer = Literal["adamw", "muon"]
Draw = Callable[[int], tuple[Tensor, Tensor | None]]


def train(
    model: Decoder, draw: Draw, steps: int, *, lr: float = 3e-3, optimizer: Optimizer = "adamw", warmup: float = 0.1,
    weight_decay: float = 0.1, clip: float = 1.0, progress: Callable[[int, int], None] | None = None,
) -> list[float]:  # fmt: skip
    """Train in place.

    Args:
        model: left in evaluation mode.
        draw: given the step, ``ids [B, T + 1]`` on the model's device and ``judged`` bool ``[B, T]``, the predictions
            that count, None for all.
        steps: how many.
        lr: highest learning rate, of either optimiser; the AdamW part of Muon has it too.
        optimizer: ``adamw`` or ``muon``.
        warmup: part of the steps in which the rate rises.
        weight_decay: on matrices only.
        clip: largest norm of the gradient.
        progress: is told the step and the steps.

    Returns:
        The loss of each step, nats per judged token.

    Raises:
        UserError: the loss is no number any more.
    """
    optimizers = _optimizers(model, lr, optimizer, weight_decay)
    rise = max(1, round(warmup * steps))

    def rate(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in optimizers]
    losses = []
    model.train()
    for step in range(steps):
        ids, judged = draw(step)
        with _precision(ids.device):
            logits, _ = model(ids[:, :-1])
        each = nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = each.mean() if judged is None else (each * judged.flatten()).sum() / judged.sum().clamp(min=1)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        for each_optimizer, schedule in zip(optimizers, schedules, strict=True):
            each_optimizer.step()
            schedule.step()
            each_optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if progress is not None:
            progress(step + 1, steps)
    found: list[float] = torch.stack(losses).tolist() if losses else []
    if not all(map(math.isfinite, found)):
        raise UserError(f"{model.strategy.slug}: the loss is no number any more; train with a smaller lr than {lr:g}")
    model.eval()
    return found


@torch.no_grad()
def nats(model: Decoder, ids: Tensor, batch: int = 16) -> Tensor:
    """Negative log-likelihood of each next token: ``ids [N, T + 1]`` -> float32 ``[N, T]`` on the CPU."""
    found = []
    for rows in ids.split(batch):
        with _precision(rows.device):
            logits, _ = model(rows[:, :-1])
        found.append(nn.functional.cross_entropy(logits.float().transpose(1, 2), rows[:, 1:], reduction="none").cpu())
    return torch.cat(found)


def _precision(device: torch.device) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def _optimizers(model: Decoder, lr: float, optimizer: Optimizer, weight_decay: float) -> list[torch.optim.Optimizer]:
    """One optimiser for matrices that are multiplied with, one for the rest where they differ."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and name.startswith("blocks.")]
    taken = {id(p) for p in matrices}
    embedding = [model.embed.weight]
    rest = [p for p in model.parameters() if id(p) not in taken and p is not model.embed.weight]
    groups: list[dict[str, Any]] = [{"params": embedding, "weight_decay": weight_decay}, {"params": rest}]
    given: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.95), "weight_decay": 0.0}
    if optimizer == "muon":
        muon = torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        return [muon, torch.optim.AdamW(groups, **given)]
    return [torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay}, *groups], **given)]
