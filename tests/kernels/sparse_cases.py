# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention amid NaN, the formula in float64 with its gradients, and what a wrong one would give."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tolerance
from kernels.cases import poisoned
from kernels.decay_cases import amid_nan
from manyheads.attention.block_pattern import BlockPattern
from manyheads.attention.sparse import block_sparse_attention

# Output and log-sum-exp; gradients, in which weights are rounded on both sides of a product.
LIMIT = {
    torch.float32: (5e-6, 1e-5),
    torch.float16: (tolerance.HALF[torch.float16], 2 * tolerance.HALF[torch.float16]),
    torch.bfloat16: (tolerance.HALF[torch.bfloat16], 2 * tolerance.HALF[torch.bfloat16]),
}

_LARGE = {"block_q": 128, "block_k": 128, "width": 128, "columns": 128}
_NARROW = {**_LARGE, "width": 64, "columns": 64}
BLOCKS_OF_128 = {  # what the kernels for Hopper take
    "even": {**_LARGE, "length": 1024, "kv_heads": 2},
    "gqa": {**_LARGE, "length": 700, "heads": 4, "kv_heads": 2, "batch": 2},
    "ragged": {**_NARROW, "length": 333, "size": 500},
    "ragged, wide": {**_LARGE, "length": 333, "size": 500, "density": 0.7},
    "odd": {**_NARROW, "length": 501, "heads": 3, "kv_heads": 3},
    "window": {**_LARGE, "length": 650, "size": 777, "window": 200, "density": 0.7},
    "both sides": {**_NARROW, "length": 300, "size": 450, "kv_heads": 2, "causal": False, "window": 90},
    "no rule": {**_LARGE, "length": 300, "size": 450, "kv_heads": 2, "causal": False},
    "short": {**_LARGE, "length": 10, "size": 7, "kv_heads": 2, "causal": False, "density": 1.0},
    "queries without a key": {**_LARGE, "length": 600, "size": 400, "kv_heads": 2, "density": 0.8},
    "256 queries": {**_LARGE, "length": 900, "block_q": 256, "density": 0.6},
    "256 keys": {**_LARGE, "length": 900, "block_k": 256, "density": 0.6},
    "shared lists": {**_LARGE, "length": 520, "batch": 2, "heads": 4, "shared": True},
}  # fmt: skip


