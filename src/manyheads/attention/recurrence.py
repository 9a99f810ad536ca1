# SPDX-License-Identifier: Apache-2.0
"""Linear attention with decay, one function for all that reduces to it.

    S_t = exp(g_t) S_{t-1} + k_t v_t^T        n_t = exp(g_t) n_{t-1} + k_t        o_t = scale * q_t S_t / d_t

with log decay g <= 0 that is absent (linear attention), constant per head (RetNet, lightning attention) or given per
token and head (mLSTM, Mamba-2), and a denominator d that is 1, the sum of the weights (``norm="sum"``: q_t n_t), or
mLSTM's ``max(|scale q_t n_t|, floor_t)``. Four forms of it agree: the quadratic one is the definition, ``chunk`` is
linear in T and runs anywhere, ``step`` makes one token, and the Triton kernel of :mod:`manyheads.kernels.recurrence` is
``chunk`` for GPUs.

Stabilised mLSTM needs no kernel of its own: :func:`mlstm_gates` turns its input and forget gates into g, a factor on k
and the floor. The running maximum is left out of the gradient, which is exact: the output does not depend on it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .. import kernels
from ..errors import UserError
from .reference import repeat_kv

__all__ = [
    "LEAST", "DecayState", "SharedState", "chunk", "decay_attention", "divide", "mlstm_gates", "quadratic", "step",
]  # fmt: skip

Norm = Literal["sum", "mlstm"] | None
CHUNK = 64
EPS = 1e-6
LEAST = -128 * math.log(2)  # what a log decay is at least, so that a gate of 0 (-inf) can be summed: 2^-128 is nothing


@dataclass(frozen=True, slots=True)
class DecayState:
    """What linear attention remembers: its size does not depend on the length.

    Attributes:
        kv: ``[N, Hkv, K, V]`` float32 (float64 for float64 inputs), one for each sequence.
        k: ``[N, Hkv, K]``, the sum of the keys; None without a normaliser.
        m: ``[N, H]``, mLSTM's running maximum; None elsewhere.
    """

    kv: Tensor
    k: Tensor | None = None
    m: Tensor | None = None

    def reorder(self, rows: Tensor) -> "DecayState":
        """The states of ``rows [N']``, as beam search wants them."""
        return DecayState(*(None if x is None else x[rows] for x in (self.kv, self.k, self.m)))  # type: ignore[arg-type]

    def detach(self) -> "DecayState":
        return DecayState(*(None if x is None else x.detach() for x in (self.kv, self.k, self.m)))  # type: ignore[arg-type]

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.kv, self.k, self.m) if x is not None)


@dataclass(frozen=True, slots=True)
class SharedState(DecayState):
    """In place of what came before, where that stands in other processes; every mixer hands it on as its state.

    Attributes:
        attend: what :func:`decay_attention` does then, given its arguments but for ``state``.
    """

    attend: Callable[..., tuple[Tensor, DecayState]] = field(kw_only=True)


def decay_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, scale: float = 1.0, norm: Norm = None,
    floor: Tensor | None = None, state: DecayState | None = None, cu_seqlens: Tensor | None = None,
    impl: Literal["auto", "torch", "triton", "quadratic"] = "auto",
) -> tuple[Tensor, DecayState]:  # fmt: skip
    """Causal linear attention with decay.

    Args:
        q: ``[B, H, T, K]``.
        k: ``[B, Hkv, T, K]``, each head for H / Hkv query heads.
        v: ``[B, Hkv, T, V]``.
        g: log decay ``[Hkv]`` or ``[B, Hkv, T]``, at most 0; None for no decay. A gate counts as at least 2^-128: -inf
            at the first token of a document forgets what came before it.
        scale: factor on q; papers of this family mostly have none.
        norm: ``sum`` divides by ``q_t n_t``, ``mlstm`` by ``max(|scale q_t n_t|, floor_t)``.
        floor: ``[B, H, T]`` for ``mlstm``.
        state: what came before; a :class:`SharedState` says who has that.
        cu_seqlens: ``[N + 1]`` bounds of N sequences packed in one row (B = 1); states are then ``[N, ...]``.
        impl: ``auto`` takes the kernel on a GPU, torch elsewhere.

    Returns:
        Output ``[B, H, T, V]`` in the dtype of ``q``, and the state after the last token.

    Raises:
        UserError: shapes that do not belong together.
    """
    if isinstance(state, SharedState):
        if cu_seqlens is not None:
            raise UserError("processes share no packed sequences: forget between them by a gate of 0 (g = -inf)")
        return state.attend(q, k, v, g, scale=scale, norm=norm, floor=floor)
    _check(q, k, v, g, norm, floor, state, cu_seqlens)
    if impl == "auto":
        held = q.is_cuda and q.dtype != torch.float64 and max(q.shape[3], v.shape[3]) <= 256
        impl = "triton" if held and kernels.available() else "torch"
    if impl == "triton":
        from ..kernels import recurrence

        kv, n = (None, None) if state is None else (state.kv, state.k)
        out, kv, n = recurrence.decay_attention(q, k, v, g, scale, norm, floor, kv, n, cu_seqlens)
        return out, DecayState(kv, n)
    form = quadratic if impl == "quadratic" else step if q.shape[2] == 1 and cu_seqlens is None else chunk
    if cu_seqlens is None:
        return form(q, k, v, g, scale=scale, norm=norm, floor=floor, state=state)
    outs, states = [], []
    for row, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
        gate = g if g is None or g.ndim == 1 else g[:, :, a:b]
        mine = None if state is None else state.reorder(torch.tensor([row], device=q.device))
        floors = None if floor is None else floor[:, :, a:b]
        parts = q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]
        out, after = form(*parts, gate, scale=scale, norm=norm, floor=floors, state=mine)
        outs.append(out)
        states.append(after)
    sums = [x.k for x in states if x.k is not None]
    return torch.cat(outs, 2), DecayState(torch.cat([x.kv for x in states]), torch.cat(sums) if sums else None)


