# SPDX-License-Identifier: Apache-2.0
"""Linear attention with decay on a GPU; :mod:`manyheads.attention.recurrence` says what it computes.

A sequence is cut into segments of many chunks. Three kernels make a pass over it:

1. ``chunks`` without output: what each segment adds to the state, all segments at once;
2. ``scan``: the state before each segment, the only sequential part, over few states;
3. ``chunks`` with output: each segment from its state on, all at once, the state of its chunks in registers.

So a token's q, k and v are read and its output is written, k and v are read once more, and states reach memory once per
segment instead of once per chunk: for 128 channels and chunks of 64 they would weigh as much as four more tensors.
Lightning Attention (arXiv 2405.17381) and simple GLA (arXiv 2312.06635) write them, or walk a sequence in one program.

The backward pass is the same kernel with other names. With rows x, keys y and values z, ``out(x, y, z)`` is

    forward: out(q, k, v)    dq: out(do, v, k)    dk: out(v, do, q) and dv: out(k, q, do), both with time reversed,

the state being S, its transpose, dS transposed and dS. A normaliser is one more value, 1, of every token: its state is
a vector n in the same registers, and its gradient c_t adds to the weights ``do_t . v_s``. The gradient of a gate is the
sum over later tokens of ``q dq - k dk`` to the end of the segment, and ``<S, dS>`` there, both in float32.

Legend: B rows, H query heads, Hkv key/value heads, T tokens, K and V channels, N sequences. Products are made in the
dtype of q with float32 sums; states are float32 (rounded to q's dtype as a factor), logs of gates are below 0
throughout, so nothing overflows; a gate counts as at least 2^-128.
"""

from copy import copy
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..errors import UserError
from ._recurrence import chunks
from ._states import delta, gate, scan, step

__all__ = ["decay_attention"]

_PROGRAMS = 2  # of a multiprocessor at once
_LONGEST = 4096  # tokens of a segment


class _Config(NamedTuple):
    """How ``chunks`` is run: tokens of a chunk, columns of z of a program, warps, depth of the loop's pipeline."""

    chunk: int
    columns: int
    warps: int
    stages: int


def _config(x: int, dtype: torch.dtype, out: bool) -> _Config:
    """By the width of x, padded; fixed, so that no first call spends its time on tuning."""
    if dtype == torch.float32:
        return _Config(32, 32, 8, 1) if x <= 64 else _Config(16, 16, 8, 1)
    if x <= 128:
        return _Config(64, 64, 4, 3)
    if not out:
        return _Config(64, 64, 4, 2)
    return _Config(64, 64, 8, 2 if dtype == torch.bfloat16 else 1)  # float16 holds its state in shared memory too


def _padded(width: int, itemsize: int = 4) -> int:
    """Triton 3.6 and 3.7 read past operands of a product on Hopper that are narrower than 128 bytes (its issue 11366)."""
    return max(16 if itemsize == 4 else 64, int(triton.next_power_of_2(width)))


def _processors(x: Tensor) -> int:
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count) if x.is_cuda else 8


