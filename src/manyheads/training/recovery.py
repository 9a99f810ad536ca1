# SPDX-License-Identifier: Apache-2.0
"""Training of a model that was made smaller, by the model that it was made of.

The loss is the divergence of the student's predictions from the teacher's, ``KL(teacher | student)`` at temperature 1
and nothing else (as Minitron distils), for which neither's logits of all tokens exist at once: they are made for a part
of the vocabulary at a time, forward and backward, from the last states.

Legend: N tokens, V words, D and E widths of student and teacher.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion import Recovery
from ..errors import UserError
from ..integrations.precision import cast
from .budget import Budget
from .checkpoint import Checkpoint
from .fit import BatchFn, TrainState, fit
from .lora import adapters
from .optimizers import optimizers_of
from .schedules import decay

__all__ = ["recover", "vocabulary_kl"]

_CHUNK = 8192  # words at a time
_SECONDS = 120.0  # between two checkpoints


class _VocabularyKL(torch.autograd.Function):
    """``KL(softmax(t U^T) | softmax(s W^T))``, mean over tokens; gradients for s and W."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, w: Tensor, t: Tensor, u: Tensor, chunk: int) -> Tensor:
        log_s = log_t = None
        for wc, uc in zip(w.split(chunk), u.split(chunk), strict=True):
            a, b = _logits(s, wc).logsumexp(-1), _logits(t, uc).logsumexp(-1)
            log_s = a if log_s is None else torch.logaddexp(log_s, a)
            log_t = b if log_t is None else torch.logaddexp(log_t, b)
        assert log_s is not None and log_t is not None
        total = torch.zeros_like(log_s)
        for wc, uc in zip(w.split(chunk), u.split(chunk), strict=True):
            theirs = _logits(t, uc) - log_t[:, None]
            total += (theirs.exp() * (theirs - _logits(s, wc) + log_s[:, None])).sum(-1)
        ctx.save_for_backward(s, w, t, u, log_s, log_t)
        ctx.chunk = chunk
        return total.mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        s, w, t, u, log_s, log_t = ctx.saved_tensors
        scale = grads[0] / len(s)
        d_s = torch.zeros(s.shape, dtype=log_s.dtype, device=s.device)
        d_w = torch.zeros_like(w) if ctx.needs_input_grad[1] else None
        for i, (wc, uc) in enumerate(zip(w.split(ctx.chunk), u.split(ctx.chunk), strict=True)):
            apart = ((_logits(s, wc) - log_s[:, None]).exp() - (_logits(t, uc) - log_t[:, None]).exp()) * scale
            low = apart.to(s.dtype)
            d_s += low @ wc.to(s.dtype)
            if d_w is not None:
                d_w[i * ctx.chunk : (i + 1) * ctx.chunk] = low.mT @ s
        return d_s.to(s.dtype), d_w, None, None, None


def _logits(x: Tensor, w: Tensor) -> Tensor:
    """Float32, or float64 where states are."""
    found = x @ w.to(x.dtype).mT
    return found if found.dtype == torch.float64 else found.float()


def vocabulary_kl(s: Tensor, w: Tensor, t: Tensor, u: Tensor, chunk: int = _CHUNK) -> Tensor:
    """``KL(teacher | student)`` in nats per token, a scalar, with gradients for ``s`` and ``w``.

    Args:
        s: last states of the student, ``[N, D]``.
        w: its output layer, ``[V, D]``.
        t: last states of the teacher, ``[N, E]``.
        u: its output layer, ``[V, E]``.
        chunk: words whose logits exist at a time.
    """
    found: Tensor = _VocabularyKL.apply(s, w, t, u, chunk)  # type: ignore[no-untyped-call]
    return found


