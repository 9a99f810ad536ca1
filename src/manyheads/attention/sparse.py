# SPDX-License-Identifier: Apache-2.0
"""Softmax attention over the keys that a block pattern names, forward and backward, with the log-sum-exp of each query.

Parts of an attention over different keys (local and global, sparse and pooled) are put together exactly by
:func:`merge`. One operator has several ways: the kernels of :mod:`manyheads.kernels.block_sparse`, for Hopper in Gluon
and else in Triton; their twin :mod:`.sparse_twin` in torch, which gathers the keys of a few blocks of queries at a
time; FlexAttention; flash attention where the pattern leaves nothing out; and dense attention with a mask.
:func:`choose` says which one is taken and why.
"""

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import kernels
from ..errors import UserError
from . import sparse_twin
from .block_pattern import BlockPattern, Rule
from .causal import causal_tail
from .flex_mask import block_mask
from .reference import repeat_kv, widened
from .sparse_twin import Call

__all__ = ["Call", "Choice", "block_sparse_attention", "choose", "merge"]

Impl = Literal["auto", "triton", "torch", "flex", "flash", "masked"]
_log = logging.getLogger(__name__)
_MASKED_UP_TO = 2**31  # pairs that a mask may have


class Choice(NamedTuple):
    """The way a call takes, and why."""

    impl: Impl
    reason: str


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, *, scale: float, causal: bool = True,
    window: int | None = None, valid: Tensor | None = None, cu_seqlens: Tensor | None = None,
    key_bias: Tensor | None = None, lse: Literal[False] = False, impl: Impl = "auto",
) -> Tensor: ...  # fmt: skip


