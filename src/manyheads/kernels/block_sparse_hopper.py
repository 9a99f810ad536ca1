# SPDX-License-Identifier: Apache-2.0
"""Which calls of block-sparse attention the kernels for Hopper take, and how these are launched.

They are Gluon, which Triton's interpreter does not run: nothing but a GPU of compute capability 9.0 reaches them.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from ._operator import LOG2E, launch
from ._passes import _rows, _strides, like

__all__ = ["add_backward", "add_forward", "backward", "forward", "refusal"]

_TILE = 128  # queries and keys of a tile
_SHARED = 224 * 1024  # bytes of shared memory for tiles; the rest is for barriers
_BUFFERS = 2  # tiles of queries of a program at once
_STAGES = 4  # tiles of queries of the pass for keys at once


@cache
def _device(index: int) -> tuple[bool, int]:
    """Whether the device is one that the kernels are written for, and its multiprocessors."""
    import triton

    properties = torch.cuda.get_device_properties(index)
    known = triton.__version__.split(".")[:2] == ["3", "6"]  # Gluon is new, and changes with every release
    hopper = (properties.major, properties.minor) == (9, 0) and torch.version.hip is None
    return known and hopper, int(properties.multi_processor_count)


def _fetched(x: Tensor) -> bool:
    """Whether the copy engine takes a tensor: some rows, and rows, heads and tokens at multiples of 16 bytes."""
    steps = [x.stride(i) for i in range(3) if x.shape[i] > 1]
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and all(step > 0 and step % 8 == 0 for step in steps)


def refusal(q: Tensor, k: Tensor, v: Tensor, call: Any, dout: Tensor | None = None) -> str | None:
    """Why these kernels do not take a call, or its backward pass; None if they do."""
    if not q.is_cuda or not _device(q.device.index)[0]:
        return "Hopper's kernels take a GPU of compute capability 9.0 under Triton 3.6"
    if q.element_size() != 2 or not q.shape[3] == v.shape[3] in (64, 128):
        return "Hopper's kernels take 16 bits and heads of 64 or 128 channels"
    if call.pattern.block_q % _TILE or call.pattern.block_k % _TILE:
        return f"Hopper's kernels take blocks of a multiple of {_TILE}"
    if call.bias is not None or call.documents is not None:
        return "Hopper's kernels know no bias, padding or documents"
    if not all(_fetched(x) for x in (q, k, v, dout) if x is not None):
        return "Hopper's kernels take rows, at least one, that begin at multiples of 16 bytes"
    return None


def _described(x: Tensor, rows: int = _TILE // 2) -> Any:
    """What the copy engine is told of ``[B, H, T, d]``, of which it moves so many rows at a time."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    strides = [x.stride(i) if x.shape[i] > 1 else 8 for i in range(3)]
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, x.shape[3]], layout)


def _programs(tiles: int, x: Tensor) -> tuple[int]:
    return (min(tiles, _device(x.device.index)[1]),)


