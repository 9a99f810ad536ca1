# SPDX-License-Identifier: Apache-2.0
"""How :mod:`manyheads.kernels.recurrence` cuts a call into segments, and how its kernels are launched over them."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ._operator import launch
from ._recurrence import chunks
from ._states import scan

__all__ = ["LONGEST", "Pass", "Plan", "blocks", "dense", "like", "padded", "states", "tile_width"]

_PROGRAMS = 2  # of a multiprocessor at once
LONGEST = 4096  # tokens of a segment


class _Config(NamedTuple):
    """How ``chunks`` is run: tokens of a chunk, columns of z of a program, warps, depth of the loop's pipeline."""

    chunk: int
    columns: int
    warps: int
    stages: int


def _config(x: int, dtype: torch.dtype, out: bool, plain: bool = True) -> _Config:
    """By the width of x, padded; fixed, so that no first call spends its time on tuning.

    ``plain`` calls have neither gates per token nor a normaliser: their loop has the registers for a deeper pipeline.
    """
    if dtype == torch.float32:
        return _Config(32, 32, 8, 1) if x <= 64 else _Config(16, 16, 8, 1)
    if x <= 128:
        return _Config(64, 64, 4, 3 if plain or not out else 2)
    if not out:
        return _Config(64, 64, 4, 2)
    return _Config(64, 64, 8, 2 if dtype == torch.bfloat16 else 1)  # float16 holds its state in shared memory too


def padded(width: int, itemsize: int = 4) -> int:
    """A power of two; operands narrower than 128 bytes Triton 3.6 and 3.7 read past on Hopper (its issue 11366)."""
    return max(16 if itemsize == 4 else 64, 1 << (int(width) - 1).bit_length())


