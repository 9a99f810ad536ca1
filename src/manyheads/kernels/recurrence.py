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

from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UserError
from ._operator import compile_together, launch, plain
from ._passes import LONGEST, Pass, Plan, blocks, dense, like, padded, states, tile_width
from ._states import delta, gate, step

__all__ = ["decay_attention"]

# Told the states of a sequence's end when they are there; gives what is to be done before they are used.
Join = Callable[[Pass, Tensor, Tensor, bool], Callable[[], None]]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, kv: Tensor | None, n: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, norm: str, join: Join | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`_forward`. ``join``: see :mod:`.shared_recurrence`."""
    run = Pass(q, k, v, g, cu_seqlens, scale, norm)
    if join is not None:
        run.plan = run.plan._replace(whole=False)
    _compile(_Kind.of(run, q, k, v, kv, n, cu_seqlens, True, g is not None and g.requires_grad))
    out, below = like(q, v.shape[3]), q.new_empty(q.shape[:3] if norm else (0,), dtype=torch.float32)
    after, after_n = states(k, v, run.plan.sequences, norm)
    if not run.plan.whole:
        run.chunks("state", q, k, v)
    run.scan(kv, n, after, after_n, False)
    finish = None if join is None else join(run, after, after_n, False)
    run.chunks("out", q, k, v, out, aux=below if norm else None, floor=floor)
    run.last(after, after_n, False)
    if finish is not None:
        finish()
    return out, after, after_n, run.rows, below


def _differentiate(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, cu_seqlens: Tensor | None, out: Tensor,
    rows: Tensor, below: Tensor, dout: Tensor, dkv: Tensor | None, dn: Tensor | None, scale: float, norm: str,
    need_dg: bool, join: Join | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`_backward`. ``join``: see :mod:`.shared_recurrence`."""
    (batch, heads, length, _), columns = q.shape, v.shape[3]
    back = Pass(q, k, v, g, cu_seqlens, scale, norm)
    if join is not None:
        back.plan = back.plan._replace(whole=False)
    _compile(_Kind.of(back, q, k, v, dkv, dn, cu_seqlens, False, need_dg))
    forth = copy(back)
    forth.rows = rows
    dout = dense(dout)
    r = c = None
    dfloor = q.new_empty(below.shape if norm == "mlstm" else (0,), dtype=torch.float32)
    if norm:
        r, c = torch.empty_like(below), torch.empty_like(below)
        block = 32
        launch(
            delta, (max(1, blocks(length, block)), batch * heads),
            out, dout, below, below if floor is None else floor, r, c, dfloor, *out.stride()[:3], *dout.stride()[:3],
            length, HEADS=heads, V=columns, BV=padded(columns), BLOCK=block, MLSTM=norm == "mlstm",
            num_warps=4,
        )  # fmt: skip
    dq, dk, dv = like(q, q.shape[3]), like(k, k.shape[3]), like(v, columns)
    before, before_n = states(k, v, back.plan.sequences, norm)
    tiles = blocks(k.shape[3], tile_width(columns, k.shape[3], q.dtype))
    sums = [q.new_empty(tiles, *x.shape[:3], dtype=torch.float32) if need_dg else None for x in (q, k)]
    dg = q.new_empty(k.shape[:3] if need_dg else (0,), dtype=torch.float32)
    if not back.plan.whole:
        back.chunks("dstate", q, q, dout, r=r, c=c)
    back.scan(dkv, dn, before, before_n, True)
    finish = None if join is None else join(back, before, before_n, True)
    forth.chunks("dq", dout, v, k, dq, w=q if need_dg else None, aux=sums[0], r=r, c=c)
    if finish is not None:
        finish()
    back.chunks("dk", v, dout, q, dk, w=k if need_dg else None, aux=sums[1], r=r, c=c)
    back.chunks("dv", k, q, dout, dv, r=r, c=c)
    back.last(before, before_n, True)
    if need_dg:
        plan = back.plan
        launch(
            gate, (plan.segments * back.heads,),
            rows, back.rows, sums[0], sums[1], dg, back.owner, back.first, back.cu, length, plan.length, plan.per,
            plan.sequences, batch, HEADS=back.heads, G=back.group, TILES=tiles, C=64, SIZE=plan.size,
            BLOCK=1024, PACKED=back.packed, num_warps=4,
        )  # fmt: skip
    return dq, dk, dv, dg, dfloor, before, before_n