def quadratic(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, scale: float = 1.0, norm: Norm = None,
    floor: Tensor | None = None, state: DecayState | None = None,
) -> tuple[Tensor, DecayState]:  # fmt: skip
    """The definition, ``[T, T]`` weights and all; in float32, or in float64 for float64 inputs."""
    dtype = q.dtype
    q, k, v, total, state = _prepared(q, k, v, g, norm, state)
    rows = repeat_kv(total, q.shape[1])
    weights = scale * (q @ repeat_kv(k, q.shape[1]).transpose(-1, -2)) * _decay(rows, rows)
    carried = scale * q * rows.exp()[..., None]
    out = weights @ repeat_kv(v, q.shape[1]) + carried @ repeat_kv(state.kv, q.shape[1])
    if state.k is not None:
        out = divide(out, weights.sum(-1) + (carried * repeat_kv(state.k, q.shape[1])[:, :, None]).sum(-1), norm, floor)
    return out.to(dtype), _after(k, v, total, state)


def chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, scale: float = 1.0, norm: Norm = None,
    floor: Tensor | None = None, state: DecayState | None = None, size: int = CHUNK,
) -> tuple[Tensor, DecayState]:  # fmt: skip
    """The same in O(T): quadratic within chunks of ``size`` tokens, the state between them."""
    dtype, heads, length = q.dtype, q.shape[1], q.shape[2]
    if length <= size:
        return quadratic(q, k, v, g, scale=scale, norm=norm, floor=floor, state=state)
    q, k, v, _, state = _prepared(q, k, v, None, norm, state)
    gate = _gates(k, g)
    pad = -length % size
    q, k, v = (
        torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, size)) for x in (q, k, v)
    )  # [B, H, n, C, d]
    total = torch.nn.functional.pad(gate, (0, pad)).unflatten(2, (-1, size)).cumsum(-1)  # within a chunk
    last = total[..., -1:]
    new = (k * (last - total).exp()[..., None]).transpose(-1, -2) @ v  # [B, Hkv, n, K, V]
    sums = None if state.k is None else (k * (last - total).exp()[..., None]).sum(3)
    kv, n, before, sums_before = state.kv, state.k, [], []
    for i in range(new.shape[2]):  # the only sequential part
        before.append(kv)
        kv = kv * last[:, :, i, :, None].exp() + new[:, :, i]
        if n is not None and sums is not None:
            sums_before.append(n)
            n = n * last[:, :, i].exp() + sums[:, :, i]
    rows = repeat_kv(total, heads)
    weights = scale * (q @ repeat_kv(k, heads).transpose(-1, -2)) * _decay(rows, rows)
    carried = scale * q * rows.exp()[..., None]
    out = weights @ repeat_kv(v, heads) + carried @ repeat_kv(torch.stack(before, 2), heads)
    out = out.flatten(2, 3)[:, :, :length]
    if n is not None:
        below = weights.sum(-1) + (carried @ repeat_kv(torch.stack(sums_before, 2), heads)[..., None])[..., 0]
        out = divide(out, below.flatten(2, 3)[:, :, :length], norm, floor)
    return out.to(dtype), DecayState(kv, n)


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *, scale: float = 1.0, norm: Norm = None,
    floor: Tensor | None = None, state: DecayState | None = None,
) -> tuple[Tensor, DecayState]:  # fmt: skip
    """The recurrence itself, a token at a time: how a model decodes."""
    dtype, heads = q.dtype, q.shape[1]
    q, k, v, _, state = _prepared(q, k, v, None, norm, state)
    decay = _gates(k, g).exp()
    kv, n, outs, below = state.kv, state.k, [], []
    for t in range(q.shape[2]):
        kv = kv * decay[:, :, t, None, None] + k[:, :, t, :, None] * v[:, :, t, None]
        outs.append(scale * (q[:, :, t, None] @ repeat_kv(kv, heads))[:, :, 0])
        if n is not None:
            n = n * decay[:, :, t, None] + k[:, :, t]
            below.append(scale * (q[:, :, t] * repeat_kv(n, heads)).sum(-1))
    out = torch.stack(outs, 2)
    if n is not None:
        out = divide(out, torch.stack(below, 2), norm, floor)
    return out.to(dtype), DecayState(kv, n)


