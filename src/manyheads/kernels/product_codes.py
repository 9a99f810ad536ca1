# SPDX-License-Identifier: Apache-2.0
"""Attention over product-quantised keys on the device and values in host memory, for one query per row.

Three steps, none of which waits for the host, and :func:`encode`, which makes the codes:

- :func:`table_logits`: a token's logit is the sum of one number per sub-vector out of a table. Codes lie sub-vector by
  sub-vector, so that a block of tokens goes through one slice of the table at a time, which stays in the first-level
  cache; the numbers of all query heads of a group lie beside each other.
- :func:`select`: the lowest logit that is kept, by a search from the highest bits of a float to its lowest, four at a
  time: each pass adds up the mass above sixteen thresholds. Nothing is sorted.
- :func:`fetch`: values of kept tokens only are read, through the pointer of page-locked host memory, once for all query
  heads of a group; where no token of a block is kept, nothing is.

Twins: ``attention.product_codes`` and ``attention.offloaded``.

Legend: B rows, H query heads, Hkv key/value heads, G = H / Hkv, N tokens, g sub-vectors, c centroids.
"""

import torch
import triton
from torch import Tensor

from ..errors import UserError
from ._operator import launch
from ._product_codes import gather, logits, narrow, nearest

__all__ = ["encode", "fetch", "select", "table_logits"]

_BLOCK = 1024  # tokens of a program of the table
_WAYS, _BITS = 16, 4
_CHUNKS = 64  # programs that share the tokens of a head
_GATHERED = 64  # tokens of a step that fetches
_CODED = 32  # tokens of a program that codes
_AT_ONCE = 256  # centroids that it looks at together


