# SPDX-License-Identifier: Apache-2.0
"""The credit of ``reasoning_rhythm``: which tokens of a response RL rewards more. Plain torch, B rows of T tokens."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["By", "credit", "peaks", "weigh"]

By = Literal["local", "global", "coupled"]


def peaks(score: Tensor, share: float) -> Tensor:
    """The greatest finite values of ``score [B, T]``, ``share`` of them: bool ``[B, T]``; of equals the first ones."""
    known = score.isfinite()
    order = torch.sort(score.masked_fill(~known, -torch.inf), stable=True, descending=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )
    return known & (rank < (share * known.sum(-1, keepdim=True)).round())


def credit(
    waad: Tensor, fai: Tensor, response: Tensor, by: By = "coupled", *, amplify: float = 1.5, share: float = 0.4,
    back: int = 3, alpha: float = 0.5, waad_quantile: float = 0.4, change_quantile: float = 0.6,
    normalise: bool = False,
) -> Tensor:  # fmt: skip
    """The factor ``gamma [B, T]`` on the advantages of a response's tokens; 1 elsewhere.

    With ``change_t = |WAAD_t - WAAD_(t+1)|`` and ``b = amplify - 1``: ``local`` gives ``1 + b`` to the top ``share`` of
    the change, ``global`` to the top ``share`` of FAI, the anchors. ``coupled``: an anchor t is dominated if ``WAAD_t``
    is at most its quantile and the greatest change of the ``back`` tokens before t is at least its own; that token
    introduces it (the nearest of equals). Free anchors get ``1 + b``, dominated ones ``1 + (1 - alpha) b``, and
    introducing tokens ``alpha b`` more, once, however many anchors they introduce.

    Args:
        waad, fai: ``[B, T]``; NaN where unknown.
        response: bool ``[B, T]``.
        by: which credit.
        amplify: gamma of a marked token.
        share: of the response's tokens that are marked.
        back: k, how far before its anchor an introducing token may stand.
        alpha: part of a dominated anchor's bonus that goes to the token that introduces it.
        waad_quantile, change_quantile: the thresholds, as quantiles over the response.
        normalise: divide by the mean over the response, so that it keeps its weight; not in the paper.
    """
    inside = response & pad(response[:, 1:], (0, 1))
    waad, fai = waad.masked_fill(~response, torch.nan), fai.masked_fill(~response, torch.nan)
    change = (waad - pad(waad[:, 1:], (0, 1))).abs().masked_fill(~inside, torch.nan)
    bonus = amplify - 1
    if by == "local":
        gamma = 1 + bonus * peaks(change, share).to(waad.dtype)
    else:
        anchors = peaks(fai, share)
        gamma = 1 + bonus * anchors.to(waad.dtype)
    if by == "coupled":
        before = torch.stack([pad(change, (j, 0), value=torch.nan)[:, : change.shape[1]] for j in range(1, back + 1)])
        most, which = before.masked_fill(before.isnan(), -torch.inf).max(0)
        low = waad <= waad.nanquantile(waad_quantile, -1, keepdim=True)
        dominated = anchors & low & (most >= change.nanquantile(change_quantile, -1, keepdim=True))
        rows, places = dominated.nonzero(as_tuple=True)
        intro = torch.zeros_like(dominated)
        intro[rows, places - 1 - which[rows, places]] = True
        gamma = gamma - alpha * bonus * dominated.to(waad.dtype) + alpha * bonus * intro.to(waad.dtype)
    if normalise:
        total = (gamma * response).sum(-1, keepdim=True)
        gamma = gamma * torch.where(response, response.sum(-1, keepdim=True) / total, 1.0)
    return gamma


def weigh(advantages: Tensor, gamma: Tensor) -> Tensor:
    """Advantages ``[B, T]`` times ``gamma``, which carries no gradient; negative ones, and those without, stay."""
    factor = gamma.detach().to(advantages).nan_to_num(nan=1.0)
    return torch.where(advantages >= 0, advantages * factor, advantages)
