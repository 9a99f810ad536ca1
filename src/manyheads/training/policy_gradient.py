# SPDX-License-Identifier: Apache-2.0
"""Policy gradients with rewards that can be verified, in groups (GRPO, arXiv 2402.03300), with credit by token.

A rollout samples ``G`` responses to each of ``P`` prompts with the model as it is. The advantage of a response is its
reward less the mean of its group, over the group's standard deviation; ``credit`` may then give each of its tokens
another. With ``ratio_t = pi(o_t) / pi_old(o_t)`` the loss of a response is

    - 1/|o| sum over t of min(ratio_t A_t, clip(ratio_t, 1 - low, 1 + high) A_t) - beta KL_t,
    KL_t = pi_ref(o_t) / pi(o_t) - ln (pi_ref(o_t) / pi(o_t)) - 1,

and that of a batch the mean over its responses. A rollout is taken in ``updates`` steps, each on as many of its
responses, drawn at random. ``N = P G`` rows of ``T`` columns: prompts padded on the left, responses behind them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .budget import Budget
from .checkpoint import Checkpoint
from .fit import TrainState, autocast, fit
from .optimizers import optimizers_of
from .schedules import Schedule

__all__ = [
    "Credit", "Prompt", "Rollout", "clipped_loss", "ends_of", "group_advantages", "sample", "token_log_probs",
    "train_policy",
]  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """Ids of a prompt, and what a response to it, ids without the end of the text, is worth."""

    ids: Sequence[int]
    reward: Callable[[list[int]], float]


@dataclass
class Rollout:
    """Responses to prompts, a group for each, and what the policy that gave them thought of them.

    Attributes:
        ids: ``[N, T]``, groups one after the other.
        mask: ``[N, T]``, 1 where a token stands.
        response: bool ``[N, T]``, tokens of the responses, the end of the text among them.
        start: column at which responses begin.
        rewards: ``[N]``.
        advantages: ``[N, T]``, 0 outside the responses.
        old: ``[N, T]``, log-probabilities of the response's tokens when they were drawn.
        reference: likewise those of the model before training; None without a penalty.
        number: of the rollout in its training.
    """

    ids: Tensor
    mask: Tensor
    response: Tensor
    start: int
    rewards: Tensor
    advantages: Tensor
    old: Tensor
    reference: Tensor | None = None
    number: int = 0

    def rows(self, chosen: Tensor) -> Rollout:
        """The rows ``chosen [n]``."""
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        kept: dict[str, Any] = {name: x[chosen] for name, x in parts.items() if isinstance(x, Tensor)}
        return replace(self, **kept)

    def inputs(self) -> dict[str, Tensor]:
        """What a model reads; positions count tokens, not padding."""
        places = (self.mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": places}


Credit = Callable[[nn.Module, Rollout], Tensor]  # gives the advantages [N, T] of the tokens


def group_advantages(rewards: Tensor, epsilon: float = 1e-6) -> Tensor:
    """``rewards [P, G]`` less the mean of their group, over its standard deviation (of G - 1): 0 where all are equal.

    Raises:
        ValueError: groups of one.
    """
    if rewards.shape[1] < 2:
        raise ValueError("a group has two responses or more")
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, keepdim=True) + epsilon)


def clipped_loss(
    new: Tensor, old: Tensor, advantages: Tensor, response: Tensor, *, low: float = 0.2, high: float = 0.2,
    reference: Tensor | None = None, beta: float = 0.0,
) -> Tensor:  # fmt: skip
    """The loss above, a scalar, from log-probabilities and advantages ``[N, T]``; columns outside are ignored."""
    ratio = (new - old).masked_fill(~response, 0).exp()
    each = torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if reference is not None and beta:
        back = (reference - new).masked_fill(~response, 0)
        each = each - beta * (back.exp() - back - 1)
    return -((each * response).sum(1) / response.sum(1).clamp(min=1)).mean()


def token_log_probs(model: nn.Module, rollout: Rollout, temperature: float = 1.0) -> Tensor:
    """Log-probability of each token of the responses, float32 ``[N, T]``, 0 elsewhere."""
    kept = rollout.ids.shape[1] - rollout.start
    logits = model(**rollout.inputs(), use_cache=False, logits_to_keep=kept + 1).logits[:, :-1].float() / temperature
    found = logits.log_softmax(-1).gather(-1, rollout.ids[:, rollout.start :, None])[..., 0]
    return nn.functional.pad(found, (rollout.start, 0)).masked_fill(~rollout.response, 0)


def ends_of(model: Any) -> set[int]:
    """Tokens that end a text, by the model's generation config."""
    eos = model.generation_config.eos_token_id
    return {token for token in (eos if isinstance(eos, list) else [eos]) if token is not None}