def mlstm_gates(i: Tensor, f: Tensor, state: DecayState | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Input and forget gates of mLSTM, before their exponential and sigmoid, as decay attention takes them.

    Args:
        i, f: ``[B, H, T]``.
        state: what came before, with its running maximum ``m``; None starts from nothing.

    Returns:
        ``(g, factor, floor, m)``: log decay, the factor on k and ``norm="mlstm"``'s floor, each ``[B, H, T]``, and the
        running maximum ``[B, H]`` after the last token, to be kept in the state.
    """
    high = i.to(torch.float64)
    forget = torch.nn.functional.logsigmoid(f.to(torch.float64))
    total = forget.cumsum(-1)
    first = high.new_zeros(i.shape[:2]) if state is None or state.m is None else state.m.to(high.dtype)
    with torch.no_grad():
        m = total + torch.maximum((high - total).cummax(-1).values, first[..., None])
        earlier = torch.cat([first[..., None], m[..., :-1]], -1)
    dtype = torch.promote_types(i.dtype, torch.float32)
    gate, factor, floor = forget + earlier - m, (high - m).exp(), (-m).exp()
    return gate.to(dtype), factor.to(dtype), floor.to(dtype), m[..., -1].to(dtype)


def _gates(k: Tensor, g: Tensor | None) -> Tensor:
    """``g`` as ``[B, Hkv, T]``."""
    batch, heads, length = k.shape[:3]
    if g is None:
        return k.new_zeros(batch, heads, length)
    g = g.to(k.dtype).clamp_min(LEAST)
    return g[None, :, None].expand(batch, heads, length) if g.ndim == 1 else g


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, norm: Norm, state: DecayState | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, DecayState]:
    """Inputs in the dtype of the sums, the running total of ``g``, and a state to start from."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if state is None:
        state = DecayState(k.new_zeros(*k.shape[:2], k.shape[3], v.shape[3]))
    if norm is None:
        state = replace(state, k=None)
    elif state.k is None:
        state = replace(state, k=k.new_zeros(*k.shape[:2], k.shape[3]))
    return q, k, v, _gates(k, g).cumsum(-1), state


def _decay(rows: Tensor, columns: Tensor) -> Tensor:
    """``exp(rows_t - columns_s)`` for s <= t, 0 elsewhere: ``[..., T, T]``."""
    later = torch.ones(rows.shape[-1], rows.shape[-1], dtype=torch.bool, device=rows.device).triu(1)
    return (rows[..., :, None] - columns[..., None, :]).masked_fill(later, -torch.inf).exp()


def _after(k: Tensor, v: Tensor, total: Tensor, state: DecayState) -> DecayState:
    """The state after all tokens."""
    last = total[..., -1:] if total.shape[-1] else total.new_zeros(*total.shape[:-1], 1)  # a sequence may be empty
    left = k * (last - total).exp()[..., None]
    kv = state.kv * last.exp()[..., None] + left.transpose(-1, -2) @ v
    return DecayState(kv, None if state.k is None else state.k * last.exp() + left.sum(2))


def divide(out: Tensor, below: Tensor, norm: Norm, floor: Tensor | None) -> Tensor:
    """Outputs ``[..., V]`` over their denominators ``[...]``, which ``floor`` bounds for ``mlstm``."""
    if norm == "mlstm":
        below = below.abs() if floor is None else torch.maximum(below.abs(), floor.to(below.dtype))
    return out / (below + EPS)[..., None]


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, norm: Norm, floor: Tensor | None, state: DecayState | None,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    batch, heads, length, width = q.shape
    if k.shape != (batch, k.shape[1], length, width) or v.shape[:3] != k.shape[:3] or heads % k.shape[1]:
        raise UserError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together")
    if g is not None and g.shape not in ((k.shape[1],), k.shape[:3]):
        raise UserError(f"g {tuple(g.shape)} is neither [Hkv] nor [B, Hkv, T] of k {tuple(k.shape)}")
    if (floor is not None) != (norm == "mlstm"):
        raise UserError("norm=mlstm goes with a floor [B, H, T], and nothing else does")
    if floor is not None and floor.shape != q.shape[:3]:
        raise UserError(f"floor {tuple(floor.shape)} is not [B, H, T] of q {tuple(q.shape)}")
    if cu_seqlens is not None and batch != 1:
        raise UserError("packed sequences stand in one row: cu_seqlens needs B = 1")
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if state is not None and state.kv.shape != (rows, k.shape[1], width, v.shape[3]):
        raise UserError(f"the state {tuple(state.kv.shape)} is not [{rows}, {k.shape[1]}, {width}, {v.shape[3]}]")