def _advance(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, kv: Tensor | None, n: Tensor | None,
    scale: float, norm: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See :func:`_step`."""
    (batch, heads, _, width), columns = q.shape, v.shape[3]
    out, (after, after_n) = q.new_empty(batch, heads, 1, columns), states(k, v, batch, norm)
    block = min(32, padded(columns))
    strides = (0, 0) if g is None else (0, g.stride(0)) if g.ndim == 1 else g.stride()[:2]
    launch(
        step, (batch * k.shape[1], blocks(columns, block)),
        q, k, v, after if g is None else g, after if floor is None else floor, after if kv is None else kv,
        after if n is None else n, out, after, after_n, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *strides, scale, HEADS=k.shape[1], G=heads // k.shape[1], K=width, V=columns, BK=padded(width), BV=block,
        GATE=g is not None, NORM=norm, GIVEN=kv is not None, GIVEN_N=n is not None and bool(norm), num_warps=4,
    )  # fmt: skip
    return out, after, after_n


class _Kind(NamedTuple):
    """What decides which kernels a call launches, but for the alignment of its inputs."""

    device: torch.device
    dtype: torch.dtype
    sizes: tuple[int, int, int, int]  # H, Hkv, K, V
    gate: str
    norm: str
    given: tuple[bool, bool]  # a state and its vector; in a backward pass by itself, their gradients
    bounds: torch.dtype | None  # of cu_seqlens
    whole: bool
    forward: bool
    backward: bool
    need_dg: bool

    @classmethod
    def of(
        cls, run: Pass, q: Tensor, k: Tensor, v: Tensor, kv: Tensor | None, n: Tensor | None,
        cu_seqlens: Tensor | None, forward: bool, need_dg: bool,
    ) -> "_Kind":  # fmt: skip
        """Of a forward pass, and of the backward pass if one will follow; or of a backward pass."""
        return cls(
            q.device, q.dtype, (q.shape[1], k.shape[1], q.shape[3], v.shape[3]), run.gate, run.norm,
            (kv is not None, n is not None), None if cu_seqlens is None else cu_seqlens.dtype, run.plan.whole, forward,
            not forward or need_dg or q.requires_grad, need_dg,
        )  # fmt: skip


@cache
def _compile(kind: _Kind) -> None:
    """Compile all kernels of such calls at once, in threads, instead of one by one as each is first launched.

    What fails here, or turns out to be of another kind, is compiled when it is launched.
    """
    if kind.device.type != "cuda":
        return
    heads, kv_heads, width, columns = kind.sizes
    length = 1 if kind.whole else 2 * LONGEST

    def make(heads: int, columns: int) -> Tensor:
        """``[1, heads, length, columns]`` in the memory of one row."""
        return torch.empty(columns, device=kind.device, dtype=kind.dtype).expand(1, heads, length, columns)

    q, k, v, out = make(heads, width), make(kv_heads, width), make(kv_heads, columns), make(heads, columns)
    rows = torch.empty(1, heads, length, device=kind.device)
    g = {"none": None, "head": rows[0, :kv_heads, 0], "token": rows[:, :kv_heads]}[kind.gate]
    kv, n = (rows if given else None for given in kind.given)
    bounds = None if kind.bounds is None else torch.zeros(2, device=kind.device, dtype=kind.bounds)

    def both() -> None:
        start, start_n = kv, n
        if kind.forward:
            _attend(q, k, v, g, rows, kv, n, bounds, 1.0, kind.norm)
            start = start_n = None
        if kind.backward:
            _differentiate(q, k, v, g, rows, bounds, out, rows, rows, out, start, start_n, 1.0, kind.norm, kind.need_dg)

    compile_together(both)


@torch.library.custom_op("manyheads::decay_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, kv: Tensor | None, n: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Output, state and its vector, and for the backward pass the states before segments and the denominators."""
    return _attend(q, k, v, g, floor, kv, n, cu_seqlens, scale, norm)


@torch.library.custom_op("manyheads::decay_attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, cu_seqlens: Tensor | None, out: Tensor,
    rows: Tensor, below: Tensor, dout: Tensor, dkv: Tensor | None, dn: Tensor | None, scale: float, norm: str,
    need_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g (of every token), floor, and the state before the first token and its vector."""
    return _differentiate(q, k, v, g, floor, cu_seqlens, out, rows, below, dout, dkv, dn, scale, norm, need_dg)


@torch.library.custom_op("manyheads::decay_attention_step", mutates_args=())
def _step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, kv: Tensor | None, n: Tensor | None,
    scale: float, norm: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One token: output, state and its vector."""
    return _advance(q, k, v, g, floor, kv, n, scale, norm)


@_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, kv: Tensor | None, n: Tensor | None,
    cu_seqlens: Tensor | None, scale: float, norm: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    plan = Plan.of(q, k, v, cu_seqlens, norm)
    below = q.new_empty(q.shape[:3] if norm else (0,), dtype=torch.float32)
    rows = q.new_empty(plan.numel * k.shape[1], dtype=torch.float32)
    return like(q, v.shape[3]), *states(k, v, plan.sequences, norm), rows, below


@_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, cu_seqlens: Tensor | None, out: Tensor,
    rows: Tensor, below: Tensor, dout: Tensor, dkv: Tensor | None, dn: Tensor | None, scale: float, norm: str,
    need_dg: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dg = q.new_empty(k.shape[:3] if need_dg else (0,), dtype=torch.float32)
    dfloor = q.new_empty(below.shape if norm == "mlstm" else (0,), dtype=torch.float32)
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    grads = like(q, q.shape[3]), like(k, k.shape[3]), like(v, v.shape[3])
    return *grads, dg, dfloor, *states(k, v, count, norm)


@_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Any, floor: Any, kv: Any, n: Any, scale: float, norm: str) -> Any:
    return q.new_empty(*q.shape[:3], v.shape[3]), *states(k, v, q.shape[0], norm)


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
    given = q, k, v, g, floor, cu_seqlens, out, rows, below, dout, dkv, dn, ctx.scale, ctx.norm, need_dg
    if plain(q):
        found = _differentiate(*given)
    else:
        found = _backward(*given)
    dq, dk, dv, dg, dfloor, dstate, dvector = found
    if need_dg and g.ndim == 1:
        dg = dg.sum((0, 2))
    return (
        dq, dk, dv, dg if need_dg else None, dfloor if floor is not None else None,
        dstate if ctx.given[0] else None, dvector if ctx.given[1] and ctx.norm else None, None, None, None,
    )  # fmt: skip


_forward.register_autograd(_gradients, setup_context=_save)


class _Attention(torch.autograd.Function):
    """The operator without its dispatch, which takes the host half as long as the kernels take, and at first imports
    the compiler.
    """

    @staticmethod
    def forward(*given: Any) -> Any:
        return _attend(*given)

    setup_context = staticmethod(_save)
    backward: Any = staticmethod(once_differentiable(_gradients))


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
    q, k, v, g, floor, kv, n = prepared(q, k, v, g, norm, floor, kv, n)
    inputs = [x for x in (q, k, v, g, floor, kv, n) if x is not None]
    if q.shape[2] == 1 and cu_seqlens is None and not (
        torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    ):  # fmt: skip
        one = _advance if plain(q) else _step
        out, after, after_n = one(q, k, v, g, floor, kv, n, scale, norm or "")
    else:
        many: Any = _Attention.apply if plain(q) else _forward
        out, after, after_n, *_ = many(q, k, v, g, floor, kv, n, cu_seqlens, scale, norm or "")
    return out, after, after_n if norm else None


def prepared(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, norm: str | None, floor: Tensor | None, kv: Tensor | None,
    n: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Inputs as the kernels read them.

    Raises:
        UserError: a dtype or a width that they do not have.
    """
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32) or max(q.shape[3], v.shape[3]) > 256:
        raise UserError(
            f"the kernel takes 16 and 32 bit and up to 256 channels, not {q.dtype}, {q.shape[3]} and {v.shape[3]}: "
            "choose impl=torch"
        )
    q, k, v = dense(q), dense(k.to(q.dtype)), dense(v.to(q.dtype))
    g = None if g is None else g.to(torch.float32)
    floor = None if floor is None else floor.to(torch.float32).contiguous()
    kv = None if kv is None else kv.to(torch.float32).contiguous()
    n = None if n is None or norm is None else n.to(torch.float32).contiguous()
    return q, k, v, g, floor, kv, n
