# SPDX-License-Identifier: Apache-2.0
"""Block-sparse softmax attention on a GPU; :mod:`manyheads.attention.sparse_twin` says what it computes.

The forward pass is FlashAttention's (arXiv 2205.14135) along the list of key blocks of a block of queries; the backward
pass makes the weights anew from the log-sum-exp, once along the same lists for the queries, and once along the
transposed lists for keys and values, so no two programs add to one number and results are the same bits every time.
What is seen whole is told apart beforehand and needs no mask. Programs with the longest lists start first.

Where blocks of keys are smaller than 64 (tokens, vertical lines), the transposed lists are of tiles of 64 keys, with
a bit for each block: their backward pass costs what the tiles cost that any key of them belongs to.

Forward and backward each ask whether the kernels for Hopper (:mod:`.block_sparse_hopper`) take the call; what these
refuse runs in Triton. Output and log-sum-exp mean the same, so that a forward of one goes with a backward of the
other. No kernel takes the place of another after a failure.

:func:`add_forward` and :func:`add_backward` take tiles with bits in place of a block pattern, and put what they find
together with what other keys gave; :mod:`manyheads.parallel._partial` says what that is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _block_sparse, _block_sparse_keys, block_sparse_hopper
from ._operator import LOG2E, compile_together, launch
from ._passes import _rows, _strides, blocks, dense, like, padded

__all__ = ["add_backward", "add_forward", "backward", "forward", "refusal", "written_for"]


class _Config(NamedTuple):
    """Queries and keys of a tile, warps of a program, depth of the loop's pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


def _config(kind: str, width: int, itemsize: int) -> _Config:
    """Fixed, so that no first call spends its time on tuning. ``kind``: ``forward``, ``queries`` or ``keys``."""
    if itemsize == 4:
        return _Config(64 if width <= 64 else 32, 32, 4, 2)
    if width <= 64:
        return _Config(64, 128, 8, 2) if kind == "keys" else _Config(128, 64, 4, 3)
    if width <= 128:
        return {
            "forward": _Config(128, 64, 8, 3), "queries": _Config(128, 64, 8, 3), "keys": _Config(64, 128, 8, 3),
        }[kind]  # fmt: skip
    return {
        "forward": _Config(128, 64, 8, 2), "queries": _Config(64, 32, 8, 2), "keys": _Config(32, 64, 8, 1),
    }[kind]  # fmt: skip


