# SPDX-License-Identifier: Apache-2.0
"""Attention weights a block of rows at a time, and all statistics of them in one pass.

On a GPU the statistics come from :mod:`manyheads.kernels.probe`, which keeps not even a block of rows, where a call is
plain: no bias, cap or learned sinks, and each query sees one stretch of the columns (causal, sliding windows, padding
on either side). The blocks below are what those kernels are held against. Legend as in :mod:`.statistics`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import kernels
from ..call import AttentionCall
from .fused import fused, summed
from .statistics import Peak, Statistic

__all__ = ["measure", "weights"]

_BLOCK = {"cpu": 2**20, "cuda": 2**26}  # weights held at once


def weights(call: AttentionCall, block: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Rows of the softmax weights ``[B, H, t, S]``, a block at a time, with the number of the first row.

    In float32 (float64 where the call is); rows that may attend to nothing are 0. Nothing here tracks gradients.

    Args:
        call: the attention computation.
        block: rows at a time; as many as a few megabytes hold when not given.
    """
    for start, rows, _ in _blocks(call, block):
        yield start, rows


def _blocks(call: AttentionCall, block: int | None) -> Iterator[tuple[int, Tensor, Tensor]]:
    """As :func:`weights`, and the log-sum-exp ``[B, H, t]`` of the rows."""
    call.require_softmax()
    q, k = call.q.detach(), call.k.detach()
    dtype = _precision(q)
    (batch, heads, length, _), (_, kv_heads, size, _) = q.shape, k.shape
    wide = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)  # products of halves with float32 sums, no copies
    k = k if wide else k.to(dtype)
    block = block or max(1, _BLOCK.get(q.device.type, 2**20) // max(1, batch * heads * size))
    column = torch.arange(size, device=q.device)
    for start in range(0, length, block):
        cut = slice(start, min(start + block, length))
        end = max(1, cut.stop + size - length) if call.is_causal else size  # no row of these sees a column behind
        grouped = q[:, :, cut].to(k.dtype).unflatten(1, (kv_heads, -1)).flatten(2, 3)  # keys are not repeated
        keys = k[:, :, :end].transpose(-1, -2)
        x = _products(grouped, keys) if wide else grouped @ keys
        x = x.unflatten(2, (heads // kv_heads, -1)).flatten(1, 2)
        x *= call.scale
        if call.softcap is not None:
            x.div_(call.softcap).tanh_().mul_(call.softcap)
        if call.bias is not None:
            x = x + _cut(call.bias.detach(), cut, end)
        if call.mask is not None:
            x.masked_fill_(~_cut(call.mask, cut, end), -torch.inf)
        if call.is_causal:
            row = torch.arange(cut.start, cut.stop, device=q.device) + (size - length)
            x.masked_fill_(column[:end] > row[:, None], -torch.inf)
        rows, lse = _softmax(x, None if call.sinks is None else call.sinks.detach())
        yield start, pad(rows, (0, size - end)) if end < size else rows, lse


def _products(q: Tensor, keys: Tensor) -> Tensor:
    """``q @ keys`` of half precision ``[B, Hkv, n, d]`` and ``[B, Hkv, d, S]`` in float32."""
    made: Tensor = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1), out_dtype=torch.float32)
    return made.view(*q.shape[:2], *made.shape[1:])


def _precision(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _softmax(x: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`reference.softmax`, in the place of the logits; and their log-sum-exp ``[B, H, t]``."""
    top = x.amax(-1, keepdim=True)
    column = None if sinks is None else sinks.to(x.dtype)[:, None, None]
    top = top if column is None else torch.maximum(top, column)
    top.masked_fill_(top == -torch.inf, 0.0)
    x.sub_(top).exp_()
    total = x.sum(-1, keepdim=True)
    if column is not None:
        total += torch.exp(column - top)
    lse = (top + total.log())[..., 0]
    return x.div_(total.masked_fill_(total == 0, 1.0)), lse


def _cut(x: Tensor, rows: slice, end: int) -> Tensor:
    x = x if x.shape[-2] == 1 else x[..., rows, :]
    return x if x.shape[-1] == 1 else x[..., :end]


def measure(call: AttentionCall, statistics: Sequence[Statistic], block: int | None = None) -> list[Any]:
    """The results of all ``statistics`` of one call, in one pass over its weights.

    Args:
        call: the attention computation.
        statistics: fresh ones; a statistic keeps what it was given.
        block: rows at a time; as many as a few megabytes hold when not given. Kernels are used only when it is not.
    """
    if not statistics:
        return []
    call.require_softmax()
    with torch.no_grad():
        made = fused(call, statistics) if block is None and _has_kernels(call) else {}
        later = summed(call, statistics) if block is None and not made else {}
        left = [statistic for i, statistic in enumerate(statistics) if i not in made and i not in later]
        lse = call.q.new_empty(call.q.shape[:3], dtype=_precision(call.q))
        if left or later:
            for start, rows, sums in _blocks(call, block):
                lse[:, :, start : start + rows.shape[2]] = sums
                for statistic in left:
                    statistic.update(rows, start, call.q.shape[2])
        for i, answer in later.items():
            made[i] = answer(lse)
        peaks = {i: s.logits(lse) for i, s in enumerate(statistics) if isinstance(s, Peak) and i not in made}
    made |= peaks
    return [made[i] if i in made else statistic.result() for i, statistic in enumerate(statistics)]


def _has_kernels(call: AttentionCall) -> bool:
    return call.q.is_cuda and kernels.available()
