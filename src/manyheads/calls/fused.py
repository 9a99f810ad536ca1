# SPDX-License-Identifier: Apache-2.0
"""Statistics of attention weights by the kernels of :mod:`manyheads.kernels.probe`, for the calls that are theirs.

A call is when it has no bias, cap or learned sinks and each query sees one range of the columns: causal, all of them,
a sliding window, padding on either side. :mod:`manyheads.calls.statistics` says what each statistic is; what is not
answered here it makes by blocks.

Legend: B batch, H query heads, Hkv key/value heads, T queries, S keys, d channels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..call import AttentionCall
from .statistics import (
    Band,
    Columns,
    ColumnSum,
    Distance,
    Entropy,
    LogPowerSum,
    MeanLogWeight,
    Pooled,
    Statistic,
    WeightedSum,
)  # fmt: skip

__all__ = ["fused", "mean_log_weight", "visible_ranges", "summed"]

Spans = tuple[Tensor, Tensor]

_FEW = 17  # with fewer rows a kernel has too little to do
_CELL = 16  # rows of a cell of the pooled map, likewise
_HELD = 2**26  # numbers held at once
_SUMS = 2**24  # sums of keys, likewise, in float64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = (Band, Columns, Distance, Entropy, LogPowerSum, WeightedSum, MeanLogWeight, Pooled, ColumnSum)


def visible_ranges(call: AttentionCall) -> Spans | None:
    """First and end of the columns ``[B or 1, T]`` that each query sees; None where they are no single range."""
    length, size = call.q.shape[2], call.k.shape[2]
    allowed = call.allowed()
    if allowed is None:
        none = torch.zeros(1, length, dtype=torch.int64, device=call.q.device)
        return none, none + size
    if allowed.shape[1] != 1:
        return None
    seen = allowed[:, 0].expand(-1, length, size).view(torch.uint8)
    count = allowed[:, 0].sum(-1).expand(-1, length)
    first, last = seen.argmax(-1), size - seen.flip(-1).argmax(-1)  # of equals argmax gives the first
    if not bool(((count == last - first) | (count == 0)).all()):
        return None
    return first, torch.where(count == 0, first, last)


def _causal(call: AttentionCall) -> Spans:
    size, length = call.k.shape[2], call.q.shape[2]
    end = torch.arange(size - length + 1, size + 1, device=call.q.device).clamp(min=0)[None]
    return torch.zeros_like(end), end


def _plain(call: AttentionCall) -> bool:
    logits = call.bias is None and call.softcap is None and call.sinks is None and call.scale > 0
    return logits and call.q.shape[2] >= _FEW


def summed(call: AttentionCall, statistics: Sequence[Statistic]) -> dict[int, Callable[[Tensor], Tensor]]:
    """Statistics that take the rows' log-sum-exp alone, anywhere; by number, what to give it to."""
    asked = [(i, s) for i, s in enumerate(statistics) if type(s) is MeanLogWeight]
    if not asked or not _plain(call):
        return {}
    spans = _causal(call) if call.is_causal and call.mask is None else visible_ranges(call)
    if spans is None:
        return {}
    return {i: partial(_later, call, s.keys, spans) for i, s in asked}


def _later(call: AttentionCall, sets: Tensor, spans: Spans, lse: Tensor) -> Tensor:
    return mean_log_weight(call, sets.to(lse.device), lse, spans)