class _Plan(NamedTuple):
    """Segments of a call.

    The state after segment s of sequence n stands in row ``s + n + 1``, that before its first in row ``s + n``.

    Attributes:
        length: tokens of a segment.
        per: segments of a sequence, where none are packed.
        segments: of all sequences; where they are packed, a bound.
        sequences: N.
        size: numbers of a state.
    """

    length: int
    per: int
    segments: int
    sequences: int
    size: int

    @property
    def numel(self) -> int:
        return (self.segments + self.sequences) * self.size

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, norm: str) -> "_Plan":
        """As few segments as fill the device, or fill it some times over. Symbolic sizes stay symbolic."""
        (batch, heads, tokens, width), columns = q.shape, v.shape[3]
        config = _config(_padded(width, q.element_size()), q.dtype, True)
        programs = batch * heads * -(-columns // config.columns)
        unit = config.chunk
        fill = torch.sym_max(1, _PROGRAMS * _processors(q) // programs)
        per = fill * torch.sym_max(1, -(-tokens // (fill * _LONGEST)))
        length = torch.sym_max(unit, -(-tokens // (per * unit)) * unit)
        size = width * columns + (width if norm else 0)
        if cu_seqlens is not None:
            count = cu_seqlens.shape[0] - 1
            return cls(length, 1, tokens // length + count, count, size)
        per = torch.sym_max(1, -(-tokens // length))
        return cls(length, per, batch * per, batch, size)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of rows, heads and tokens. A single row has none, so that a length past 2^31 numbers compiles nothing anew."""
    batch, head, row, _ = x.stride()
    return batch if x.shape[0] > 1 else 0, head, row


def _like(x: Tensor, width: int) -> Tensor:
    """Room for ``[B, H, T, width]`` with heads and tokens in the order in which ``x`` has them."""
    batch, heads, length, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, length, heads, width).transpose(1, 2)
    return x.new_empty(batch, heads, length, width)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


class _Pass:
    """One direction of a call: its segments, its states, and the launches of the kernels over them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, scale: float, norm: str
    ) -> None:
        self.plan = plan = _Plan.of(q, k, v, cu_seqlens, norm)
        self.heads, self.group = k.shape[1], q.shape[1] // k.shape[1]
        self.length, self.scale, self.norm, self.g = q.shape[2], scale, norm, g
        self.rows = q.new_empty(plan.numel * self.heads, dtype=torch.float32)
        self.decay = q.new_empty(plan.segments, self.heads, dtype=torch.float32)
        self.gate, self.gate_strides = "none", (0, 0, 0)
        if g is not None:
            self.gate = "head" if g.ndim == 1 else "token"
            self.gate_strides = (0, g.stride(0), 0) if g.ndim == 1 else (g.stride(0), g.stride(1), g.stride(2))
        self.owner = self.first = self.cu = self.rows
        if cu_seqlens is not None:  # which sequence a segment belongs to, found on the device
            parts = (cu_seqlens.diff() + (plan.length - 1)) // plan.length
            ends = torch.nn.functional.pad(parts.cumsum(0), (1, 0)).to(torch.int32)
            number = torch.arange(plan.segments, device=q.device, dtype=torch.int32)
            self.owner = torch.searchsorted(ends[1:].contiguous(), number, right=True, out_int32=True)
            self.first, self.cu = ends, cu_seqlens.contiguous()
        self.packed = cu_seqlens is not None

    def chunks(
        self, role: str, x: Tensor, y: Tensor, z: Tensor, out: Tensor | None = None, *, w: Tensor | None = None,
        aux: Tensor | None = None, r: Tensor | None = None, c: Tensor | None = None, floor: Tensor | None = None,
    ) -> None:  # fmt: skip
        """``role``: state, out, dq, dstate, dk or dv; ``w`` asks for the sums of its rows times those of ``out``."""
        width, columns, plan = y.shape[3], z.shape[3], self.plan
        padded = _padded(width, x.element_size())
        config = _config(padded, x.dtype, out is not None)
        block = min(config.columns, _padded(columns, x.element_size()))
        programs = self.heads * self.group if role in ("out", "dq") else self.heads
        turned = role in ("dq", "dk")
        with torch.cuda.device_of(x):
            chunks[(plan.segments * programs * triton.cdiv(columns, block),)](
                x, y, z, x if w is None else w, self.rows if self.g is None else self.g,
                self.rows if r is None else r, self.rows if c is None else c, self.rows if floor is None else floor,
                self.rows, x if out is None else out, self.rows if aux is None else aux, self.decay,
                self.owner, self.first, self.cu, *_strides(x), *_strides(y), *_strides(z),
                *_strides(x if w is None else w), *self.gate_strides, *_strides(x if out is None else out),
                self.length, plan.length, plan.per, plan.sequences, 1 if turned else columns, width if turned else 1,
                self.scale, HEADS=self.heads, G=self.group, X=width, Z=columns, C=config.chunk, BX=padded,
                BZ=block, GATE=self.gate, OUT=out is not None, REVERSE=role in ("dstate", "dk", "dv"),
                ROLE=role if self.norm else "", MLSTM=self.norm == "mlstm" and role == "out", DG=w is not None,
                PACKED=self.packed, SIZE=plan.size, num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip

    def scan(self, start: Tensor | None, start_n: Tensor | None, end: Tensor, end_n: Tensor, reverse: bool) -> None:
        size, cells, block = self.plan.size, end[0, 0].numel(), 512
        with torch.cuda.device_of(end):
            scan[(self.plan.sequences * self.heads, triton.cdiv(size, block))](
                self.rows, self.decay, self.rows if start is None else start,
                self.rows if start_n is None else start_n, end, end_n, self.first, self.plan.per,
                HEADS=self.heads, KV=cells, SIZE=size, BLOCK=block, GATED=self.g is not None,
                GIVEN=start is not None, GIVEN_N=start_n is not None and bool(self.norm), REVERSE=reverse,
                PACKED=self.packed, num_warps=4,
            )  # fmt: skip


def _states(k: Tensor, v: Tensor, count: int, norm: str) -> tuple[Tensor, Tensor]:
    kv = k.new_empty(count, k.shape[1], k.shape[3], v.shape[3], dtype=torch.float32)
    return kv, k.new_empty((count, k.shape[1], k.shape[3]) if norm else (0,), dtype=torch.float32)


@torch.library.custom_op("manyheads::decay_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, kv: Tensor | None, n: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, state and its vector, and for the backward pass the states before segments and the denominators."""
    run = _Pass(q, k, v, g, cu_seqlens, scale, norm)
    out, below = _like(q, v.shape[3]), q.new_empty(q.shape[:3] if norm else (0,), dtype=torch.float32)
    after, after_n = _states(k, v, run.plan.sequences, norm)
    run.chunks("state", q, k, v)
    run.scan(kv, n, after, after_n, False)
    run.chunks("out", q, k, v, out, aux=below if norm else None, floor=floor)
    return out, after, after_n, run.rows, below


@torch.library.custom_op("manyheads::decay_attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, cu_seqlens: Tensor | None, out: Tensor,
    rows: Tensor, below: Tensor, dout: Tensor, dkv: Tensor | None, dn: Tensor | None, scale: float, norm: str,
    need_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g (of every token), floor, and the state before the first token and its vector."""
    (batch, heads, length, _), columns = q.shape, v.shape[3]
    back = _Pass(q, k, v, g, cu_seqlens, scale, norm)
    forth = copy(back)
    forth.rows = rows
    dout = _dense(dout)
    r = c = None
    dfloor = q.new_empty(below.shape if norm == "mlstm" else (0,), dtype=torch.float32)
    if norm:
        r, c = torch.empty_like(below), torch.empty_like(below)
        block = 32
        with torch.cuda.device_of(q):
            delta[(max(1, triton.cdiv(length, block)), batch * heads)](
                out, dout, below, below if floor is None else floor, r, c, dfloor, *_strides(out), *_strides(dout),
                length, HEADS=heads, V=columns, BV=_padded(columns), BLOCK=block, MLSTM=norm == "mlstm", num_warps=4,
            )  # fmt: skip
    dq, dk, dv = _like(q, q.shape[3]), _like(k, k.shape[3]), _like(v, columns)
    before, before_n = _states(k, v, back.plan.sequences, norm)
    size = q.element_size()
    block = min(_config(_padded(columns, size), q.dtype, True).columns, _padded(k.shape[3], size))
    tiles = triton.cdiv(k.shape[3], block)
    sums = [q.new_empty(tiles, *x.shape[:3], dtype=torch.float32) if need_dg else None for x in (q, k)]
    dg = q.new_empty(k.shape[:3] if need_dg else (0,), dtype=torch.float32)
    back.chunks("dstate", q, q, dout, r=r, c=c)
    back.scan(dkv, dn, before, before_n, True)
    forth.chunks("dq", dout, v, k, dq, w=q if need_dg else None, aux=sums[0], r=r, c=c)
    back.chunks("dk", v, dout, q, dk, w=k if need_dg else None, aux=sums[1], r=r, c=c)
    back.chunks("dv", k, q, dout, dv, r=r, c=c)
    if need_dg:
        plan = back.plan
        with torch.cuda.device_of(q):
            gate[(plan.segments * back.heads,)](
                rows, back.rows, sums[0], sums[1], dg, back.owner, back.first, back.cu, length, plan.length, plan.per,
                plan.sequences, batch, HEADS=back.heads, G=back.group, TILES=tiles, C=64, SIZE=plan.size,
                BLOCK=1024, PACKED=back.packed, num_warps=4,
            )  # fmt: skip
    return dq, dk, dv, dg, dfloor, before, before_n


@torch.library.custom_op("manyheads::decay_attention_step", mutates_args=())
def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, kv: Tensor | None, n: Tensor | None,
    scale: float, norm: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One token: output, state and its vector."""
    (batch, heads, _, width), columns = q.shape, v.shape[3]
    out, (after, after_n) = q.new_empty(batch, heads, 1, columns), _states(k, v, batch, norm)
    block = min(32, _padded(columns))
    strides = (0, 0) if g is None else (0, g.stride(0)) if g.ndim == 1 else g.stride()[:2]
    with torch.cuda.device_of(q):
        step[(batch * k.shape[1], triton.cdiv(columns, block))](
            q, k, v, after if g is None else g, after if floor is None else floor, after if kv is None else kv,
            after if n is None else n, out, after, after_n, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
            *strides, scale, HEADS=k.shape[1], G=heads // k.shape[1], K=width, V=columns, BK=_padded(width), BV=block,
            GATE=g is not None, NORM=norm, GIVEN=kv is not None, GIVEN_N=n is not None and bool(norm), num_warps=4,
        )  # fmt: skip
    return out, after, after_n


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, kv: Tensor | None, n: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan = _Plan.of(q, k, v, cu_seqlens, norm)
    below = q.new_empty(q.shape[:3] if norm else (0,), dtype=torch.float32)
    rows = q.new_empty(plan.numel * k.shape[1], dtype=torch.float32)
    return _like(q, v.shape[3]), *_states(k, v, plan.sequences, norm), rows, below


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, cu_seqlens: Tensor | None, out: Tensor,
    rows: Tensor, below: Tensor, dout: Tensor, dkv: Tensor | None, dn: Tensor | None, scale: float, norm: str,
    need_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg = q.new_empty(k.shape[:3] if need_dg else (0,), dtype=torch.float32)
    dfloor = q.new_empty(below.shape if norm == "mlstm" else (0,), dtype=torch.float32)
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grads = _like(q, q.shape[3]), _like(k, k.shape[3]), _like(v, v.shape[3])
    return *grads, dg, dfloor, *_states(k, v, count, norm)


@_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Any, floor: Any, kv: Any, n: Any, scale: float, norm: str) -> Any:
    return q.new_empty(*q.shape[:3], v.shape[3]), *_states(k, v, q.shape[0], norm)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, floor, kv, n, cu_seqlens, ctx.scale, ctx.norm = inputs
    ctx.given = kv is not None, n is not None
    ctx.save_for_backward(q, k, v, g, floor, cu_seqlens, output[0], *output[3:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dout: Any, dkv: Any, dn: Any, *_: Any) -> tuple[Any, ...]:
    q, k, v, g, floor, cu_seqlens, out, rows, below = ctx.saved_tensors
    need_dg = g is not None and ctx.needs_input_grad[3]
    dout = torch.zeros_like(out) if dout is None else dout
    dkv = None if dkv is None else dkv.contiguous()
    dn = None if dn is None or not ctx.norm else dn.contiguous()
    dq, dk, dv, dg, dfloor, dstate, dvector = _backward(
        q, k, v, g, floor, cu_seqlens, out, rows, below, dout, dkv, dn, ctx.scale, ctx.norm, need_dg
    )
    if need_dg and g.ndim == 1:
        dg = dg.sum((0, 2))
    return (
        dq, dk, dv, dg if need_dg else None, dfloor if floor is not None else None,
        dstate if ctx.given[0] else None, dvector if ctx.given[1] and ctx.norm else None, None, None, None,
    )  # fmt: skip


_forward.register_autograd(_gradients, setup_context=_save)


def decay_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, norm: str | None, floor: Tensor | None,
    kv: Tensor | None, n: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """:func:`manyheads.attention.recurrence.decay_attention` on a GPU, with its gradients; no wait for the device.

    Args:
        q: ``[B, H, T, K]``, bfloat16, float16 or float32; any strides, without a copy where channels are adjacent.
        k: ``[B, Hkv, T, K]``, v: ``[B, Hkv, T, V]``; taken in the dtype of q. K and V are at most 256.
        g: log decay ``[Hkv]`` or ``[B, Hkv, T]``, at most 0; None for no decay.
        scale: factor on q.
        norm: None, ``sum`` or ``mlstm``, the latter with ``floor [B, H, T]``.
        kv, n: ``[N, Hkv, K, V]`` and ``[N, Hkv, K]``, what came before; the vector is taken only with a norm.
        cu_seqlens: ``[N + 1]`` integers, bounds of sequences packed in one row.

    Returns:
        Output ``[B, H, T, V]``, and after the last token the state and, with a norm, the vector, both float32.

    Raises:
        UserError: a dtype or a width that the kernels do not have.
    """
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or max(q.shape[3], v.shape[3]) > 256:
        raise UserError(
            f"the kernel takes 16 and 32 bit and up to 256 channels, not {q.dtype}, {q.shape[3]} and {v.shape[3]}: "
            "choose impl=torch"
        )
    q, k, v = _dense(q), _dense(k.to(q.dtype)), _dense(v.to(q.dtype))
    g = None if g is None else g.to(torch.float32)
    floor = None if floor is None else floor.to(torch.float32).contiguous()
    kv = None if kv is None else kv.to(torch.float32).contiguous()
    n = None if n is None or norm is None else n.to(torch.float32).contiguous()
    inputs = [x for x in (q, k, v, g, floor, kv, n) if x is not None]
    if q.shape[2] == 1 and cu_seqlens is None and not (
        torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    ):  # fmt: skip
        out, after, after_n = _step(q, k, v, g, floor, kv, n, scale, norm or "")
    else:
        out, after, after_n, *_ = _forward(q, k, v, g, floor, kv, n, cu_seqlens, scale, norm or "")
    return out, after, after_n if norm else None