@torch.no_grad()
def sample(
    model: Any, prompts: Sequence[Prompt], group: int, length: int, *, seed: int, temperature: float = 1.0
) -> Rollout:  # fmt: skip
    """``group`` responses to each prompt, of at most ``length`` tokens, with their rewards; 0 as advantages.

    Tokens are drawn from the whole vocabulary, greedily at temperature 0. The draws depend on ``seed`` alone, and
    random states are left as they were.
    """
    device, ends = next(model.parameters()).device, ends_of(model)
    fill = min(ends, default=0)
    start = max(len(prompt.ids) for prompt in prompts)
    rows = [[fill] * (start - len(p.ids)) + list(p.ids) for p in prompts for _ in range(group)]
    held = torch.tensor([[0] * (start - len(p.ids)) + [1] * len(p.ids) for p in prompts for _ in range(group)])
    ids, held = torch.tensor(rows, device=device), held.to(device)
    drawn: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    with evaluating(model), torch.random.fork_rng([device] if device.type == "cuda" else []), autocast(device):
        torch.manual_seed(seed)
        made = model.generate(
            ids, attention_mask=held, max_new_tokens=length, num_beams=1, pad_token_id=fill,
            **(drawn if temperature else {"do_sample": False}),
        )  # fmt: skip
    new = made[:, start:]
    ended = torch.isin(new, torch.tensor(sorted(ends), device=device, dtype=new.dtype)).long()
    inside = ended.cumsum(1) - ended == 0  # the first end is a decision of the policy's, what follows is padding
    texts = [[t for t in row[:n] if t not in ends] for row, n in zip(new.tolist(), inside.sum(1).tolist(), strict=True)]
    rewards = [prompts[i // group].reward(text) for i, text in enumerate(texts)]
    response = nn.functional.pad(inside, (start, 0))
    zeros = torch.zeros(made.shape, device=device)
    mask = torch.cat([held, inside.long()], 1)
    return Rollout(made, mask, response, start, torch.tensor(rewards, device=device), zeros, zeros)


def train_policy(
    model: Any, get_prompts: Callable[[int], Sequence[Prompt]], *, budget: Budget | str | int, lr: float,
    group: int = 8, length: int = 64, updates: int = 1, credit: Credit | None = None,
    clip: tuple[float, float] = (0.2, 0.2), beta: float = 0.0, temperature: float = 1.0, seed: int = 0,
    schedule: Schedule | None = None,
    checkpoint: Checkpoint | None = None, on_rollout: Callable[[int, Rollout], None] | None = None,
    on_step: Callable[[TrainState], bool | None] | None = None,
) -> TrainState:  # fmt: skip
    """Train a causal language model in place on rewards.

    Args:
        model: of transformers, in float32, on its device.
        get_prompts: given the number of a rollout, its prompts.
        budget: of steps, ``updates`` for a rollout; or of time.
        lr: of AdamW without weight decay.
        group: responses to each prompt.
        length: of a response at most.
        updates: steps on a rollout, each on another part of it.
        credit: gives tokens their advantages; without one all tokens of a response have the response's own.
        clip: how far the ratio counts below and above 1.
        beta: weight of the distance to the model as it is now.
        temperature: at which responses are drawn.
        seed: of the draws.
        schedule, on_step: see :func:`fit`.
        checkpoint: likewise; every so many whole rollouts.
        on_rollout: told its number and the rollout, with the advantages that it will be trained with.

    Raises:
        UserError: a checkpoint in the midst of a rollout, or groups that do not part into ``updates``.
    """
    if checkpoint is not None and checkpoint.every % updates:
        raise UserError(f"a checkpoint comes after whole rollouts: keep one every multiple of {updates} steps")
    before = copy.deepcopy(model).eval().requires_grad_(False) if beta else None
    if before is not None and checkpoint is not None:  # the model that a later run begins with is another
        checkpoint = replace(checkpoint, keep={**checkpoint.keep, "reference": before})
    kept: dict[int, Rollout] = {}

    def made(number: int) -> Rollout:
        rollout = sample(model, get_prompts(number), group, length, seed=_seed(seed, number), temperature=temperature)
        rollout.number, device = number, rollout.ids.device
        with evaluating(model), torch.no_grad(), autocast(device):
            rollout.old = token_log_probs(model, rollout, temperature)
            rollout.reference = None if before is None else token_log_probs(before, rollout, temperature)
            whole = group_advantages(rollout.rewards.view(-1, group)).view(-1, 1)
            rollout.advantages = whole * rollout.response
            if credit is not None:
                rollout.advantages = credit(model, rollout) * rollout.response
        if on_rollout is not None:
            on_rollout(number, rollout)
        return rollout

    def get_batch(step: int) -> Rollout:
        number, part = divmod(step, updates)
        if number not in kept:
            kept.clear()
            kept[number] = made(number)
        rollout = kept[number]
        if len(rollout.ids) % updates:
            raise UserError(f"{len(rollout.ids)} responses do not part into {updates} updates")
        order = torch.randperm(len(rollout.ids), generator=torch.Generator().manual_seed(_seed(seed, number)))
        return rollout.rows(order.chunk(updates)[part].to(rollout.ids.device))

    def loss(net: nn.Module, batch: Rollout) -> Tensor:
        new = token_log_probs(net, batch, temperature)
        return clipped_loss(
            new, batch.old, batch.advantages, batch.response, low=clip[0], high=clip[1], reference=batch.reference,
            beta=beta,
        )  # fmt: skip

    return fit(
        model, get_batch, loss, budget=budget, optimizers=optimizers_of(model, lr, weight_decay=0.0),
        schedule=schedule, checkpoint=checkpoint, on_step=on_step,
    )  # fmt: skip


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _seed(seed: int, number: int) -> int:
    return (seed * 1_000_003 + number) % 2**63
