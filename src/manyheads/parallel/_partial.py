# SPDX-License-Identifier: Apache-2.0
"""Attention of some rows to some keys, with its log-sum-exp, and how such parts are put together.

    out_1, lse_1  of some keys        lse = log(exp lse_1 + exp lse_2)
    out_2, lse_2  of others           out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

The gradients of a part follow from the log-sum-exp and the output of the whole, so that parts are not put together
again on the way back: with P = exp(scale q k^T - lse) and delta = sum(dout * out),

    dv = P^T dout        dS = P * (dout v^T - delta)        dq = scale dS k        dk = scale dS^T q

All parts are added in float32 (float64 in float64), rows ``_ROWS`` at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

__all__ = ["Seen", "attend", "attend_back", "merge"]

Seen = Callable[[slice], Tensor | None]  # of some rows: which keys they see, bool [rows, keys]; None for all
_ROWS = 1024


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _chunks(length: int) -> Iterator[slice]:
    for start in range(0, length, _ROWS):
        yield slice(start, min(start + _ROWS, length))


def _scores(q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """``[B, Hkv, G, T, S]`` of ``q [B, Hkv, G, T, d]`` and ``k [B, Hkv, S, d]``."""
    x = torch.einsum("bhgtd,bhsd->bhgts", q, k) * scale
    return x if seen is None else x.masked_fill(~seen, -torch.inf)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``[B, H, T, dv]`` and log-sum-exp ``[B, H, T]``, wide; a row that sees nothing has 0 and -inf.

    Args:
        q: ``[B, H, T, d]``.
        k, v: ``[B, Hkv, S, d]`` and ``[B, Hkv, S, dv]``; Hkv divides H.
        seen: which keys rows see.
        scale: of the logits.
    """
    q, k, v = _wide(q).unflatten(1, (k.shape[1], -1)), _wide(k), _wide(v)
    out, lse = q.new_zeros(*q.shape[:-1], v.shape[3]), q.new_full(q.shape[:-1], -torch.inf)
    for rows in _chunks(q.shape[3] if k.shape[2] else 0):
        x = _scores(q[:, :, :, rows], k, seen(rows), scale)
        found = x.logsumexp(-1)
        weights = (x - found.masked_fill(found.isinf(), 0)[..., None]).exp()
        out[:, :, :, rows] = torch.einsum("bhgts,bhsd->bhgtd", weights, v)
        lse[:, :, :, rows] = found
    return out.flatten(1, 2), lse.flatten(1, 2)


def merge(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What :func:`attend` gives for the keys of both; no key may be in both."""
    (out_1, lse_1), (out_2, lse_2) = one, other
    lse = torch.logaddexp(lse_1, lse_2)
    safe = lse.masked_fill(lse.isinf(), 0)
    return (lse_1 - safe).exp()[..., None] * out_1 + (lse_2 - safe).exp()[..., None] * out_2, lse


def attend_back(
    q: Tensor, k: Tensor, v: Tensor, seen: Seen, scale: float, lse: Tensor, delta: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part, wide: dq, dk, dv.

    Args:
        q, k, v, seen, scale: as for :func:`attend`.
        lse, delta: ``[B, H, T]`` of the whole; delta without the gradient of the log-sum-exp.
        dout: ``[B, H, T, dv]``.
    """
    heads = k.shape[1], -1
    q, dout = _wide(q).unflatten(1, heads), _wide(dout).unflatten(1, heads)
    k, v = _wide(k), _wide(v)
    lse = lse.masked_fill(lse.isinf(), 0).unflatten(1, heads)[..., None]
    delta = delta.unflatten(1, heads)[..., None]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows in _chunks(q.shape[3] if k.shape[2] else 0):
        at = (slice(None),) * 3 + (rows,)
        p = (_scores(q[at], k, seen(rows), scale) - lse[at]).exp()
        dv += torch.einsum("bhgts,bhgtd->bhsd", p, dout[at])
        ds = p * (torch.einsum("bhgtd,bhsd->bhgts", dout[at], v) - delta[at])
        dq[at] = torch.einsum("bhgts,bhsd->bhgtd", ds, k) * scale
        dk += torch.einsum("bhgts,bhgtd->bhsd", ds, q[at]) * scale
    return dq.flatten(1, 2), dk, dv
