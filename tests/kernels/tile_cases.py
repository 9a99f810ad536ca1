# SPDX-License-Identifier: Apache-2.0
"""Attention of the rows of a process to keys that come in parts, by torch and by the kernels, amid NaN, and the formula
in float64 over all keys at once.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tolerance
from kernels.cases import poisoned
from kernels.decay_cases import amid_nan
from kernels.sparse_cases import LIMIT
from manyheads.attention.tile_pattern import TilePattern
from manyheads.parallel import AttnMask, layout, pattern
from manyheads.parallel._partial import attend, attend_back
from manyheads.parallel._tiles import tiles


@dataclass
class Case:
    """Inputs in float32, the mask, and the tokens of the rows and of each part of the keys.

    ``flip``: a part, a tile of it with bits, and a query and a key of that: the pair that the kernels see wrongly.
    """

    q: Tensor  # [B, H, T, d]
    k: Tensor  # [B, Hkv, S, d], by token
    v: Tensor
    dout: Tensor
    dlse: Tensor
    mask: AttnMask
    rows: Tensor
    parts: tuple[Tensor, ...]
    dtype: torch.dtype = torch.float32
    scale: float = 0.3
    flip: tuple[int, int, int, int] | None = None

    def truth(self) -> dict[str, Tensor]:
        q, k, v, dout = (x.to(self.dtype).double() for x in (self.q, self.k, self.v, self.dout))
        q, k, v = leaves = [x.requires_grad_() for x in (q, k, v)]
        group, tokens = q.shape[1] // k.shape[1], torch.cat(self.parts)
        k, v = (x[:, :, tokens].repeat_interleave(group, 1) for x in (k, v))
        x = (q @ k.mT * self.scale).masked_fill(~self.mask.dense(self.rows, tokens), -torch.inf)
        lse = x.logsumexp(3)
        some = lse > -torch.inf
        weights = (x - torch.where(some, lse, 0.0)[..., None]).exp()
        out = weights @ v
        told = (out * dout).sum() + (torch.where(some, lse, 0.0) * self.dlse).sum()
        made = out, lse, *torch.autograd.grad(told, leaves)
        return {name: x.detach() for name, x in zip(("out", "lse", "dq", "dk", "dv"), made, strict=True)}

    def patterns(self, device: str) -> list[TilePattern]:
        made = [tiles(self.mask, self.rows, part, device) for part in self.parts]
        if self.flip is not None:
            part, number, query, key = self.flip
            made[part].words[number, query, key // 32] ^= 1 << key % 32
        return made

    def run(self, impl: str, device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        held = [x.to(self.dtype).to(dtype or self.dtype).to(device) for x in (self.q, self.k, self.v, self.dout)]
        q, dout = (amid_nan(x, heads_first=i == 1) for i, x in enumerate(held[::3]))
        parts = [tuple(amid_nan(x[:, :, part.to(device)], False) for x in held[1:3]) for part in self.parts]
        seen, found = self.patterns(device), None
        for (k, v), those in zip(parts, seen, strict=True):
            found = attend(q, k, v, those, self.scale, found, impl)
        out, lse = found
        delta = (out * dout).sum(3) - self.dlse.to(device, out.dtype).masked_fill(lse.isinf(), 0.0)
        dq, grads = None, [torch.zeros(x.shape, dtype=out.dtype, device=device) for x in held[1:3]]
        for (k, v), those, part in zip(parts, seen, self.parts, strict=True):
            room = out.new_full((k.shape[2], *k.shape[:2], k.shape[3] + v.shape[3]), torch.nan)
            into = room.permute(1, 2, 0, 3).tensor_split([k.shape[3]], 3)
            dq, *more = attend_back(q, k, v, those, self.scale, lse, delta, dout, dq, into, impl)
            for grad, x in zip(grads, more, strict=True):
                grad[:, :, part.to(device)] += x
        made = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, dq, *grads), strict=True))
        return {name: x.cpu() for name, x in made.items()}


def build(
    name: str = "causal", how: str = "contiguous", *, size: int = 270, ranks: int = 2, kv_heads: int = 1,
    group: int = 1, width: int = 16, columns: int | None = None, batch: int = 1, mask: AttnMask | None = None,
    **given: object,
) -> Case:  # fmt: skip
    """Rows of the last of so many processes, to the keys of each in turn, its own first."""
    mask = pattern(name, size, 1) if mask is None else mask
    shared = layout(how, mask, ranks).rows
    rows, heads, columns = shared[-1], kv_heads * group, width if columns is None else columns
    sizes = (heads, len(rows), width), (kv_heads, size, width), (kv_heads, size, columns), (heads, len(rows), columns)
    drawn = [torch.randn(batch, *x) for x in sizes]
    seen = mask.dense(rows, torch.arange(size)).any(1)
    dlse = torch.randn(batch, heads, len(rows)) * seen
    return Case(*drawn, dlse, mask, rows, (rows, *shared[:-1]), **given)  # type: ignore[arg-type]


def worst(case: Case, got: dict[str, Tensor], limits: tuple[float, float] | None = None) -> float:
    """The largest error, in units of its limit."""
    out, grad = limits or LIMIT[case.dtype]
    want = case.truth()
    return max(tolerance.error(got[name], want[name]) / (grad if name[0] == "d" else out) for name in want)


def kernel(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    made: dict[str, Tensor] = poisoned(case.run, "triton", device)  # type: ignore[assignment]
    return made


def flipped(case: Case) -> Case:
    """One bit wrong, of the fourth query and the sixth key of the first tile that has bits."""
    for part, those in enumerate(case.patterns("cpu")):
        if len(those.words):
            return replace(case, flip=(part, 0, 3, 5))
    raise AssertionError("no tile has bits")