def recover(
    student: Any, teacher: Any, get_batch: BatchFn[Tensor], budget: Budget | str | int, how: Recovery, *,
    folder: Path | None = None, on_step: Callable[[TrainState], bool | None] | None = None,
) -> TrainState:  # fmt: skip
    """Train ``student`` in place, in float32; back in its dtype and in evaluation mode at the end.

    Args:
        student: a converted model.
        teacher: the model that it was made of, not changed; where ``how`` corrects it, a copy is trained first.
        get_batch: token ids ``[B, T + 1]``, or images ``[B, C, h, w]``, by number, on the device.
        budget: of all the training, correction included.
        how: loss, rate, adapters.
        folder: of checkpoints, from which a training that was cut off goes on; none without.
        on_step: told the state after each step of either training.

    Raises:
        UserError: the loss is of a kind that the models do not have.
        Diverged: it is NaN or infinite.
    """
    whole = Budget.of(budget)
    if how.loss != "hidden" and student.get_output_embeddings() is None:
        raise UserError(f"{type(student).__name__} predicts no words: recover it by its hidden states")
    if how.correct and how.loss != "nll":
        teacher = copy.deepcopy(teacher)
        part = Budget(_share(whole, how.correct), whole.unit)
        _train(teacher, _nll, get_batch, part, how, None if folder is None else folder / "teacher", on_step)
        whole = Budget(_share(whole, 1 - how.correct), whole.unit)
    losses: dict[str, Callable[[Any], Callable[[Any, Tensor], Tensor]]] = {
        "kl": _kl, "hidden": _hidden, "nll": lambda _: _nll,
    }  # fmt: skip
    loss = losses[how.loss](teacher)
    place = None if folder is None else folder / "student"
    with adapters(student, how.lora) as trained:
        return _train(trained, loss, get_batch, whole, how, place, on_step)


def _share(budget: Budget, share: float) -> float:
    return budget.amount * share if budget.unit == "seconds" else max(1, round(budget.amount * share))


def _train(
    model: Any, loss: Callable[[Any, Tensor], Tensor], get_batch: BatchFn[Tensor], budget: Budget, how: Recovery,
    folder: Path | None, on_step: Callable[[TrainState], bool | None] | None,
) -> TrainState:  # fmt: skip
    """Warm up, then half a cosine to a tenth of the rate."""
    dtype = next(model.parameters()).dtype
    model.float()
    for name, parameter in model.named_parameters():
        if how.trained:
            parameter.requires_grad_(re.search(how.trained, name) is not None)
    try:
        return fit(
            model, get_batch, loss, budget=budget, optimizers=optimizers_of(model, how.lr, weight_decay=0.0),
            schedule=decay("cosine", warmup=0.1, floor=0.1), tokens_of=_read,
            checkpoint=None if folder is None else Checkpoint(folder, seconds=_SECONDS), on_step=on_step,
        )  # fmt: skip
    finally:
        cast(model, dtype).eval()
        if how.trained:
            model.requires_grad_(True)


def _read(batch: Tensor) -> int:
    """Tokens of windows ``[B, T + 1]``; images count as one each."""
    return len(batch) * (1 if batch.is_floating_point() else batch.shape[1] - 1)


def _states(model: Any, ids: Tensor) -> Tensor:
    """Last states ``[N, D]`` of a model that may be an adapted one."""
    base = getattr(getattr(model, "base_model", model), "model", model) if hasattr(model, "peft_config") else model
    more = {"use_cache": False} if hasattr(base.config, "use_cache") else {}
    given = {"pixel_values": ids.to(base.dtype)} if ids.is_floating_point() else {"input_ids": ids[:, :-1]}
    found: Tensor = base.base_model(**given, **more)[0]
    return found.flatten(0, 1)


def _head(model: Any) -> Tensor:
    found: Tensor = model.get_output_embeddings().weight
    return found


def _kl(teacher: Any) -> Callable[[Any, Tensor], Tensor]:
    plain = not getattr(teacher.config, "final_logit_softcapping", None)

    def loss(model: Any, ids: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = _states(teacher, ids) if plain else teacher(input_ids=ids[:, :-1], use_cache=False).logits
        if plain:
            states = _states(model, ids)
            return vocabulary_kl(states, _head(model), theirs.to(states.dtype), _head(teacher).detach())
        own = model(input_ids=ids[:, :-1], use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        aim = theirs.float().log_softmax(-1).flatten(0, 1)
        return nn.functional.kl_div(own, aim, reduction="batchmean", log_target=True)

    return loss


def _hidden(teacher: Any) -> Callable[[Any, Tensor], Tensor]:
    def loss(model: Any, ids: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = _states(teacher, ids).float()
        own = _states(model, ids).float()
        if own.shape != theirs.shape:
            raise UserError("states of another width cannot be compared with the teacher's: prune something else")
        return (own - theirs).square().sum() / theirs.square().sum()

    return loss


def _nll(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
