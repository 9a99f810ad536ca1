# SPDX-License-Identifier: Apache-2.0
"""What flows from tokens to a question, how many tokens have how much of it, and the schedule that follows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...call import AttentionCall
from ...calls.visible import rows_of
from ...calls.weights import weights

__all__ = ["idle", "needed", "received", "schedule_of"]


def received(call: AttentionCall, asking: Tensor) -> Tensor:
    """What each of the call's N tokens is given by those that ask, a mean over these and all heads: float ``[B, N]``.

    Args:
        call: of N queries.
        asking: bool ``[B, N]``; a row in which none asks gives nothing.
    """
    rows = asking.any(0).nonzero()[:, 0]
    who = asking[:, rows].to(torch.float32 if call.q.dtype != torch.float64 else torch.float64)
    part = call.q.new_zeros(len(asking), asking.shape[1], dtype=who.dtype)
    with torch.no_grad():
        for start, found in weights(rows_of(call, rows)):  # the last N keys are those of the queries
            mine = who[:, start : start + found.shape[2]]
            part += torch.einsum("bt,bts->bs", mine, found.mean(1)[..., -asking.shape[1] :])
    return part / who.sum(1, keepdim=True).clamp(min=1)


def needed(flow: Tensor, eta: float) -> Tensor:
    """The least number of tokens that have the part ``eta`` of all that tokens are given: ``[..., N] -> [...]``."""
    part = flow.sort(-1, descending=True).values.cumsum(-1)
    short = part < eta * part[..., -1:] * (1 - 4 * torch.finfo(flow.dtype).eps)
    return (short.sum(-1) + 1).clamp(max=flow.shape[-1])


def idle(flow: Tensor, part: float = 0.05) -> Tensor:
    """The share of tokens that have ``part`` of the flow at most, those with the least: ``[..., N] -> [...]``."""
    return ((flow.sort(-1).values.cumsum(-1) <= part * flow.sum(-1, keepdim=True)).sum(-1)) / flow.shape[-1]


def schedule_of(flows: Sequence[Tensor], eta: float = 0.95, start: int = 2) -> tuple[float, ...]:
    """Parts of the tokens for each block, by what tokens were given in each: the median over inputs, never rising.

    Args:
        flows: ``[inputs, N]`` of each block.
        eta: part of the flow that stays.
        start: first block that may have fewer.
    """
    made: list[float] = []
    for block in range(len(flows)):
        part = 1.0
        if block >= start:
            counts = needed(flows[block - 1], eta).double()
            part = min(made[-1], round(float(counts.quantile(0.5)) / flows[0].shape[1], 4))
        made.append(part)
    return tuple(made)
