# SPDX-License-Identifier: Apache-2.0
"""Cases of attention over product-quantised keys: kernels and twin against the formula in float64."""

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import tolerance
from manyheads.attention import offloaded, product_codes
from manyheads.attention.codec import FP8, INT4, Codec

CASES = [
    {"count": 1},
    {"count": 64, "group": 1},
    {"count": 1025, "group": 3, "kv_heads": 1},
    {"count": 200, "batch": 2, "first": [0, 17], "masked": True},
    {"count": 90, "centroids": 300, "groups": 4, "dtype": torch.float16},
    {"count": 130, "codec": FP8, "dim": 32},
    {"count": 130, "codec": INT4, "dim": 32},
    {"count": 200, "codec": INT4, "batch": 2, "first": [0, 17], "masked": True},
    {"count": 130, "top_k": 7},
    {"count": 40, "top_p": 1.0},
    {"count": 40, "sure": 0.99},
    {"count": 5000, "kv_heads": 1, "spread": 6.0},
]


@dataclass
class Case:
    q: Tensor
    centroids: Tensor
    codes: Tensor  # with places to come, which hold poison
    values: Tensor  # [C, B, Hkv, d], or d / 2
    value_scale: Tensor | None
    count: int
    first: Tensor | None
    mask: Tensor | None
    sure: float  # mass that is kept anyhow
    top_p: float
    top_k: int
    scale: float

    @property
    def table(self) -> Tensor:
        return product_codes.lookup_table(self.q, self.centroids, self.scale)


def build(
    count: int, batch: int = 1, kv_heads: int = 2, group: int = 2, dim: int = 64, groups: int = 8, centroids: int = 16,
    first: list[int] | None = None, masked: bool = False, codec: Codec | None = None, sure: float = 0.05,
    top_p: float = 0.9, top_k: int = 0, dtype: torch.dtype = torch.float32, spread: float = 3.0,
) -> Case:  # fmt: skip
    made = torch.Generator().manual_seed(count)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made)

    k, v = draw(batch, kv_heads, count, dim).to(dtype), draw(count + 9, batch, kv_heads, dim).to(dtype)
    books = product_codes.fit(k, groups, centroids, iterations=2)
    codes = torch.cat([product_codes.encode(k, books), torch.full((batch, kv_heads, groups, 9), 1)], 3)
    value_scale = None
    if codec is not None:
        v, value_scale = codec.encode(v)
        value_scale = value_scale.permute(1, 2, 0).contiguous()
    return Case(
        q=draw(batch, kv_heads * group, dim).to(dtype), centroids=books,
        codes=codes.to(product_codes.code_dtype(centroids)).contiguous(), values=v, value_scale=value_scale,
        count=count, first=None if first is None else torch.tensor(first),
        mask=torch.rand(batch, count, generator=made) > 0.3 if masked else None, sure=sure, top_p=top_p, top_k=top_k,
        scale=spread * dim**-0.5,
    )  # fmt: skip


def moved(case: Case, device: str) -> Case:
    """The case on another device, values too."""
    tensors = {name: x.to(device) for name, x in vars(case).items() if isinstance(x, Tensor)}
    return replace(case, **tensors)


def nearest(k: Tensor, books: Tensor, codes: Tensor) -> bool:
    """Whether no centroid is nearer than those of the codes, by distances in float64."""
    parts = k.double().unflatten(3, (books.shape[2], -1)).transpose(2, 3)
    far = torch.cdist(parts, books.double().expand(len(k), -1, -1, -1, -1))
    return bool((far.gather(4, codes.long()[..., None])[..., 0] <= far.amin(4) * (1 + 1e-6) + 1e-7).all())


def run(case: Case, fast: ModuleType | None) -> dict[str, Tensor]:
    """What kernels or twin make of a case."""
    if fast is not None:
        x, lse = fast.table_logits(case.table, case.codes, case.count, case.first, case.mask)
    else:
        x = product_codes.table_logits(case.table, case.codes[..., : case.count]).masked_fill(~seen(case), -torch.inf)
        lse = x.logsumexp(2)
    whole = lse - torch.tensor(1 - case.sure).log()
    need = torch.full_like(whole, torch.inf) if case.top_p >= 1 else torch.full_like(whole, case.top_p - case.sure)
    lowest = (fast or product_codes).select(x, whole, case.top_k or need)
    if fast is not None:
        out, mass, fetched = fast.fetch(x, whole, lowest, case.values, case.value_scale)
    else:
        rows = offloaded.HostRows.of(case.values, torch.device("cpu"))
        out, mass, fetched = offloaded.fetch(x, whole, lowest, rows, case.value_scale)
    return {"x": x, "lse": lse, "lowest": lowest, "out": out, "mass": mass, "fetched": fetched}


