# SPDX-License-Identifier: Apache-2.0
"""Weights in INT4 and activations in FP8, and their product from the formula, number by number, in float64."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import tolerance
from manyheads.attention import int4_fp8
from manyheads.attention.codec import FP8
from manyheads.attention.int4_fp8 import PackedWeight

LIMIT = 1e-6  # float32 sums of exact products
HALF = {torch.float32: LIMIT, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@dataclass
class Case:
    """Arguments of the product, and the packed weight that the truth is taken from."""

    x8: Tensor
    scale: Tensor
    packed: PackedWeight
    meant: PackedWeight

    def truth(self) -> Tensor:
        """``[M, N]`` float64: nibbles taken apart here, not by the library."""
        packed = self.meant
        half = packed.group // 2
        codes = packed.codes.cpu().long().unflatten(1, (-1, half))
        low, high = codes % 16 - 8, codes // 16 - 8
        numbers = torch.cat([low, high], 2).double() * packed.scale.cpu().double()[..., None]
        if packed.table == "fp8":
            numbers = numbers.float().to(torch.float8_e4m3fn).double()
        weight = numbers.flatten(1)[:, : packed.width]
        return self.x8.cpu().double() @ weight.T * self.scale.cpu().double()[:, None] / packed.shift

    def got(self, impl: str, dtype: torch.dtype = torch.float32) -> Tensor:
        return int4_fp8.multiply(self.x8, self.scale, self.packed, dtype, impl)


def build(
    tokens: int, outputs: int, width: int, group: int = 128, scale: torch.dtype = torch.float8_e4m3fn,
    table: str = "fp8", device: str = "cpu",
) -> Case:  # fmt: skip
    """A weight with groups of very different sizes, and inputs with outlying channels."""
    draw = torch.Generator().manual_seed(tokens + width)
    sizes = torch.exp2(torch.randint(-6, 3, (outputs, -(-width // 32)), generator=draw).float()).repeat_interleave(
        32, 1
    )
    weight = torch.randn(outputs, width, generator=draw) * 0.02 * sizes[:, :width]
    x = torch.randn(tokens, width, generator=draw) * torch.exp2(torch.randn(width, generator=draw))
    packed = int4_fp8.encode(weight, group=group, scale=scale, table=table)
    x8, token = FP8.encode(x)
    packed = packed.to(torch.device(device))
    return Case(x8.to(device), token.to(device), packed, packed)


def worst(case: Case, impl: str, dtype: torch.dtype = torch.float32) -> float:
    return tolerance.error(case.got(impl, dtype).double().cpu(), case.truth())


def wrong_variants(device: str = "cpu") -> Iterator[tuple[str, Case]]:
    """What a kernel could read wrongly, given to it as its arguments."""
    case = build(5, 40, 300, device=device)
    packed = case.packed
    changes = {
        "nibbles swapped": {"codes": (packed.codes >> 4) | (packed.codes << 4)},
        "scales of the next group": {"scale": packed.scale.view(torch.uint8).roll(1, 1).view(torch.float8_e4m3fn)},
        "scales of the next output": {"scale": packed.scale.view(torch.uint8).roll(1, 0).view(torch.float8_e4m3fn)},
        "power of two lost": {"shift": 1.0},
        "table not rounded": {"table": "exact"},
        "codes one too large": {"codes": packed.codes + 1},
    }
    for name, change in changes.items():
        yield name, replace(case, packed=replace(packed, **change))
    other = Case(case.x8, case.scale.roll(1), packed, packed)
    other.truth = case.truth  # type: ignore[method-assign]
    yield "scales of other tokens", other