@overload
def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, *, scale: float, causal: bool = True,
    window: int | None = None, valid: Tensor | None = None, cu_seqlens: Tensor | None = None,
    key_bias: Tensor | None = None, lse: Literal[True], impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, *, scale: float, causal: bool = True,
    window: int | None = None, valid: Tensor | None = None, cu_seqlens: Tensor | None = None,
    key_bias: Tensor | None = None, lse: bool = False, impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Softmax attention over the keys that ``pattern`` reads and that causality, window and documents let be seen.

    Args:
        q: ``[B, H, T, d]``; query t stands at column ``S - T + t``.
        k: ``[B, Hkv, S, d]``, v: ``[B, Hkv, S, dv]``; each head for H / Hkv query heads.
        pattern: lists of key blocks, of one, or of all rows and query heads.
        scale: positive factor on ``q k^T``.
        causal: no key later than its query.
        window: keys less than so many positions away.
        valid: ``[B, S]``, True where a key is a token and no padding.
        cu_seqlens: ``[N + 1]`` bounds of N sequences packed in one row (B = 1, T = S), which see only themselves.
        key_bias: ``[B or 1, H or 1, S]``, added to the logits of a key (the log of how many tokens a mean stands for);
            no gradient.
        lse: whether the log-sum-exp is wanted, as :func:`merge` needs it.
        impl: ``auto`` takes what :func:`choose` says.

    Returns:
        Output ``[B, H, T, dv]`` in the dtype of q; with ``lse`` also the log-sum-exp ``[B, H, T]`` in float32 (float64
        for float64). Both have gradients to q, k and v. A query that sees no key has 0 and -inf.

    Raises:
        UserError: shapes that do not belong together, or a way that cannot take them.
    """
    call = Call(pattern, Rule(causal, window), scale, key_bias, _documents(q, k, valid, cu_seqlens))
    _check(q, k, v, call)
    chosen = choose(q, k, v, call, lse=lse) if impl == "auto" else Choice(impl, "asked for")
    if impl == "auto" and q.is_cuda:
        _tell(chosen)
    if chosen.impl == "flex":
        out, sums = _flex(q, k, v, call)
    elif chosen.impl in ("flash", "masked"):
        made = _flash(q, k, v, call, lse) if chosen.impl == "flash" else _masked(q, k, v, call, lse)
        if isinstance(made, Tensor):
            return made
        out, sums = made
    else:
        if chosen.impl == "triton" and (refusal := _kernel().refusal(q, k, v, call)) is not None:
            raise UserError(f"{refusal}: choose impl=torch")
        apply: Any = _Sparse.apply
        out, sums = apply(q, k, v, call, chosen.impl)
    return (out, sums) if lse else out


def choose(q: Tensor, k: Tensor, v: Tensor, call: Call, *, lse: bool = False) -> Choice:
    """The fastest way that computes the call exactly.

    Whether a pattern holds every pair is asked of the device, once for a pattern, and only if one of its lists may
    name all blocks; not while a CUDA graph is captured. Where one pair is missing, dense attention is another
    function: the kernels run however little is left out, also where dense attention takes less time.
    """
    pattern = call.pattern
    if not q.is_cuda or not kernels.available():
        return Choice("torch", "there is no GPU with Triton")
    capturing = torch.cuda.is_current_stream_capturing()
    maybe = pattern.indices.shape[3] >= pattern.columns and not capturing
    if maybe and _fits_flash(q, k, v, call, lse) and pattern.density(call.rule) == 1:
        return Choice("flash", "the pattern leaves nothing out, so dense attention is the same")
    if (refusal := _kernel().refusal(q, k, v, call)) is None:
        return Choice("triton", f"blocks that are not read cost nothing; {_kernel().written_for(q, k, v, call)}")
    if not lse and q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] <= _MASKED_UP_TO:
        return Choice("masked", f"{refusal}, so dense attention takes the pattern as a mask")
    return Choice("torch", refusal)


@cache
def _tell(choice: Choice) -> None:
    """Say once a process which way is taken, and why."""
    _log.info("block-sparse attention runs as %s: %s", *choice)


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax attention out of several over different keys, exactly; differentiable in outputs and lses.

    Args:
        outputs: ``[B, H, T, dv]`` each.
        lses: ``[B, H, T]`` each, the log-sum-exp; -inf where a part sees no key. A constant added to one counts its
            keys so much more often.

    Returns:
        Output in the dtype of the first, and log-sum-exp; 0 and -inf where no part sees a key.
    """
    parts = torch.stack([widened(x) for x in lses])
    top = parts.amax(0).detach()
    top = torch.where(top == -torch.inf, 0.0, top)
    weights = (parts - top).exp()
    total = weights.sum(0)
    some = total > 0
    safe = torch.where(some, total, 1.0)
    out = sum(w[..., None] * widened(x) for w, x in zip(weights / safe, outputs, strict=True))
    assert isinstance(out, Tensor)
    return out.to(outputs[0].dtype), torch.where(some, top + safe.log(), -torch.inf)


def _documents(q: Tensor, k: Tensor, valid: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Numbers of the documents of queries and keys; padding is in none."""
    if valid is None and cu_seqlens is None:
        return None
    length, size = q.shape[2], k.shape[2]
    if cu_seqlens is None:
        theirs = mine = torch.zeros(1, size, dtype=torch.int32, device=q.device)
        mine = mine[:, :1].expand(1, length)
    else:
        if q.shape[0] != 1 or length != size:
            raise UserError("packed sequences stand in one row, queries and keys alike: cu_seqlens needs B = 1, T = S")
        columns = torch.arange(size, device=q.device, dtype=cu_seqlens.dtype)
        theirs = mine = torch.searchsorted(cu_seqlens, columns, right=True, out_int32=True)[None]
    if valid is not None:
        if valid.shape != (k.shape[0], size):
            raise UserError(f"valid {tuple(valid.shape)} is not [B, S] of k {tuple(k.shape)}")
        theirs = torch.where(valid, theirs, -1)
    return mine.contiguous(), theirs.contiguous()


def _check(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
    batch, heads, length, width = q.shape
    pattern = call.pattern
    if k.shape[0] != batch or k.shape[3] != width or v.shape[:3] != k.shape[:3] or heads % k.shape[1]:
        raise UserError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not belong together")
    if (length, k.shape[2]) != (pattern.num_queries, pattern.num_keys):
        given = f"{pattern.num_queries} queries and {pattern.num_keys} keys"
        raise UserError(f"a pattern of {given} for q {tuple(q.shape)} and k {tuple(k.shape)}")
    if pattern.indices.shape[0] not in (1, batch) or pattern.indices.shape[1] not in (1, heads):
        raise UserError(f"a pattern {tuple(pattern.indices.shape[:2])} for B = {batch} and H = {heads}")
    if call.bias is not None and (
        call.bias.ndim != 3 or call.bias.shape[0] not in (1, batch) or call.bias.shape[1] not in (1, heads)
        or call.bias.shape[2] != k.shape[2] or call.bias.requires_grad
    ):  # fmt: skip
        raise UserError(f"key_bias {tuple(call.bias.shape)} is not [B or 1, H or 1, S] without a gradient")
    if not call.scale > 0 or (call.rule.window is not None and call.rule.window < 1):
        raise UserError(f"a scale above 0 and a window of at least 1, not {call.scale} and {call.rule.window}")


class _Sparse(torch.autograd.Function):
    """The kernel or its twin, both of which recompute the weights in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call, impl: Impl) -> tuple[Tensor, Tensor]:
        out, lse = _way(impl).forward(q, k, v, call, any(ctx.needs_input_grad))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.call, ctx.impl = call, impl
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        return *_way(ctx.impl).backward(q, k, v, ctx.call, out, lse, dout, dlse), None, None