@dataclass
class Case:
    """q, k, v in float32 and what is seen of them; ``late`` and ``missing`` make the formula wrong."""

    q: Tensor
    k: Tensor
    v: Tensor
    blocks: Tensor  # [B or 1, H or 1, n_q, n_k]
    block_q: int
    block_k: int
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: int | None = None
    valid: Tensor | None = None
    cu_seqlens: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 0.3
    late: int = 0  # queries see so many keys more
    missing: str = ""

    def mask(self) -> Tensor:
        """``[B, H, T, S]`` by loops over nothing but positions."""
        length, size = self.q.shape[2], self.k.shape[2]
        t, s = torch.arange(length)[:, None], torch.arange(size)
        seen = self.blocks[:, :, t // self.block_q, s // self.block_k]
        apart = t + size - length - s
        if self.causal:
            seen = seen & (apart >= -self.late)
        if self.window is not None:
            seen = seen & (apart < self.window) & (apart > -self.window)
        if self.valid is not None:
            seen = seen & self.valid[:, None, None]
        if self.cu_seqlens is not None:
            owner = sum((s >= bound).long() for bound in self.cu_seqlens.tolist())
            seen = seen & (owner[:, None] == owner)
        return seen.expand(*self.q.shape[:2], -1, -1)

    def truth(self) -> dict[str, Tensor]:
        leaves = [x.to(self.dtype).double().requires_grad_() for x in (self.q, self.k, self.v)]
        group = self.q.shape[1] // self.k.shape[1]
        q, k, v = leaves[0], *(x.repeat_interleave(group, 1) for x in leaves[1:])
        if self.missing == "group":
            k = torch.cat([k[:, :-1], k[:, -1:].detach()], 1)
        x = q @ k.transpose(2, 3) * self.scale
        if self.bias is not None:
            x = x + self.bias[:, :, None].double()
        mask = self.mask()
        e = x.exp().masked_fill(~mask, 0.0)
        total = e.sum(3)
        some = total > 0
        safe = torch.where(some, total, 1.0)
        lse = safe.log()
        if self.missing == "max":
            lse = lse - x.masked_fill(~mask, -torch.inf).amax(3).masked_fill(~some, 0.0)
        return self._made(leaves, (e / safe[..., None]) @ v, torch.where(some, lse, -torch.inf), some)

    def _made(self, leaves: list[Tensor], out: Tensor, lse: Tensor, some: Tensor) -> dict[str, Tensor]:
        source = torch.Generator().manual_seed(3)
        weight, other = (torch.randn(x.shape, generator=source, dtype=torch.float64) for x in (out, lse))
        sums = torch.where(some, lse, 0.0) if self.missing != "dlse" else lse.detach().clamp(min=0)
        loss = (out.double() * weight.to(out.device)).sum() + (sums.double() * other.to(out.device)).sum()
        grads = torch.autograd.grad(loss, leaves)
        made = dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), strict=True))
        return {name: x.detach().cpu() for name, x in made.items()}

    def pattern(self, device: str = "cpu") -> BlockPattern:
        length, size = self.q.shape[2], self.k.shape[2]
        sizes = {"block_q": self.block_q, "block_k": self.block_k}
        return BlockPattern.from_blocks(self.blocks.to(device), length, size, **sizes)

    def run(self, impl: str, device: str = "cpu", dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        held = [x.to(self.dtype).to(dtype or self.dtype).to(device) for x in (self.q, self.k, self.v)]
        held = [amid_nan(x, heads_first=i == 1).requires_grad_() for i, x in enumerate(held)]
        extra = {
            name: None if x is None else x.to(device)
            for name, x in (("valid", self.valid), ("cu_seqlens", self.cu_seqlens), ("key_bias", self.bias))
        }
        out, lse = block_sparse_attention(
            *held, self.pattern(device), scale=self.scale, causal=self.causal, window=self.window, lse=True,
            impl=impl, **extra,
        )  # fmt: skip
        assert out.dtype == (dtype or self.dtype)
        return self._made(held, out, lse, lse > -torch.inf)


def build(
    *, length: int = 40, size: int | None = None, batch: int = 1, heads: int = 2, kv_heads: int = 1, width: int = 16,
    columns: int = 16, block_q: int = 16, block_k: int = 16, density: float = 0.5, shared: bool = False,
    padded: bool = False, packed: list[int] | None = None, biased: bool = False, **given: object,
) -> Case:  # fmt: skip
    """A random case. The last block of queries of the first head reads nothing, one before it reads all."""
    size = length if size is None else size
    rows, cells = -(-length // block_q), -(-size // block_k)
    blocks = torch.rand(1 if shared else batch, 1 if shared else heads, rows, cells) < density
    blocks[0, 0, -1] = False
    if rows > 1:
        blocks[0, 0, -2] = True
    return Case(
        torch.randn(batch, heads, length, width), torch.randn(batch, kv_heads, size, width),
        torch.randn(batch, kv_heads, size, columns), blocks, block_q, block_k,
        valid=torch.rand(batch, size) < 0.7 if padded else None,
        cu_seqlens=None if packed is None else torch.tensor(packed),
        bias=torch.randn(batch, heads, size) if biased else None, **given,  # type: ignore[arg-type]
    )  # fmt: skip


def errors(case: Case, got: dict[str, Tensor]) -> dict[str, float]:
    return {name: tolerance.error(got[name], x) for name, x in case.truth().items()}


def worst(case: Case, got: dict[str, Tensor]) -> float:
    """The largest error, in units of its limit."""
    out, grad = LIMIT[case.dtype]
    return max(e / (grad if name.startswith("d") else out) for name, e in errors(case, got).items())


def kernel(case: Case, device: str = "cpu") -> dict[str, Tensor]:
    made: dict[str, Tensor] = poisoned(case.run, "triton", device)  # type: ignore[assignment]
    return made


def wrong_variants(case: Case) -> dict[str, Case]:
    """Cases that ``case``'s results must not agree with."""
    fewer = case.blocks.clone()
    fewer[0, 0, -2] = False
    made = {
        "another scale": replace(case, scale=1.1 * case.scale),
        "lse without its maximum": replace(case, missing="max"),
        "no gradient of lse": replace(case, missing="dlse"),
        "blocks one further": replace(case, blocks=case.blocks.roll(1, -1)),
        "blocks of the next queries": replace(case, blocks=case.blocks.roll(1, -2)),
        "keys dropped": replace(case, blocks=fewer),
    }
    if case.q.shape[1] > case.k.shape[1]:
        made["dk without a head of the group"] = replace(case, missing="group")
    if case.causal:
        made["sees one key too many"] = replace(case, late=1)
        made["sees one key too few"] = replace(case, late=-1)
    if case.window is not None:
        made["a longer window"] = replace(case, window=case.window + 1)
    if case.valid is not None:
        made["padding of another place"] = replace(case, valid=case.valid.roll(1, -1))
    if case.cu_seqlens is not None:
        bounds = case.cu_seqlens.clone()
        bounds[1] += 1
        made["bounds off by one"] = replace(case, cu_seqlens=bounds)
    if case.bias is not None:
        made["no bias"] = replace(case, bias=None)
    return made
