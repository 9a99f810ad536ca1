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
from torch.nn.functional import pad

from ..call import AttentionCall
from .statistics import (
    Band,
    Columns,
    ColumnSum,
    Distance,
    Entropy,
    LogPowerSum,
    MeanLogWeight,
    Peak,
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
_KINDS = (Band, Columns, Distance, Entropy, LogPowerSum, WeightedSum, MeanLogWeight, Peak, Pooled, ColumnSum)


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
    causal = call.is_causal and call.mask is None
    spans = None if causal else visible_ranges(call)
    if spans is None and not causal:
        return {}
    return {i: partial(_later, call, s.keys, spans) for i, s in asked}


def _later(call: AttentionCall, sets: Tensor, spans: Spans | None, lse: Tensor) -> Tensor:
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
    peak = any(isinstance(s, Peak) for _, s in asked)
    rows = probe.row_statistics(q, k, scale=scale, features=features, distance=far, peak=peak, spans=spans)
    parts = iter(rows.found.split([x.shape[2] for x in wanted], 3) if wanted else ())
    lse, made, given = rows.lse, dict[int, Any](), set[int]()

    def own(x: Tensor) -> Tensor:
        """Answers are one's own: what a second statistic is given is a copy."""
        mine = x.clone() if id(x) in given else x
        given.add(id(x))
        return mine

    for i, s in asked:
        if isinstance(s, WeightedSum):
            made[i] = next(parts)
        elif isinstance(s, Entropy | Distance):
            made[i] = own(rows.entropy if isinstance(s, Entropy) else rows.distance)
        elif isinstance(s, Peak):
            made[i] = own(rows.peak), rows.column.long()
        elif isinstance(s, LogPowerSum):  # weights to a power are, but for their sum, those of a larger scale
            sums = [probe.row_statistics(q, k, scale=a * scale, spans=spans).lse - a * lse for a in s.powers]
            made[i] = torch.stack(sums, -1).masked_fill((lse == -torch.inf)[..., None], -torch.inf)
        elif isinstance(s, Columns):
            made[i] = _columns(call, s.index.to(q.device), lse, spans or _causal(call))
        elif isinstance(s, MeanLogWeight):
            made[i] = mean_log_weight(call, s.keys.to(q.device), lse, spans)
        elif isinstance(s, ColumnSum):
            made[i] = probe.column_sum(q, k, lse, s.weight.to(q.device), scale=scale, spans=spans)
        elif isinstance(s, Band):
            made[i] = probe.band(q, k, lse, s.profile, queries=s.queries, by=s.by, scale=scale, spans=spans)
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


def mean_log_weight(call: AttentionCall, sets: Tensor, lse: Tensor, spans: Spans | None) -> Tensor:
    """``scale q . (mean of the keys of a set that the row sees) - lse``: running sums of keys, no pass over pairs.

    Args:
        call: the attention computation.
        sets: ``[B or 1, S, F]`` boolean.
        lse: of the rows.
        spans: what each row sees; None for causal.
    """
    batch, kv_heads, size, dim = call.k.shape
    length, count_of_sets = call.q.shape[2], sets.shape[2]
    q, k = call.q.detach().unflatten(1, (kv_heads, -1)), call.k.detach()
    old = size - length if spans is None and size >= length else 0  # keys that every row sees
    if spans is None and size < length:
        spans = _causal(call)
    held = sets.permute(2, 0, 1).expand(-1, batch, -1)  # [F, B, S]
    before = _sums(k[:, :, :old], held[..., :old]) if old else None
    new = held[:, :, None, None, old:].double()  # [F, B, 1, 1, S - old]
    count = _between(new, spans)
    if old:
        count = count + held[:, :, None, None, :old].sum(-1, keepdim=True)
    step = max(1, _SUMS // (count_of_sets * batch * (size - old) * dim))  # heads at a time
    parts = []
    for h in range(0, kv_heads, step):
        some = slice(h, h + step)
        sums = _between(k[:, some, old:].mT.double() * new, spans)  # [F, B, h, d, T]
        sums = sums if before is None else sums.add_(before[:, :, some, :, None])
        # 0 / 0 is NaN, on purpose: a row that sees no key of the set has no mean
        mean = (sums / count).to(lse.dtype).permute(1, 2, 4, 3, 0)  # [B, h, T, d, F]
        parts.append((q[:, some].to(lse.dtype).transpose(2, 3) @ mean).transpose(2, 3))  # [B, h, G, T, F]
    x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return x.flatten(1, 2) * call.scale - lse[..., None]


def _between(x: Tensor, spans: Spans | None) -> Tensor:
    """Sum of ``x [F, B, h, d, S]`` over the columns that each row sees: ``[..., T]``; causal without ``spans``."""
    if spans is None:
        return x.cumsum(-1)
    lo, hi = (bound.expand(x.shape[1], -1)[:, None, None].expand(*x.shape[:4], -1) for bound in spans)
    sums = pad(x.cumsum(-1), (1, 0))
    return sums.gather(-1, hi) - sums.gather(-1, lo)


def _sums(keys: Tensor, held: Tensor) -> Tensor:
    """Sums ``[F, B, Hkv, d]`` in float64 of the keys ``[B, Hkv, S, d]`` that are ``held [F, B, S]``, in pieces."""
    batch, heads, size, dim = keys.shape
    total = keys.new_zeros(len(held), batch, heads, dim, dtype=torch.float64)
    piece = max(1, _SUMS // (len(held) * batch * heads * dim))
    for start in range(0, size, piece):
        cut = slice(start, start + piece)
        total += (keys[:, :, cut] * held[:, :, None, cut, None]).sum(3, dtype=torch.float64)
    return total
