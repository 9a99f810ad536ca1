# SPDX-License-Identifier: Apache-2.0
"""Linear attention with decay on GPUs that share a sequence: the passes of :mod:`.recurrence`, an exchange between.

Each pass first makes what the tokens of this process add to a state, and that is what travels. In the forward pass
outputs are made from it once it has come, or meanwhile from a state of zeros (``overlap``), and then corrected by
``(q_t * A_t) S``. In the backward pass the queries' gradient, which needs the forward states only, is made meanwhile.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._passes import Pass
from .recurrence import Join, _attend, _differentiate, prepared

__all__ = ["shared_decay_attention"]

_LEAST = -128 * math.log(2)  # what the kernels take a log decay for at least

# (what is left of a state [N, Hkv, 1], what is added [N, Hkv, 1, size], in reverse) -> what waits for the one before
Begin = Callable[[Tensor, Tensor, bool], Callable[[], Tensor]]


def _join(begin: Begin, wait_first: bool) -> Join:
    """Exchange states as soon as they are there; ``wait_first``: before anything else is done."""

    def join(run: Pass, kv: Tensor, n: Tensor, reverse: bool) -> Callable[[], None]:
        own = [x.flatten(2) for x in (kv, n) if x.numel()]
        factor = run.factor()[..., None]
        wait = begin(factor, torch.cat(own, 2)[:, :, None], reverse)

        def finish() -> None:
            given = wait()[:, :, 0]
            run.enter(given, reverse)
            for x, more in zip(own, given.split([x.shape[2] for x in own], 2), strict=True):
                x.addcmul_(factor, more)

        if not wait_first or reverse:
            return finish
        finish()
        return lambda: None

    return join


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, floor: Tensor | None, kv: Tensor | None,
        n: Tensor | None, scale: float, norm: str, begin: Begin, overlap: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        came: list[Tensor] = []

        def told(m: Tensor, s: Tensor, reverse: bool) -> Callable[[], Tensor]:
            wait = begin(m, s, reverse)

            def found() -> Tensor:
                came.append(wait())
                return came[0]

            return found

        out, after, after_n, rows, below = _attend(
            q, k, v, g, floor, kv, n, None, scale, norm, join=_join(told, not overlap)
        )
        if overlap:
            state = came[0].view(*k.shape[:2], k.shape[3], v.shape[3])
            _correct(out, q, g, scale, state)
        ctx.scale, ctx.norm, ctx.begin, ctx.given = scale, norm, begin, (kv is not None, n is not None)
        ctx.save_for_backward(q, k, v, g, floor, out, rows, below)
        ctx.set_materialize_grads(False)
        return out, after, after_n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Any, dkv: Any, dn: Any) -> tuple[Any, ...]:
        q, k, v, g, floor, out, rows, below = ctx.saved_tensors
        need_dg = g is not None and ctx.needs_input_grad[3]
        dout = torch.zeros_like(out) if dout is None else dout
        dkv = None if dkv is None else dkv.contiguous()
        dn = None if dn is None or not ctx.norm else dn.contiguous()
        dq, dk, dv, dg, dfloor, dstate, dvector = _differentiate(
            q, k, v, g, floor, None, out, rows, below, dout, dkv, dn, ctx.scale, ctx.norm, need_dg,
            join=_join(ctx.begin, False),
        )  # fmt: skip
        if need_dg and g.ndim == 1:
            dg = dg.sum((0, 2))
        return (
            dq, dk, dv, dg if need_dg else None, dfloor if floor is not None else None,
            dstate if ctx.given[0] else None, dvector if ctx.given[1] and ctx.norm else None, None, None, None, None,
        )  # fmt: skip


def _correct(out: Tensor, q: Tensor, g: Tensor | None, scale: float, state: Tensor) -> None:
    """Add to ``out [B, H, T, V]`` what rows take from ``state [B, Hkv, K, V]`` before the first."""
    x, group = scale * q, q.shape[1] // state.shape[1]
    if g is not None:
        steps = torch.arange(1, q.shape[2] + 1, device=q.device)
        total = g.clamp_min(_LEAST)[:, None] * steps if g.ndim == 1 else g.clamp_min(_LEAST).cumsum(-1)
        left = total.exp().expand(q.shape[0], state.shape[1], -1).repeat_interleave(group, 1)
        x = q * (scale * left[..., None]).to(q.dtype)
    state = state.to(q.dtype).repeat_interleave(group, 1)
    if out.is_contiguous():
        out.flatten(0, 1).baddbmm_(x.flatten(0, 1), state.flatten(0, 1))
    else:
        out += x @ state


def shared_decay_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, scale: float, norm: str | None, floor: Tensor | None,
    kv: Tensor | None, n: Tensor | None, begin: Begin, overlap: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """As :func:`manyheads.kernels.recurrence.decay_attention`, of tokens that stand behind those of other processes.

    Args:
        q, k, v, g, scale, norm, floor: as there.
        kv, n: what came before the first process, None in all others.
        begin: the exchange of states, :meth:`manyheads.parallel._scan.StateScan.begin`.
        overlap: outputs first, corrected when the state has come; without a norm.

    Returns:
        As there, of the tokens of this process.
    """
    given = prepared(q, k, v, g, norm, floor, kv, n)
    out, after, after_n = _Shared.apply(*given, scale, norm or "", begin, overlap)  # type: ignore[no-untyped-call]
    return out, after, after_n if norm else None
