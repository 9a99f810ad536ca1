# SPDX-License-Identifier: Apache-2.0
"""The choice of what stays: scores, protection and budgets of a policy made into slots to keep."""

import torch
from torch import Tensor

from ..attention import reference
from ..attention.padded import PaddedCache
from ..attention.protect import within
from ..errors import warn
from ._policy import CachePolicy, must_stay
from ._view import CacheView

__all__ = ["drop_outside_window", "keep_best", "keep_marked", "warn_of_few"]

_FEW = 16  # tokens of a prompt: what is answered from fewer is often wrong


def keep_best(
    policy: CachePolicy, view: CacheView, slots: PaddedCache, counts: Tensor, limit: int, share: Tensor | float
) -> bool:
    """Keep the best-scored slots of each row and head.

    Args:
        policy: scores, protects, allocates, merges.
        view: what it sees of ``slots``.
        slots: changed in place.
        counts: slots that each row may keep, ``[B]``.
        limit: the largest of them, as a host number.
        share: factor on ``counts`` for this layer, scalar or ``[B]``.

    Returns:
        Whether heads or rows keep unequal numbers by the will of the policy.
    """
    ragged = False
    scores = reference.widened(policy.score(view))
    heads = slots.keys.shape[1]
    if scores.shape[1] != heads:
        scores = scores.unflatten(1, (heads, -1)).mean(2)
    budgets = counts[:, None].expand(-1, heads)
    whole = slots.valid is None
    if not (isinstance(share, float) and share == 1.0):
        budgets = (budgets * torch.as_tensor(share, device=counts.device).reshape(-1, 1)).round().long()
    fixed = must_stay(policy, view)
    scores = scores.masked_fill(fixed, torch.inf).masked_fill(view.positions < 0, -torch.inf)
    uneven = policy.head_budgets(view, scores, budgets)
    if uneven is not None or not (isinstance(share, float) and share == 1.0):
        budgets = budgets if uneven is None else uneven
        most = view.counts[:, None]
        budgets = torch.minimum(budgets.clamp(min=policy.protected), most)
        limit, whole = int(budgets.max()), False
        ragged = int(budgets.min()) < limit
    if view.spans is not None:  # which a budget has to hold, whatever it is
        budgets = budgets.maximum(fixed.sum(-1))
        limit, whole = int(budgets.max()), False
        ragged |= int(budgets.min()) < limit
    # Flipped, so that the stable sort puts the newer of two equal slots first.
    order = slots.size - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    order = order[..., :limit]
    kept = torch.arange(order.shape[2], device=order.device) < budgets[..., None]
    kept = kept & (view.positions.gather(2, order) >= 0)
    rank = torch.where(kept, order, slots.size).argsort(dim=-1, stable=True)
    order, kept = order.gather(2, rank), kept.gather(2, rank)
    stays = torch.zeros_like(scores, dtype=torch.bool).scatter(2, order, kept)
    merged = policy.merge(view, stays)
    if merged is not None:
        if view.spans is not None:
            own = within(view.positions, view.spans)[..., None]
            merged = (torch.where(own, slots.keys, merged[0]), torch.where(own, slots.values, merged[1]))
        slots.keys, slots.values = merged
    slots.keep(order, kept, whole and slots.even)
    return ragged


def keep_marked(slots: PaddedCache, kept: Tensor, limit: int | None = None) -> None:
    """Keep the slots where ``kept [B, Hs, N]``, unequal numbers or not; ``limit`` bounds these, looked up if None."""
    most = int(kept.sum(-1).max()) if limit is None else limit
    order = kept.logical_not().int().argsort(dim=-1, stable=True)[..., :most]
    slots.keep(order, kept.gather(2, order))


def warn_of_few(policy: CachePolicy, kept: int, size: int) -> None:
    """Say it where a fraction keeps few of ``size`` tokens; codes are small, so that more stay than it says."""
    if kept < min(_FEW, size) and not isinstance(policy.budget, int) and policy.codec is None:
        warn(
            f"{policy.spec} keeps {kept} of {size} tokens of this prompt, and answers from so few are often wrong: "
            "give a larger budget, or a number of tokens such as budget=64"
        )


def drop_outside_window(slots: PaddedCache, window: int) -> None:
    """Drop what no later query of a sliding-window layer can see: the same slots that an ordinary cache drops."""
    reach = window - 1
    if slots.index is None:
        if slots.size > reach:
            slots.narrow(slots.size - reach, reach)
    else:
        gone = slots.index <= slots.seen - window
        order = gone.int().argsort(dim=-1, stable=True)[..., :reach]
        slots.keep(order, ~gone.gather(2, order))