def forward(q: Tensor, k: Tensor, v: Tensor, call: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a call that is not refused."""
    out, lse = like(q, q.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch_forward(q, k, v, call, out, lse, call.pattern.rows, False)
    return out, lse


def add_forward(q: Tensor, k: Tensor, v: Tensor, call: Any, out: Tensor, lse: Tensor, add: bool) -> None:
    """What :func:`.block_sparse.add_forward` does, for a call that is not refused."""
    _launch_forward(q, k, v, call, out, lse, call.pattern.busy if add else call.pattern.rows, add)


def _launch_forward(
    q: Tensor, k: Tensor, v: Tensor, call: Any, out: Tensor, lse: Tensor, rows: int, add: bool
) -> None:  # fmt: skip
    from . import _block_sparse_hopper

    (batch, heads, length, width), size = q.shape, k.shape[2]
    pattern, rule = call.pattern, call.rule
    lists = pattern.lists(rule)
    tiles = batch * heads * rows * (pattern.block_q // _TILE)
    one = rule.window is None and pattern.block_k == _TILE and not pattern.masked
    one = one and (not rule.causal or (pattern.block_q == _TILE and (size - length) % _TILE == 0))
    begun = torch.zeros(1, dtype=torch.int32, device=q.device)
    words, base = _bits(lists)
    if pattern.masked:
        key = "words with a whole tile before them"
        if key not in pattern._memo:
            pattern._memo[key] = torch.cat([words.new_full((1, _TILE, _TILE // 32), -1), words])
        words = pattern._memo[key]
    launch(
        _block_sparse_hopper.forward, _programs(tiles, q),
        _described(q), _described(k, _TILE), _described(v, _TILE), _described(q if pattern.masked else out), lse,
        begun, lists.indices, lists.spans, lists.order, out, *_strides(out), words, base, *_rows(lists.indices),
        heads, length, size, rows, lists.indices.shape[3], rule.window or 0, call.scale * LOG2E, tiles,
        G=heads // k.shape[1], D=width, BQ=pattern.block_q, BK=pattern.block_k, N=_TILE, CAUSAL=rule.causal,
        WINDOW=rule.window is not None, TILED=pattern.masked, ADD=add, MORE=not one, BUFFERS=_BUFFERS,
        STAGES=_ring(width, _BUFFERS), num_warps=4,
    )  # fmt: skip


def _bits(lists: Any) -> tuple[Tensor, Tensor]:
    """Words and bases of lists, or what stands in for them."""
    return (lists.spans, lists.spans) if lists.words is None or lists.base is None else (lists.words, lists.base)


def _ring(width: int, held: int) -> int:
    """Tiles of keys or values that fit beside so many of queries."""
    return min(8, _SHARED // (_TILE * width * 2) - held)


def backward(
    q: Tensor, k: Tensor, v: Tensor, call: Any, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of a call that is not refused; ``dout`` is fetched as they are."""
    from ._block_sparse_hopper_queries import rows

    (batch, heads, length, width), pattern = q.shape, call.pattern
    pairs, padded = batch * heads, pattern.rows * pattern.block_q
    sums = lse.new_empty(2 * pairs, padded)
    launch(
        rows, (padded // 32, pairs),
        out, dout, lse, lse if dlse is None else dlse.contiguous(), sums, *_strides(out), *_strides(dout), heads,
        length, padded, pairs, D=width, M=32, DLSE=dlse is not None, num_warps=4,
    )  # fmt: skip
    dq, dk, dv = like(q, width), like(k, width), like(v, width)
    _launch_backward(q, k, v, call, sums, dout, dq, dk, dv, pattern.rows, False)
    return dq, dk, dv


def add_backward(
    q: Tensor, k: Tensor, v: Tensor, call: Any, lse: Tensor, delta: Tensor, dout: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, add: bool,
) -> None:  # fmt: skip
    """What :func:`.block_sparse.add_backward` does, for a call that is not refused."""
    pattern, length = call.pattern, q.shape[2]
    sums = lse.new_zeros(2, q.shape[0] * q.shape[1], pattern.rows * _TILE)
    sums[0].fill_(torch.inf)
    sums[0, :, :length] = torch.where(lse == -torch.inf, torch.inf, lse * LOG2E).flatten(0, 1)
    sums[1, :, :length] = delta.flatten(0, 1)
    rows = pattern.busy if add else pattern.rows
    _launch_backward(q, k, v, call, sums.flatten(0, 1), dout, dq, dk, dv, rows, add)


def _launch_backward(
    q: Tensor, k: Tensor, v: Tensor, call: Any, sums: Tensor, dout: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    rows: int, add: bool,
) -> None:  # fmt: skip
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ._block_sparse_hopper_keys import keys
    from ._block_sparse_hopper_queries import queries

    (batch, heads, length, width), (_, kv_heads, size, _) = q.shape, k.shape
    pattern, rule, pairs, group = call.pattern, call.rule, batch * heads, heads // kv_heads
    lists, turned, padded = pattern.lists(rule), pattern.transposed(rule, group), sums.shape[1]
    begun = torch.zeros(2, dtype=torch.int32, device=q.device)
    given = rule.window or 0, call.scale * LOG2E, call.scale
    constants = {"G": group, "D": width, "BQ": pattern.block_q, "CAUSAL": rule.causal}
    constants |= {"WINDOW": rule.window is not None, "TILED": pattern.masked}
    stored = [_described(x if pattern.masked else y) for x, y in ((q, dq), (k, dk), (v, dv))]
    tiles = pairs * rows * (pattern.block_q // _TILE)
    launch(
        queries, _programs(tiles, q),
        _described(q), _described(k, _TILE), _described(v, _TILE), _described(dout), stored[0], sums,
        begun, lists.indices, lists.spans, lists.order, dq, *_strides(dq), *_bits(lists), *_rows(lists.indices),
        heads, length, size, padded, pairs, rows, lists.indices.shape[3], *given, tiles, BK=pattern.block_k,
        N=_TILE, ADD=add, STAGES=_ring(width, 2), num_warps=4, **constants,
    )  # fmt: skip
    parts = turned.indices.shape[2]
    tiles = batch * kv_heads * parts * (pattern.tile // _TILE)
    described = TensorDescriptor(sums, [2 * pairs, padded], [padded, 1], [1, _TILE // 2], NVMMASharedLayout(0, 32, 2))
    launch(
        keys, _programs(tiles, q),
        _described(q), _described(k), _described(v), _described(dout), described, *stored[1:],
        begun[1:], turned.indices, turned.spans, turned.order, dk, *_strides(dk), dv, *_strides(dv),
        *_bits(turned), *_rows(turned.indices), *_rows(turned.order[..., None]), kv_heads, length, size, pairs,
        parts, turned.indices.shape[3], *given, tiles, TILE=pattern.tile, M=_TILE // 2, STAGES=_STAGES,
        num_warps=4, **constants,
    )  # fmt: skip