def seen(case: Case) -> Tensor:
    """Which tokens may be attended to, ``[B, 1, N]``."""
    allowed = torch.ones(len(case.q), case.count, dtype=torch.bool, device=case.q.device)
    if case.first is not None:
        allowed &= torch.arange(case.count, device=case.q.device) >= case.first[:, None]
    if case.mask is not None:
        allowed &= case.mask
    return allowed[:, None]


def truth(case: Case) -> dict[str, Any]:
    """The formula in float64, token by token of keys written out, and the kept tokens by sorting."""
    heads, group = case.centroids.shape[1], case.q.shape[1] // case.centroids.shape[1]
    k = product_codes.decode(case.codes[..., : case.count], case.centroids).double().repeat_interleave(group, 1)
    x = ((k @ case.q.double()[..., None])[..., 0] * case.scale).masked_fill(~seen(case), -torch.inf)
    lse = x.logsumexp(2)
    p = (x - lse[..., None]).exp() * (1 - case.sure)
    v = case.values[: case.count]
    if v.dtype == torch.uint8:  # channel j in the lower half of byte j, j + d / 2 in the upper one
        v = torch.cat([v % 16, v // 16], 3).double() - 8
    v = v.double().permute(1, 2, 0, 3)
    if case.value_scale is not None:
        v = v * case.value_scale[..., : case.count, None].double()
    return {"x": x, "lse": lse, "p": p, "v": v.repeat_interleave(group, 1), "heads": heads}


def agrees(case: Case, fast: ModuleType | None, wrong: Case | None = None) -> bool:
    """Whether kernels (or the twin, for None) do what the formula says; ``wrong`` is what they are given instead."""
    got, want = run(wrong or case, fast), truth(case)
    if tolerance.error(got["x"], want["x"]) > 1e-6 or tolerance.error(got["lse"], want["lse"]) > 1e-6:
        return False
    kept = (got["x"] >= got["lowest"][..., None]) & (got["x"] > -torch.inf)
    p = want["p"] * kept
    if case.top_k:
        enough = (kept.sum(2) == (want["p"] > 0).sum(2).clamp(max=case.top_k)).all()
    else:  # enough, and without the last one, and what ties with it, too little; up to the rounding of a mass
        mass, above = p.sum(2), (p * (got["x"] > got["lowest"][..., None])).sum(2)
        need, all_of_it = case.top_p - case.sure, kept.sum(2) == (want["p"] > 0).sum(2)
        enough = ((mass >= need - 1e-5) | all_of_it).all() and ((above < need + 1e-5) | (mass == 0)).all()
    out = (p[:, :, None] @ want["v"])[:, :, 0]
    # A weight is the exponential of a difference of float32 numbers: it is relatively as wrong as these are absolutely.
    limit = (
        4 * torch.finfo(torch.float32).eps * float(want["x"].masked_fill(want["p"] == 0, 0.0).abs().max().clamp(min=8))
    )
    read = kept.unflatten(1, (want["heads"], -1)).any(2).sum(2)
    return (
        bool(enough)
        and torch.equal(got["fetched"].long(), read)
        and tolerance.error(got["mass"], p.sum(2)) <= limit
        and (tolerance.error(got["out"], out) <= limit or not bool(read.any()))
    )


def wrong_variants(case: Case) -> dict[str, Case]:
    """Cases that differ from ``case`` in one thing that must not go unnoticed."""
    assert case.first is not None
    return {
        "codes of the next token": replace(case, codes=case.codes.roll(1, 3)),
        "sub-vectors the wrong way round": replace(case, codes=case.codes.flip(2)),
        "values of the next token": replace(case, values=case.values.roll(1, 0)),
        "heads the wrong way round": replace(case, values=case.values.flip(2)),
        "rows the wrong way round": replace(case, values=case.values.flip(1)),
        "padding seen": replace(case, first=None),
        "mask unread": replace(case, mask=None),
        "too little": replace(case, top_p=case.top_p - 0.05),
        "too much": replace(case, top_p=case.top_p + 0.05),
        "another scale": replace(case, scale=case.scale * 1.01),
    }
