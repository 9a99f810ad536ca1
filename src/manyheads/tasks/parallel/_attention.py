# SPDX-License-Identifier: Apache-2.0
"""What one process does where attention over shared tokens is measured: run it, count it, time it, and check it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ...parallel import AttnMask, ContextParallel, Layout, World, layout, pattern

__all__ = ["Asked", "Found", "measured", "shared_layout", "shared_mask"]

_ROWS = 256  # of a reference, at once
_NAMES = ("output", "gradient of q", "gradient of k", "gradient of v")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One mask, one way to share it, one size.

    Attributes:
        mask, tokens, draw: a pattern of so many tokens, and the seed of what is drawn.
        layout: by name.
        given: other arguments of :class:`manyheads.parallel.ContextParallel`.
        heads, kv_heads, width, dtype: of queries, keys and values, in one row.
        backward: also the gradients.
        node: processes that count as a machine; 0 for all.
        rounds: that are timed, after one that is not.
        checked: tokens up to which the result is compared with one process in float64.
    """

    mask: str
    tokens: int
    draw: int
    layout: str
    given: dict[str, Any] = field(hash=False)
    heads: int
    kv_heads: int
    width: int
    dtype: str
    backward: bool
    node: int
    rounds: int
    checked: int


@dataclass(frozen=True)
class Found:
    """What one process found.

    Attributes:
        sent: bytes, one forward and, if asked for, one backward pass.
        between: of these, to other machines.
        seconds: of each round: forward, backward (0 where it was not asked for).
        memory: the most that the device held beyond what it holds at rest; None on a CPU.
        errors: of the whole, by name: the largest difference from float64, and that of one process in this dtype; in
            the first process alone.
    """

    sent: int
    between: int
    seconds: tuple[tuple[float, float], ...]
    memory: int | None
    errors: dict[str, tuple[float, float]]


@lru_cache(maxsize=2)
def shared_mask(name: str, tokens: int, draw: int) -> AttnMask:
    """A pattern, drawn once."""
    return pattern(name, tokens, draw)


@lru_cache(maxsize=6)
def shared_layout(how: str, name: str, tokens: int, draw: int, ranks: int) -> Layout:
    """Its layout, searched for once."""
    return layout(how, shared_mask(name, tokens, draw), ranks)


def measured(world: World, asked: Asked) -> Found:
    """Measure in this process; every process of the world has to."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    mask = shared_mask(asked.mask, asked.tokens, asked.draw)
    who = shared_layout(asked.layout, asked.mask, asked.tokens, asked.draw, world.size)
    context = ContextParallel(world, mask, who, **asked.given)
    small = asked.tokens <= asked.checked
    if small:
        mine = [context.shard(x, 2).to(device) for x in _drawn(asked)]
    else:
        mine = _tensors(asked, len(context.rows), torch.Generator(device).manual_seed(world.rank), device)
    *inputs, dout = (x.to(getattr(torch, asked.dtype)) for x in mine)
    inputs = [x.requires_grad_(asked.backward) for x in inputs]
    world.ledger.node = asked.node
    world.ledger.clear()
    at_rest = _peak(device)
    found = _pass(context, inputs, dout, asked.backward, device)[1]
    peak = _peak(device)
    sent, between = world.ledger.bytes(), world.ledger.bytes(between=True)
    errors = {}
    if small:
        whole = [context.unshard(x, 2) for x in found]
        if world.rank == 0:
            errors = _errors(asked, whole, device)
    seconds = tuple(_pass(context, inputs, dout, asked.backward, device)[0] for _ in range(asked.rounds))
    memory = None if peak is None or at_rest is None else peak - at_rest
    return Found(sent, between, seconds, memory, errors)


def _pass(
    context: ContextParallel, inputs: Sequence[Tensor], dout: Tensor, backward: bool, device: torch.device
) -> tuple[tuple[float, float], list[Tensor]]:
    """Seconds of both ways, each begun by all processes at once; output and gradients."""
    start = _now(device, together=True)
    q, k, v = inputs
    out, _ = context.attend(q, k, v)
    forward, passed = _now(device) - start, 0.0
    found = [out.detach()]
    if backward:
        start = _now(device, together=True)
        found += torch.autograd.grad(out, inputs, dout)
        passed = _now(device) - start
    return (forward, passed), found


def _now(device: torch.device, together: bool = False) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    if together:
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak(device: torch.device) -> int | None:
    """The most that the device has held since this was last asked; None on a CPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return found