def refusal(q: Tensor, k: Tensor, v: Tensor, call: Any) -> str | None:
    """Why the kernel cannot take a call; None if it can."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the kernel takes 16 and 32 bit of one kind, not {q.dtype}, {k.dtype} and {v.dtype}"
    if max(q.shape[3], v.shape[3]) > (256 if q.element_size() == 2 else 128):
        return "the kernel takes up to 256 channels in 16 bits and 128 in 32"
    for size in (call.pattern.block_q, call.pattern.block_k):
        if size & (size - 1):
            return f"the kernel takes blocks of a power of two, not of {size}"
    return None


class _Launch:
    """What the three kernels are told of a call."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: Any) -> None:
        (batch, self.heads, self.length, width), (_, self.kv_heads, self.size, _) = q.shape, k.shape
        pattern, rule, bias, documents = call.pattern, call.rule, call.bias, call.documents
        self.batch, self.pattern, self.rule = batch, pattern, rule
        self.width = padded(max(width, v.shape[3]), q.element_size())
        self.scale, self.factor = call.scale, call.scale * LOG2E
        self.bias = q if bias is None else bias.contiguous()
        mine, theirs = (pattern.indices, pattern.indices) if documents is None else documents
        self.extra = self.bias, mine, theirs
        self.extra_strides = (
            0 if bias is None or bias.shape[0] == 1 else self.bias.stride(0),
            0 if bias is None or bias.shape[1] == 1 else self.bias.stride(1),
            0 if mine.shape[0] == 1 or documents is None else self.length,
            0 if theirs.shape[0] == 1 or documents is None else self.size,
        )  # fmt: skip
        self.window = rule.window or 0
        self.constants = {
            "G": self.heads // self.kv_heads, "D": width, "DV": v.shape[3], "WD": padded(width, q.element_size()),
            "WV": padded(v.shape[3], q.element_size()), "BQ": pattern.block_q, "BK": pattern.block_k,
            "CAUSAL": rule.causal, "WINDOW": rule.window is not None, "BIAS": bias is not None,
            "DOCS": documents is not None, "TILED": pattern.masked, "ASM": q.is_cuda and torch.version.hip is None,
        }  # fmt: skip

    def config(self, kind: str, itemsize: int) -> dict[str, int]:
        """Tile and warps of a kernel, tiles no larger than what they are cut from."""
        config, pattern = _config(kind, self.width, itemsize), self.pattern
        queries, keys = config.queries, config.keys
        if kind == "keys":
            keys = min(keys, pattern.tile)
        else:
            queries = min(queries, max(16, pattern.block_q))
        warps = max(4, config.warps * queries * keys // (config.queries * config.keys))
        return {"M": queries, "N": keys, "num_warps": warps, "STAGES": config.stages}


_compiled: set[Any] = set()


def _compile(q: Tensor, k: Tensor, v: Tensor, call: Any, grad: bool) -> None:
    """Compile all that calls of this kind launch, at once, the kernels of a backward pass with that of the forward."""
    pattern, given = call.pattern, (call.bias is not None, call.documents is not None)
    sizes = q.shape[1], k.shape[1], q.shape[3], v.shape[3], pattern.block_q, pattern.block_k
    kind = q.dtype, q.device, sizes, call.rule.causal, call.rule.window is not None, given, grad
    if kind in _compiled:
        return
    _compiled.add(kind)

    def both() -> None:
        out, lse = _forward(q, k, v, call)
        if grad:
            backward(q, k, v, call, out, lse, out, None)

    compile_together(both)


def written_for(q: Tensor, k: Tensor, v: Tensor, call: Any) -> str:
    """Which kernels take a call, and why not those for Hopper."""
    why_not = block_sparse_hopper.refusal(dense(q), dense(k), dense(v), call)
    return "the kernels for Hopper" if why_not is None else f"the Triton kernels ({why_not})"


def forward(q: Tensor, k: Tensor, v: Tensor, call: Any, grad: bool = False) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; arguments as for :func:`manyheads.attention.sparse_twin.forward`.

    ``grad``: a backward pass will follow.
    """
    _compile(q, k, v, call, grad)
    return _forward(q, k, v, call)


def _forward(q: Tensor, k: Tensor, v: Tensor, call: Any) -> tuple[Tensor, Tensor]:
    q, k, v = dense(q), dense(k), dense(v)
    if block_sparse_hopper.refusal(q, k, v, call) is None:
        return block_sparse_hopper.forward(q, k, v, call)
    out, lse = like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    _launch_forward(q, k, v, call, out, lse, False)
    return out, lse


def _launch_forward(q: Tensor, k: Tensor, v: Tensor, call: Any, out: Tensor, lse: Tensor, add: bool) -> None:
    run, lists, pattern = _Launch(q, k, v, call), call.pattern.lists(call.rule), call.pattern
    config = run.config("forward", q.element_size())
    rows = pattern.busy if add else pattern.rows
    launch(
        _block_sparse.forward, (rows * blocks(pattern.block_q, config["M"]), run.batch * run.heads),
        q, k, v, out, lse, lists.indices, lists.spans, lists.order, *_bits(lists), *run.extra, *_strides(q),
        *_strides(k), *_strides(v), *_strides(out), *_rows(lists.indices), *run.extra_strides, run.heads,
        run.length, run.size, pattern.rows, lists.indices.shape[3], run.window, run.factor, ADD=add,
        **run.constants, **config,
    )  # fmt: skip


def _bits(lists: Any) -> tuple[Tensor, Tensor]:
    """Words and bases of lists, or what stands in for them."""
    return (lists.spans, lists.spans) if lists.words is None else (lists.words, lists.base)


def add_forward(q: Tensor, k: Tensor, v: Tensor, call: Any, out: Tensor, lse: Tensor, add: bool) -> None:
    """Output and log-sum-exp of a call with a :class:`.tile_pattern.TilePattern`, into what is there.

    Args:
        q, k, v, call: as for :func:`forward`; :func:`refusal` has let them pass.
        out: float32 ``[B, H, T, dv]``.
        lse: float32 ``[B, H, T]``, without gaps.
        add: they hold those of other keys, and hold those of both in the end; otherwise they are overwritten.
    """
    q, k, v = dense(q), dense(k), dense(v)
    hopper = block_sparse_hopper.refusal(q, k, v, call) is None
    way = block_sparse_hopper.add_forward if hopper else _launch_forward
    _once((hopper, add), q, k, v, partial(way, q, k, v, call, out, lse, add))


def _once(how: tuple[bool, ...], q: Tensor, k: Tensor, v: Tensor, run: Callable[[], None]) -> None:
    """Run; before the first call of a kind with a tile pattern compile its kernels, at once."""
    kind = how, q.dtype, q.device, q.shape[1], k.shape[1], q.shape[3], v.shape[3]
    if kind not in _compiled:
        _compiled.add(kind)
        compile_together(run)
    run()


def backward(
    q: Tensor, k: Tensor, v: Tensor, call: Any, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; arguments as for :func:`manyheads.attention.sparse_twin.backward`."""
    q, k, v, dout = dense(q), dense(k), dense(v), dense(dout.to(q.dtype))
    if block_sparse_hopper.refusal(q, k, v, call, dout) is None:
        return block_sparse_hopper.backward(q, k, v, call, out, lse, dout, dlse)
    delta = torch.empty_like(lse)
    dq, dk, dv = like(q, q.shape[3]), like(k, k.shape[3]), like(v, v.shape[3])
    dlse = lse if dlse is None else dlse.contiguous()
    _launch_backward(q, k, v, call, out, lse, dlse, delta, dout, dq, dk, dv, {"DLSE": dlse is not lse})
    return dq, dk, dv


def add_backward(
    q: Tensor, k: Tensor, v: Tensor, call: Any, lse: Tensor, delta: Tensor, dout: Tensor, dq: Tensor, dk: Tensor,
    dv: Tensor, add: bool,
) -> None:  # fmt: skip
    """Gradients of a call with a :class:`.tile_pattern.TilePattern`, of which the keys may be a part of all.

    Args:
        q, k, v, call: as for :func:`add_forward`.
        lse: float32 ``[B, H, T]``, of the whole.
        delta: float32 ``[B, H, T]``, the sum of ``dout`` times the output of the whole, less the gradient of ``lse``.
        dout: ``[B, H, T, dv]``.
        dq: float32, is added to where ``add`` says so, otherwise overwritten, as ``dk`` and ``dv`` are.
    """
    q, k, v, dout = dense(q), dense(k), dense(v), dense(dout.to(q.dtype))
    lse, delta = lse.contiguous(), delta.contiguous()
    hopper = block_sparse_hopper.refusal(q, k, v, call, dout) is None
    run = partial(block_sparse_hopper.add_backward, q, k, v, call, lse, delta, dout, dq, dk, dv, add)
    if not hopper:
        how = {"DLSE": False, "GIVEN": True, "ADD": add}
        run = partial(_launch_backward, q, k, v, call, q, lse, lse, delta, dout, dq, dk, dv, how)
    _once((hopper, add, True), q, k, v, run)


def _launch_backward(
    q: Tensor, k: Tensor, v: Tensor, call: Any, out: Tensor, lse: Tensor, dlse: Tensor, delta: Tensor, dout: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, how: dict[str, bool],
) -> None:  # fmt: skip
    run, pattern = _Launch(q, k, v, call), call.pattern
    lists, turned = pattern.lists(call.rule), pattern.transposed(call.rule, run.heads // run.kv_heads)
    config, how = run.config("queries", q.element_size()), {"GIVEN": False, "ADD": False, **how}
    rows = pattern.busy if how["ADD"] else pattern.rows
    launch(
        _block_sparse.backward_queries, (rows * blocks(pattern.block_q, config["M"]), run.batch * run.heads),
        q, k, v, out, dout, lse, dlse, delta, dq, lists.indices, lists.spans, lists.order, *_bits(lists),
        *run.extra, *_strides(q), *_strides(k), *_strides(v), *_strides(out), *_strides(dout), *_strides(dq),
        *_rows(lists.indices), *run.extra_strides, run.heads, run.length, run.size, pattern.rows,
        lists.indices.shape[3], run.window, run.factor, run.scale, **how, **run.constants, **config,
    )  # fmt: skip
    config, tile = run.config("keys", q.element_size()), pattern.tile
    bits, order = turned.bits, turned.order
    tiles = turned.indices.shape[2]
    launch(
        _block_sparse_keys.backward_keys, (tiles * (tile // config["N"]), run.batch * run.kv_heads),
        q, k, v, dout, lse, delta, dk, dv, turned.indices, turned.spans, order,
        turned.indices if bits is None else bits, *_bits(turned), *run.extra, *_strides(q), *_strides(k),
        *_strides(v), *_strides(dout), *_strides(dk), *_strides(dv), *_rows(turned.indices),
        *_rows(order[..., None]), *run.extra_strides, run.kv_heads, run.length, run.size, tiles,
        turned.indices.shape[3], run.window, run.factor, run.scale, TILE=tile, BITS=bits is not None,
        **run.constants, **config,
    )  # fmt: skip