def _way(impl: Impl) -> Any:
    return sparse_twin if impl == "torch" else _kernel()


def _kernel() -> Any:
    from ..kernels import block_sparse

    return block_sparse


# ---- dense attention and FlexAttention


def _fits_flash(q: Tensor, k: Tensor, v: Tensor, call: Call, lse: bool) -> bool:
    """Whether dense attention knows the rule, and can give what is asked for."""
    plain = call.bias is None and call.documents is None and call.rule.window is None and q.shape[2] <= k.shape[2]
    width = q.shape[3] == v.shape[3] <= 256 and q.shape[3] % 8 == 0
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return plain and width and q.element_size() == 2 and not (lse and grad)


def _flash(q: Tensor, k: Tensor, v: Tensor, call: Call, lse: bool) -> Tensor | tuple[Tensor, Tensor]:
    causal, scale = call.rule.causal, call.scale
    if lse:
        if not q.is_cuda or not _fits_flash(q, k, v, call, lse):
            raise UserError("impl=flash gives a log-sum-exp on a GPU only, in 16 bits and without gradients")
        k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
        made = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return made[0], made[1][..., : q.shape[2]]
    if call.rule.window is not None or call.bias is not None or call.documents is not None:
        raise UserError("impl=flash knows no window, documents or bias")
    if causal and q.shape[2] != k.shape[2]:
        return causal_tail(q, k, v, scale).transpose(1, 2)
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)


def _masked(q: Tensor, k: Tensor, v: Tensor, call: Call, lse: bool) -> Tensor:
    if lse:
        raise UserError("impl=masked gives no log-sum-exp")
    mask = call.pattern.to_mask(call.rule)
    if call.documents is not None:
        mine, theirs = call.documents
        mask = mask & (mine[:, None, :, None] == theirs[:, None, None])
    empty = ~mask.any(3, keepdim=True)
    mask = mask | empty  # a row without a key sees all of them for a moment, so that nothing is NaN
    if call.bias is not None:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf) + call.bias[:, :, None].to(q.dtype)
    mask = mask.expand(q.shape[0], q.shape[1], -1, -1)
    k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)
    return out.masked_fill(empty, 0.0)


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    bias, mask = call.bias, block_mask(call.pattern, call.rule, call.documents)

    def biased(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[b if bias.shape[0] > 1 else b * 0, h if bias.shape[1] > 1 else h * 0, s]

    attend = _compiled() if q.is_cuda else flex_attention
    out, aux = attend(
        q, k, v, block_mask=mask, score_mod=None if bias is None else biased, scale=call.scale,
        enable_gqa=q.shape[1] != k.shape[1], return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    return out, aux.lse