def encode(k: Tensor, centroids: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes ``[B, Hkv, g, N]`` of keys ``[B, Hkv, N, d]``: of the nearest centroids, of equals the first.

    Args:
        k: bfloat16, float16 or float32.
        centroids: ``[B or 1, Hkv, g, c, w]``.
        dtype: of the codes.
    """
    (batch, heads, count, width), (books, _, groups, size, _) = k.shape, centroids.shape
    if width != groups * centroids.shape[4] or centroids.shape[1] != heads or books not in (1, batch):
        raise UserError(f"encode: keys {tuple(k.shape)} do not fit centroids {tuple(centroids.shape)}")
    out = torch.empty(batch, heads, groups, count, dtype=dtype, device=k.device)
    if out.numel():
        stride = centroids[0].numel() if books > 1 else 0
        launch(
            nearest, (batch * heads * groups, triton.cdiv(count, _CODED)),
            k.contiguous(), centroids.contiguous(), out, count, stride,
            HEADS=heads, GROUPS=groups, CENTROIDS=size, WIDTH=centroids.shape[4], BLOCK=_CODED,
            WAYS=min(_AT_ONCE, triton.next_power_of_2(size)), num_warps=8,
        )  # fmt: skip
    return out


def table_logits(
    table: Tensor, codes: Tensor, count: int, first: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Logits ``[B, H, N]`` and their log-sum-exp ``[B, H]``, float32; -inf where a token may not be attended to.

    Args:
        table: ``[B, Hkv, g, c, G]`` float32.
        codes: ``[B, Hkv, g, C]`` uint8 or int16, of which the first ``count`` tokens count.
        count: N.
        first: ``[B]``, tokens in front that are left out.
        mask: bool ``[B, N]``, which others may be attended to.
    """
    batch, heads, groups, centroids, group = table.shape
    if codes.dtype not in (torch.uint8, torch.int16) or table.dtype != torch.float32:
        raise UserError(f"table_logits: codes {codes.dtype} and table {table.dtype}, not uint8 or int16 and float32")
    if codes.shape[:3] != table.shape[:3] or not codes.is_contiguous() or count > codes.shape[3] or group > 16:
        raise UserError(f"table_logits: codes {tuple(codes.shape)} do not fit a table {tuple(table.shape)}")
    blocks = triton.cdiv(count, _BLOCK)
    out = table.new_empty(batch, heads * group, count)
    lse = table.new_empty(batch, heads * group, blocks)
    if count:
        start = torch.zeros(batch, dtype=torch.int32, device=table.device) if first is None else first.int()
        launch(
            logits, (batch * heads, blocks),
            table.contiguous(), codes, start, start if mask is None else mask.contiguous().view(torch.uint8),
            out, lse, count, codes.shape[3],
            HEADS=heads, G=group, ROWS=triton.next_power_of_2(group), GROUPS=groups,
            CENTROIDS=centroids, BLOCK=_BLOCK, MASKED=mask is not None, num_warps=8,
        )  # fmt: skip
    return out, lse.logsumexp(2) if count else lse.new_full(lse.shape[:2], -torch.inf)


def select(x: Tensor, lse: Tensor, need: Tensor | int) -> Tensor:
    """Lowest logit ``[B, H]`` that is kept: :func:`manyheads.attention.product_codes.select` says which.

    Args:
        x: logits ``[B, H, N]`` float32.
        lse: ``[B, H]`` that makes weights of them.
        need: mass ``[B, H]`` of what is kept, or how many tokens.
    """
    batch, heads, count = x.shape
    rows, passes = batch * heads, 32 // _BITS
    if not count:
        return torch.full_like(lse, -torch.inf)
    counted = isinstance(need, int)
    wanted = torch.full_like(lse, float(max(1, need))) if isinstance(need, int) else need.float()
    chunks = max(1, min(_CHUNKS, triton.cdiv(count, 4096)))
    part = x.new_empty(passes, rows, chunks, _WAYS)
    prefix = torch.empty(passes, rows, dtype=torch.int32, device=x.device)
    for i in range(passes):
        launch(
            narrow, (rows, chunks),
            x, lse.contiguous(), wanted.contiguous(), part[max(0, i - 1)], part[i], prefix, count,
            32 - _BITS * (i + 1), chunks, i, CHUNKS=triton.next_power_of_2(chunks), WAYS=_WAYS, BITS=_BITS,
            BLOCK=256, COUNTED=counted, num_warps=4,
        )  # fmt: skip
    last = (part[-1].sum(1) >= wanted.view(-1, 1)).sum(1).sub(1).clamp(min=0)
    found = (prefix[-1].long() & 0xFFFFFFFF) | last
    bits = torch.where(found >= 2**31, found - 2**31, 0xFFFFFFFF - found)  # what ``_ordered`` made of a float
    value = torch.where(bits >= 2**31, bits - 2**32, bits).int().view(torch.float32)
    value = torch.where(found <= 0x007FFFFF, -torch.inf, value)  # at or below -inf: nothing suffices
    return torch.where(found >= 0xFF800000, torch.inf, value).view(batch, heads)


def fetch(
    x: Tensor, lse: Tensor, lowest: Tensor, values: Tensor, value_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of the values of the kept tokens by their weights, read where they lie.

    Args:
        x: logits ``[B, H, N]`` float32; -inf is never kept.
        lse: ``[B, H]``.
        lowest: ``[B, H]``, the lowest logit that is kept.
        values: ``[C, B, Hkv, dv]``, on the device or in page-locked host memory; with ``value_scale`` float8_e4m3fn, or
            INT4, which is uint8 ``[C, B, Hkv, dv / 2]``.
        value_scale: ``[B, Hkv, C]``.

    Returns:
        The sum ``[B, H, dv]`` and the mass of what is kept ``[B, H]``, float32; the number of values read ``[B, Hkv]``.
    """
    (batch, heads, count), (_, _, kv_heads, width) = x.shape, values.shape
    bits = {torch.float8_e4m3fn: 8, torch.uint8: 4}.get(values.dtype, 16)
    if (bits < 16) != (value_scale is not None) or not values.is_contiguous() or len(values) < count:
        raise UserError(f"fetch: values {tuple(values.shape)} {values.dtype} do not fit {count} tokens or their scales")
    pairs, group, channels = batch * kv_heads, heads // kv_heads, 2 * width if bits == 4 else width
    splits = max(1, min(triton.cdiv(count, _GATHERED), 2048 // max(1, pairs)))
    out = x.new_empty(pairs, splits, 16, channels)
    mass = x.new_empty(pairs, splits, 16)
    fetched = torch.empty(pairs, splits, dtype=torch.int32, device=x.device)
    launch(
        gather, (pairs, splits),
        x, lse.contiguous(), lowest.contiguous(), values.view(torch.uint8) if bits == 8 else values,
        lse if value_scale is None else value_scale, out, mass, fetched, count, pairs * width,
        0 if value_scale is None else value_scale.shape[2],
        G=group, ROWS=16, D=channels, BLOCK=_GATHERED, BITS=bits, num_warps=4,
    )  # fmt: skip
    out, mass = out[:, :, :group].sum(1), mass[:, :, :group].sum(1)
    return out.view(batch, heads, channels), mass.view(batch, heads), fetched.sum(1).view(batch, kv_heads)