def _tensors(asked: Asked, length: int, generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output, in float32."""
    heads = asked.heads, asked.kv_heads, asked.kv_heads, asked.heads
    return [torch.randn(1, n, length, asked.width, generator=generator, device=device) for n in heads]


@lru_cache(maxsize=1)
def _draw(heads: int, kv_heads: int, width: int, tokens: int, draw: int, dtype: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(draw)
    numbers = (heads, kv_heads, kv_heads, heads)
    wide = torch.float64 if dtype == "float64" else torch.float32
    drawn = (torch.randn(1, n, tokens, width, generator=generator, dtype=wide) for n in numbers)
    return tuple(x.to(getattr(torch, dtype)) for x in drawn)  # one process reads what the others read, rounded


def _drawn(asked: Asked) -> tuple[Tensor, ...]:
    """Those of all tokens, rounded to the dtype."""
    return _draw(asked.heads, asked.kv_heads, asked.width, asked.tokens, asked.draw, asked.dtype)


def _errors(asked: Asked, whole: Sequence[Tensor], device: torch.device) -> dict[str, tuple[float, float]]:
    """Largest differences from float64: of what the processes found, and of one process in the same dtype."""
    key = asked.mask, asked.tokens, asked.draw, asked.heads, asked.kv_heads, asked.width, asked.dtype, asked.backward
    exact, alone = _reference(*key, str(device))
    names = _NAMES[: len(whole)]
    return {
        name: (float((x.double() - y).abs().max()), error)
        for name, x, y, error in zip(names, whole, exact, alone, strict=True)
    }


@lru_cache(maxsize=1)
def _reference(
    mask: str, tokens: int, draw: int, heads: int, kv_heads: int, width: int, dtype: str, backward: bool, device: str
) -> tuple[list[Tensor], list[float]]:  # fmt: skip
    """Output and gradients of one process in float64, and the errors of torch's own attention in ``dtype``."""
    drawn = [x.to(device) for x in _draw(heads, kv_heads, width, tokens, draw, dtype)]
    seen = shared_mask(mask, tokens, draw)
    exact = _alone([x.double() for x in drawn], seen, backward, fused=False)
    rounded = _alone(drawn, seen, backward, fused=True)
    return exact, [float((x.double() - y).abs().max()) for x, y in zip(rounded, exact, strict=True)]


def _alone(drawn: Sequence[Tensor], mask: AttnMask, backward: bool, fused: bool) -> list[Tensor]:
    """By the formula, or by torch's attention; some rows at a time, 0 where a row sees nothing."""
    q, k, v, dout = drawn
    every = torch.arange(mask.size, device=q.device)
    groups, found = q.shape[1] // k.shape[1], [torch.zeros_like(x) for x in (q, q, k, v)]
    wide = [torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in (k, v)]
    for rows in every.split(_ROWS):
        seen = mask.dense(rows, every)
        parts = [x.detach().requires_grad_(backward) for x in (q[:, :, rows], k, v)]
        keys, values = (x.repeat_interleave(groups, 1) for x in parts[1:])
        if fused:
            out = scaled_dot_product_attention(parts[0], keys, values, seen).masked_fill(~seen.any(1)[:, None], 0)
        else:
            x = (parts[0] @ keys.mT * q.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
            out = x.softmax(-1).nan_to_num() @ values
        found[0][:, :, rows] = out.detach()
        if backward:
            dq, *more = torch.autograd.grad(out, parts, dout[:, :, rows])
            found[1][:, :, rows] = dq.nan_to_num()
            for total, one in zip(wide, more, strict=True):
                total += one.nan_to_num()
    return [*found[:2], *(x.to(k.dtype) for x in wide)] if backward else found[:1]