def fused(call: AttentionCall, statistics: Sequence[Statistic]) -> dict[int, Any]:
    """The results that kernels give, by the number of the statistic; none where the call is not one of theirs."""
    q, k, scale = call.q.detach(), call.k.detach(), call.scale
    if not _plain(call) or q.shape[3] > 256 or q.dtype not in _DTYPES or k.dtype != q.dtype:
        return {}
    asked = [(i, s) for i, s in enumerate(statistics) if type(s) in _KINDS]
    asked = [(i, s) for i, s in asked if not isinstance(s, Pooled) or q.shape[2] >= _CELL * s.size]
    causal = call.is_causal and call.mask is None
    spans = None if causal or not asked else visible_ranges(call)
    if not asked or (spans is None and not causal):
        return {}
    from ..kernels import probe

    wanted = [s.features.to(q.device) for _, s in asked if isinstance(s, WeightedSum)]
    batch = max((x.shape[0] for x in wanted), default=1)
    features = torch.cat([x.expand(batch, -1, -1).float() for x in wanted], 2) if wanted else None
    far = any(isinstance(s, Distance) for _, s in asked)
    rows = probe.row_statistics(q, k, scale=scale, features=features, distance=far, spans=spans)
    parts = iter(rows.found.split([x.shape[2] for x in wanted], 3) if wanted else ())
    lse, made = rows.lse, dict[int, Any]()
    for i, s in asked:
        if isinstance(s, WeightedSum):
            made[i] = next(parts)
        elif isinstance(s, Entropy | Distance):
            made[i] = (rows.entropy if isinstance(s, Entropy) else rows.distance).clone()  # answers are one's own
        elif isinstance(s, LogPowerSum):  # weights to a power are, but for their sum, those of a larger scale
            sums = [probe.row_statistics(q, k, scale=a * scale, spans=spans).lse - a * lse for a in s.powers]
            made[i] = torch.stack(sums, -1).masked_fill((lse == -torch.inf)[..., None], -torch.inf)
        elif isinstance(s, Columns):
            made[i] = _columns(call, s.index.to(q.device), lse, spans or _causal(call))
        elif isinstance(s, MeanLogWeight):
            made[i] = mean_log_weight(call, s.keys.to(q.device), lse, spans or _causal(call))
        elif isinstance(s, ColumnSum):
            made[i] = probe.column_sum(q, k, lse, s.weight.to(q.device), scale=scale, spans=spans)
        elif isinstance(s, Band):
            made[i] = probe.band(q, k, lse, s.profile, queries=s.queries, scale=scale, spans=spans)
        elif isinstance(s, Pooled):
            made[i] = probe.pool(q, k, lse, s.size, scale=scale, spans=spans)
    return made


def _columns(call: AttentionCall, index: Tensor, lse: Tensor, spans: Spans) -> Tensor:
    """The weights on a few columns from the rows' log-sum-exp: ``[B, H, T, C]``."""
    (batch, heads, length, dim), (_, kv_heads, size, _) = call.q.shape, call.k.shape
    index = torch.where(index < 0, index + size, index)
    seen = (index >= spans[0][..., None]) & (index < spans[1][..., None])  # [B or 1, T, C]
    keys = call.k.detach()[:, :, None, index].float().transpose(-1, -2)  # [B, Hkv, 1, d, C]
    out = lse.new_empty(batch, heads, length, len(index))
    block = max(1, _HELD // (batch * heads * (dim + len(index))))
    for start in range(0, length, block):
        cut = slice(start, start + block)
        q = call.q.detach()[:, :, cut].float().unflatten(1, (kv_heads, -1))
        x = (q @ keys).flatten(1, 2) * call.scale
        out[:, :, cut] = torch.where(seen[:, None, cut], torch.exp(x - lse[:, :, cut, None]), 0.0)
    return out


def mean_log_weight(call: AttentionCall, sets: Tensor, lse: Tensor, spans: Spans) -> Tensor:
    """``scale q . (mean of the keys of a set that the row sees) - lse``: running sums of keys, no pass over pairs."""
    batch, kv_heads, size, dim = call.k.shape
    q, k = call.q.detach().unflatten(1, (kv_heads, -1)), call.k.detach()
    rest = lse.unflatten(1, (kv_heads, -1))
    out = lse.new_empty(*rest.shape, sets.shape[2])
    lo, hi = (x.expand(batch, -1)[:, None, None] for x in spans)  # [B, 1, 1, T]
    step = max(1, _SUMS // (batch * size * dim))  # heads at a time

    def between(x: Tensor) -> Tensor:
        """Sum of ``x [B, h, d, S]`` over the columns that each row sees: ``[B, h, d, T]``."""
        sums = torch.nn.functional.pad(x.cumsum(3), (1, 0))
        return sums.gather(3, hi.expand(*x.shape[:3], -1)) - sums.gather(3, lo.expand(*x.shape[:3], -1))

    for f in range(sets.shape[2]):
        held = sets[..., f].double().expand(batch, -1)[:, None, None]  # [B, 1, 1, S]
        count = between(held)
        for h in range(0, kv_heads, step):
            some = slice(h, h + step)
            # [B, h, T, d]; 0 / 0 is NaN, on purpose: a row that sees no key of the set has no mean
            mean = (between(k[:, some].mT.double() * held) / count).mT.to(lse.dtype)
            out[:, some, ..., f] = (q[:, some].to(lse.dtype) * mean[:, :, None]).sum(-1) * call.scale - rest[:, some]
    return out.flatten(1, 2)
