# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention in plain torch: the keys of some blocks of queries are gathered, as many as memory holds.

It says what the kernel of :mod:`manyheads.kernels.block_sparse` computes, runs anywhere and in float64. The backward
pass makes the weights anew from the log-sum-exp, so nothing of the size of the map is kept.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .block_pattern import BlockPattern, Rule
from .reference import block_size, widened

__all__ = ["Call", "backward", "forward"]


class Call(NamedTuple):
    """What a call says beside q, k and v.

    Attributes:
        pattern, rule: what is read, and what is seen of it.
        scale: factor on ``q k^T``.
        bias: ``[B or 1, H or 1, S]`` added to the logits of a key.
        documents: numbers ``[B or 1, T]`` and ``[B or 1, S]``, int32; a query sees the keys of its own.
    """

    pattern: BlockPattern
    rule: Rule
    scale: float
    bias: Tensor | None = None
    documents: tuple[Tensor, Tensor] | None = None


class _Rows(NamedTuple):
    """Some blocks of queries and the keys that they read: R blocks, n keys, c queries each."""

    queries: Tensor  # [R, c] rows of the flat q
    keys: Tensor  # [R, n] rows of the flat k
    q: Tensor
    k: Tensor
    v: Tensor
    logits: Tensor  # [R, c, n], -inf where nothing is seen
    real: Tensor  # [R, c]


def _gathered(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Iterator[_Rows]:
    """All blocks of queries that read anything, as many at a time as the scratch memory holds."""
    (batch, heads, length, width), (_, kv_heads, size, _) = q.shape, k.shape
    pattern, rule = call.pattern, call.rule
    lists = pattern.lists(rule)
    count, cells, many = pattern.rows, pattern.block_k, pattern.block_q
    spans = lists.spans.expand(batch, heads, count, 4).reshape(-1, 4).long()
    indices = lists.indices.flatten(0, 2)
    row = torch.arange(batch * heads * count, device=q.device)
    b, h, i = row // (heads * count), row // count % heads, row % count
    own = (b % lists.indices.shape[0] * lists.indices.shape[1] + h % lists.indices.shape[1]) * count + i
    lengths = spans[:, 3] - spans[:, 0]
    order = lengths.argsort(dim=0, descending=True, stable=True)
    longest = lengths[order].tolist()
    q, k, v = widened(q).flatten(0, 2), widened(k).flatten(0, 2), widened(v).flatten(0, 2)
    at = 0
    while at < len(longest) and longest[at]:
        n = longest[at] * cells
        take = block_size(q, n * (width + v.shape[1] + 2 * many))
        r, at = order[at : at + take], at + take
        entry = spans[r, :1] + torch.arange(n // cells, device=q.device)
        block = indices[own[r, None], entry.clamp(max=indices.shape[1] - 1)].long()
        key = (block[..., None] * cells + torch.arange(cells, device=q.device)).flatten(1)  # [R, n]
        held = (entry < spans[r, 3:]).repeat_interleave(cells, 1) & (key < size)
        key = key.clamp(max=size - 1)
        query = i[r, None] * many + torch.arange(many, device=q.device)  # [R, c]
        real = query < length
        query = query.clamp(max=length - 1)
        seen = held[:, None] & real[..., None] & rule.allows((query + size - length)[..., None], key[:, None])
        if call.documents is not None:
            mine, theirs = (x[b[r, None] % x.shape[0], p] for x, p in zip(call.documents, (query, key), strict=True))
            seen = seen & (mine[..., None] == theirs[:, None])
        queries = (b[r] * heads + h[r])[:, None] * length + query
        keys = (b[r] * kv_heads + h[r] // (heads // kv_heads))[:, None] * size + key
        x = q[queries] @ k[keys].transpose(1, 2) * call.scale
        if call.bias is not None:
            bias = call.bias.to(x.dtype)
            x = x + bias[b[r, None] % bias.shape[0], h[r, None] % bias.shape[1], key][:, None]
        x = x.masked_fill(~seen, -torch.inf)
        yield _Rows(queries, keys, q[queries], k[keys], v[keys], x, real)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, grad: bool = False) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in torch; whether a backward pass follows makes no difference."""
    out = widened(q).new_zeros(q.shape[:3].numel(), v.shape[3])
    lse = out.new_full((len(out),), -torch.inf)
    for rows in _gathered(q, k, v, call):
        sums = rows.logits.logsumexp(2)
        weights = (rows.logits - torch.where(sums == -torch.inf, 0.0, sums)[..., None]).exp()
        at = rows.queries[rows.real]
        out[at] = (weights @ rows.v)[rows.real]
        lse[at] = sums[rows.real]
    return out.to(q.dtype).view(*q.shape[:3], -1), lse.view(q.shape[:3])


def backward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v in torch."""
    dq, dk, dv = (torch.zeros_like(widened(x).flatten(0, 2)) for x in (q, k, v))
    delta = (widened(dout) * widened(out)).sum(3)
    delta = (delta if dlse is None else delta - dlse).flatten()
    sums, grad = torch.where(lse == -torch.inf, torch.inf, lse).flatten(), widened(dout).flatten(0, 2)
    for rows in _gathered(q, k, v, call):
        weights = (rows.logits - sums[rows.queries][..., None]).exp()
        do = grad[rows.queries]
        ds = weights * (do @ rows.v.transpose(1, 2) - delta[rows.queries][..., None]) * call.scale
        dq[rows.queries[rows.real]] = (ds @ rows.k)[rows.real]
        dk.index_add_(0, rows.keys.flatten(), (ds.transpose(1, 2) @ rows.q).flatten(0, 1))
        dv.index_add_(0, rows.keys.flatten(), (weights.transpose(1, 2) @ do).flatten(0, 1))
    return tuple(g.view(x.shape).to(x.dtype) for g, x in zip((dq, dk, dv), (q, k, v), strict=True))  # type: ignore[return-value]
