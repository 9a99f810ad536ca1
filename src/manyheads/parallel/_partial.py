# SPDX-License-Identifier: Apache-2.0
"""Attention of some rows to some keys, with its log-sum-exp, and how such parts are put together.

    out_1, lse_1  of some keys        lse = log(exp lse_1 + exp lse_2)
    out_2, lse_2  of others           out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

The gradients of a part follow from the log-sum-exp and the output of the whole, so that parts are not put together
again on the way back: with P = exp(scale q k^T - lse) and delta = sum(dout * out),

    dv = P^T dout        dS = P * (dout v^T - delta)        dq = scale dS k        dk = scale dS^T q

All parts are added in float32 (float64 in float64). On a GPU with Triton the kernels of
:mod:`manyheads.kernels.block_sparse` compute a part whose mask comes as tiles, and add it to those before in place;
elsewhere torch does, some rows at a time, and reads no tile of keys that none of them sees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .. import kernels
from ..attention.block_pattern import Rule
from ..attention.sparse_twin import Call
from ..attention.tile_pattern import BLOCK, TilePattern

__all__ = ["Impl", "Seen", "attend", "attend_back", "merge"]

Seen = Callable[[slice], Tensor | None]  # of some rows: which keys they see, bool [rows, keys]; None for all
Impl = Literal["auto", "triton", "torch"]
Sums = tuple[Tensor, Tensor]
_ROWS = 1024
_BLOCKS = 4  # of 128 rows, where the mask comes as tiles
_EVERY = slice(None)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pieces(seen: Seen | TilePattern, length: int, size: int) -> Iterator[tuple[slice, Any, Tensor | None]]:
    """Rows, the keys that any of them may see (an index of their dimension), and which of these each sees."""
    if not isinstance(seen, TilePattern):
        for start in range(0, length if size else 0, _ROWS):
            rows = slice(start, min(start + _ROWS, length))
            yield rows, _EVERY, seen(rows)
        return
    for start in range(0, seen.rows, _BLOCKS):
        blocks = slice(start, min(start + _BLOCKS, seen.rows))
        columns = np.flatnonzero(seen.state[blocks].any(0))
        if not len(columns):
            continue
        keys: Any = slice(int(columns[0]) * BLOCK, min(int(columns[-1] + 1) * BLOCK, size))
        if columns[-1] - columns[0] >= len(columns):
            every = (columns[:, None] * BLOCK + np.arange(BLOCK)).ravel()
            keys = torch.from_numpy(every[every < size]).to(seen.words.device)
        yield slice(start * BLOCK, min(blocks.stop * BLOCK, length)), keys, seen.seen(blocks, columns)


def _scores(q: Tensor, k: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """``[B, Hkv, G, T, S]`` of ``q [B, Hkv, G, T, d]`` and ``k [B, Hkv, S, d]``."""
    x = torch.einsum("bhgtd,bhsd->bhgts", q, k) * scale
    return x if seen is None else x.masked_fill(~seen, -torch.inf)


def _kernel(q: Tensor, k: Tensor, v: Tensor, seen: Seen | TilePattern, scale: float, impl: Impl) -> Any:
    """The kernels and their call, or None where torch computes a part."""
    if impl == "torch" or not isinstance(seen, TilePattern) or (impl == "auto" and not q.is_cuda):
        return None
    if impl == "auto" and not kernels.available():
        return None
    from ..kernels import block_sparse

    call = Call(seen, Rule(False), scale)  # type: ignore[arg-type] # it stands where a block pattern does
    return None if impl == "auto" and block_sparse.refusal(q, k, v, call) else (block_sparse, call)


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Seen | TilePattern, scale: float, before: Sums | None = None,
    impl: Impl = "auto",
) -> Sums:  # fmt: skip
    """Output ``[B, H, T, dv]`` and log-sum-exp ``[B, H, T]``, wide; a row that sees nothing has 0 and -inf.

    Args:
        q: ``[B, H, T, d]``.
        k, v: ``[B, Hkv, S, d]`` and ``[B, Hkv, S, dv]``; Hkv divides H.
        seen: which keys rows see, as a function or as tiles.
        scale: of the logits.
        before: what this function gave for other keys, which is put together with that of these; it may be overwritten.
        impl: ``triton`` or ``torch``; ``auto`` takes the kernels for tiles on a GPU, where they take the call.
    """
    if _nothing(seen, k):
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        return before or (q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide), lse)
    fused = _kernel(q, k, v, seen, scale, impl)
    if fused is not None:
        found = before or (
            q.new_empty(*q.shape[:3], v.shape[3], dtype=torch.float32), q.new_empty(q.shape[:3], dtype=torch.float32)
        )  # fmt: skip
        fused[0].add_forward(q, k, v, fused[1], *found, before is not None)
        return found
    q, k, v = _wide(q).unflatten(1, (k.shape[1], -1)), _wide(k), _wide(v)
    out, lse = q.new_zeros(*q.shape[:-1], v.shape[3]), q.new_full(q.shape[:-1], -torch.inf)
    for rows, keys, mask in _pieces(seen, q.shape[3], k.shape[2]):
        x = _scores(q[:, :, :, rows], k[:, :, keys], mask, scale)
        sums = x.logsumexp(-1)
        weights = (x - sums.masked_fill(sums.isinf(), 0)[..., None]).exp()
        out[:, :, :, rows] = torch.einsum("bhgts,bhsd->bhgtd", weights, v[:, :, keys])
        lse[:, :, :, rows] = sums
    made = out.flatten(1, 2), lse.flatten(1, 2)
    return made if before is None else merge(before, made)


def _nothing(seen: Seen | TilePattern, k: Tensor) -> bool:
    return not k.shape[2] or (isinstance(seen, TilePattern) and not seen.busy)


def merge(one: Sums, other: Sums) -> Sums:
    """What :func:`attend` gives for the keys of both; no key may be in both."""
    (out_1, lse_1), (out_2, lse_2) = one, other
    lse = torch.logaddexp(lse_1, lse_2)
    safe = lse.masked_fill(lse.isinf(), 0)
    return (lse_1 - safe).exp()[..., None] * out_1 + (lse_2 - safe).exp()[..., None] * out_2, lse


def attend_back(
    q: Tensor, k: Tensor, v: Tensor, seen: Seen | TilePattern, scale: float, lse: Tensor, delta: Tensor, dout: Tensor,
    before: Tensor | None = None, into: Sums | None = None, impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of a part, wide: dq, dk, dv.

    Args:
        q, k, v, seen, scale, impl: as for :func:`attend`.
        lse, delta: ``[B, H, T]`` of the whole; delta without the gradient of the log-sum-exp.
        dout: ``[B, H, T, dv]``.
        before: dq of other keys, to which that of these is added in place.
        into: where dk and dv shall be, wide; they are overwritten.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dk, dv = into or (torch.empty_like(k, dtype=wide), torch.empty_like(v, dtype=wide))
    if _nothing(seen, k):
        return torch.zeros_like(q, dtype=wide) if before is None else before, dk.zero_(), dv.zero_()
    fused = _kernel(q, k, v, seen, scale, impl)
    if fused is not None:
        dq = torch.empty_like(q, dtype=torch.float32) if before is None else before
        fused[0].add_backward(q, k, v, fused[1], lse, delta, dout, dq, dk, dv, before is not None)
        return dq, dk, dv
    heads = k.shape[1], -1
    q, dout = _wide(q).unflatten(1, heads), _wide(dout).unflatten(1, heads)
    k, v = _wide(k), _wide(v)
    lse = lse.masked_fill(lse.isinf(), 0).unflatten(1, heads)[..., None]
    delta = delta.unflatten(1, heads)[..., None]
    dq = torch.zeros_like(q) if before is None else before.unflatten(1, heads)
    dk.zero_(), dv.zero_()
    for rows, keys, mask in _pieces(seen, q.shape[3], k.shape[2]):
        at = (_EVERY,) * 3 + (rows,)
        to = _EVERY, _EVERY, keys
        p = (_scores(q[at], k[to], mask, scale) - lse[at]).exp()
        dv[to] += torch.einsum("bhgts,bhgtd->bhsd", p, dout[at])
        ds = p * (torch.einsum("bhgtd,bhsd->bhgts", dout[at], v[to]) - delta[at])
        dq[at] += torch.einsum("bhgts,bhsd->bhgtd", ds, k[to]) * scale
        dk[to] += torch.einsum("bhgts,bhgtd->bhsd", ds, q[at]) * scale
    return dq.flatten(1, 2), dk, dv