def blocks(number: int, size: int) -> int:
    """How many blocks of ``size`` hold ``number``; Triton's own takes 4 us."""
    return -(-number // size)


def tile_width(width: int, columns: int, dtype: torch.dtype) -> int:
    """Columns of z, of so many, that a program of ``chunks`` holds where x has so many."""
    return min(_config(padded(width, dtype.itemsize), dtype, True).columns, padded(columns, dtype.itemsize))


@cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _processors(x: Tensor) -> int:
    return _multiprocessors(x.device.index or 0) if x.is_cuda else 8


class Plan(NamedTuple):
    """Segments of a call.

    The state after segment s of sequence n stands in row ``s + n + 1``, that before its first in row ``s + n``.

    Attributes:
        length: tokens of a segment.
        per: segments of a sequence, where none are packed.
        segments: of all sequences; where they are packed, a bound.
        sequences: N.
        size: numbers of a state.
        whole: every sequence is one segment, whose final state comes out of the pass that makes the output.
    """

    length: int
    per: int
    segments: int
    sequences: int
    size: int
    whole: bool

    @property
    def numel(self) -> int:
        return (self.segments + self.sequences) * self.size

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, norm: str) -> "Plan":
        """As few segments as fill the device, or fill it some times over. Symbolic sizes stay symbolic."""
        (batch, heads, tokens, width), columns = q.shape, v.shape[3]
        config = _config(padded(width, q.element_size()), q.dtype, True)
        programs = batch * heads * blocks(columns, config.columns)
        unit = config.chunk
        fill = torch.sym_max(1, _PROGRAMS * _processors(q) // programs)
        per = fill * torch.sym_max(1, blocks(tokens, fill * LONGEST))
        length = torch.sym_max(unit, blocks(tokens, per * unit) * unit)
        size = width * columns + (width if norm else 0)
        if cu_seqlens is not None:
            count = cu_seqlens.shape[0] - 1
            return cls(length, 1, tokens // length + count, count, size, False)
        per = torch.sym_max(1, blocks(tokens, length))
        return cls(length, per, batch * per, batch, size, per == 1)


def _rows(indices: Tensor) -> tuple[int, int]:
    """Lists from one batch row, and from one head, to the next; 0 where they are shared."""
    batch, heads, rows, _ = indices.shape
    return (heads * rows if batch > 1 else 0), (rows if heads > 1 else 0)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of rows, heads and tokens. A single row has none, so that a length past 2^31 numbers compiles nothing anew."""
    batch, head, row, _ = x.stride()
    return batch if x.shape[0] > 1 else 0, head, row


def like(x: Tensor, width: int) -> Tensor:
    """Room for ``[B, H, T, width]`` with heads and tokens in the order in which ``x`` has them."""
    batch, heads, length, _ = x.shape
    if x.stride(1) < x.stride(2):
        return x.new_empty(batch, length, heads, width).transpose(1, 2)
    return x.new_empty(batch, heads, length, width)


def dense(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def states(k: Tensor, v: Tensor, count: int, norm: str) -> tuple[Tensor, Tensor]:
    """Room for ``count`` states and, with a norm, their vectors."""
    kv = k.new_empty(count, k.shape[1], k.shape[3], v.shape[3], dtype=torch.float32)
    return kv, k.new_empty((count, k.shape[1], k.shape[3]) if norm else (0,), dtype=torch.float32)


class Pass:
    """One direction of a call: its segments, its states, and the launches of the kernels over them."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, scale: float, norm: str
    ) -> None:  # fmt: skip
        self.plan = plan = Plan.of(q, k, v, cu_seqlens, norm)
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
        width, columns, plan, rows = y.shape[3], z.shape[3], self.plan, self.rows
        wide = padded(width, x.element_size())
        config = _config(wide, x.dtype, out is not None, self.gate != "token" and not self.norm)
        block = min(config.columns, padded(columns, x.element_size()))
        programs = self.heads * self.group if role in ("out", "dq") else self.heads
        turned = role in ("dq", "dk")
        strides = _strides(x)
        launch(
            chunks, (plan.segments * programs * blocks(columns, block),),
            x, y, z, x if w is None else w, rows if self.g is None else self.g, rows if r is None else r,
            rows if c is None else c, rows if floor is None else floor, rows, x if out is None else out,
            rows if aux is None else aux, self.decay, self.owner, self.first, self.cu, *strides, *_strides(y),
            *_strides(z), *(strides if w is None else _strides(w)), *self.gate_strides,
            *(strides if out is None else _strides(out)), self.length, plan.length, plan.per, plan.sequences,
            1 if turned else columns, width if turned else 1, self.scale, HEADS=self.heads, G=self.group,
            X=width, Z=columns, C=config.chunk, BX=wide, BZ=block, GATE=self.gate, OUT=out is not None,
            REVERSE=role in ("dstate", "dk", "dv"), ROLE=role if self.norm else "",
            MLSTM=self.norm == "mlstm" and role == "out", DG=w is not None, PACKED=self.packed, SIZE=plan.size,
            WHOLE=plan.whole and role in ("out", "dk"), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip

    def scan(self, start: Tensor | None, start_n: Tensor | None, end: Tensor, end_n: Tensor, reverse: bool) -> None:
        """States before segments, in ``reverse`` after them, from ``start`` to ``end``, which :meth:`last` may fill."""
        size, cells, block = self.plan.size, end[0, 0].numel(), 512
        launch(
            scan, (self.plan.sequences * self.heads, blocks(size, block)),
            self.rows, self.decay, self.rows if start is None else start, self.rows if start_n is None else start_n,
            end, end_n, self.first, self.plan.per, HEADS=self.heads, KV=cells, SIZE=size, BLOCK=block,
            GATED=self.g is not None, GIVEN=start is not None, GIVEN_N=start_n is not None and bool(self.norm),
            REVERSE=reverse, PACKED=self.packed, WHOLE=self.plan.whole, num_warps=4,
        )  # fmt: skip

    def factor(self) -> Tensor:
        """What a whole sequence leaves of a state, ``[N, Hkv]``; none packed, and after :meth:`scan`."""
        return self.decay.view(self.plan.sequences, self.plan.per, self.heads).sum(1).exp2()

    def enter(self, given: Tensor, reverse: bool) -> None:
        """Add to the states of segments what is left there of ``given [N, Hkv, size]``, before a sequence or after it.

        States are linear in what a scan starts from: this is the same as another scan from there; none packed.
        """
        faded = self.decay.view(self.plan.sequences, self.plan.per, self.heads)
        none = torch.zeros_like(faded[:, :1])
        left = faded.flip(1).cumsum(1).flip(1) if reverse else faded.cumsum(1)
        left = torch.cat([left, none] if reverse else [none, left], 1).exp2()
        rows = self.rows.view(self.plan.sequences, self.plan.per + 1, self.heads, self.plan.size)
        rows.addcmul_(left[..., None], given[:, None])

    def last(self, end: Tensor, end_n: Tensor, reverse: bool) -> None:
        """Fill ``end`` if sequences are whole, from what ``chunks`` left beside their rows."""
        if self.plan.whole:
            rows = self.rows.view(self.plan.sequences, 2, self.heads, self.plan.size)[:, 0 if reverse else 1]
            cells = end[0, 0].numel()
            end.copy_(rows[..., :cells].view_as(end))
            if self.norm:
                end_n.copy_(rows[..., cells:])
