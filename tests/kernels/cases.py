# SPDX-License-Identifier: Apache-2.0
"""Ragged caches with poison around every token, and what attention over them is: the formula, in float64."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

import tolerance

# Packed codes are exact numbers, so the limits are those of the arithmetic alone.
LIMIT = {
    torch.float32: 2e-6,
    torch.float16: tolerance.HALF[torch.float16],
    torch.bfloat16: tolerance.HALF[torch.bfloat16],
}


def int4(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and the numbers that they stand for, float64."""
    scale = (x.float().abs().amax(-1) / 7).bfloat16()
    scale = torch.where(scale == 0, 1.0, scale)
    code = (x.float() / scale.float()[..., None]).round().clamp(-7, 7).long()
    low, high = (code + 8).chunk(2, -1)
    return (low + 16 * high).to(torch.uint8), scale, code.double() * scale.double()[..., None]


def fp8(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = (x.float().abs().amax(-1) / 448).bfloat16()
    scale = torch.where(scale == 0, 1.0, scale)
    code = (x.float() / scale.float()[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return code, scale, code.double() * scale.double()[..., None]


@dataclass
class Case:
    """Arguments of the kernel in ``given``, and the tokens that they stand for: per row and head ``[N, d]`` float64."""

    q: Tensor
    scale: float
    given: dict[str, object]
    keys: list[list[Tensor]] = field(default_factory=list)
    values: list[list[Tensor]] = field(default_factory=list)

    def truth(self) -> tuple[Tensor, Tensor]:
        batch, heads, dim = self.q.shape
        group = heads // len(self.keys[0])
        out = torch.zeros(batch, heads, dim, dtype=torch.float64)
        lse = torch.full((batch, heads), -torch.inf, dtype=torch.float64)
        for b in range(batch):
            for h in range(heads):
                k, v = self.keys[b][h // group], self.values[b][h // group]
                if len(k):
                    x = k @ self.q[b, h].double().cpu() * self.scale
                    lse[b, h] = x.logsumexp(0)
                    out[b, h] = (x - lse[b, h]).exp() @ v
        return out, lse

    def but(self, **changes: object) -> "Case":
        return replace(self, given={**self.given, **changes})


def build(
    codec: str,
    dtype: torch.dtype,
    lengths: list[list[int]],
    *,
    group: int = 2,
    dim: int = 64,
    recent: list[int] | None = None,
    width: int = 12,
    device: str = "cpu",
    spread: float = 1.0,
    capacity: int | None = None,
) -> Case:
    """Rows of ``lengths[b][h]`` tokens, each head's amid poisoned rows, heads in no particular order in the planes."""
    batch, kv_heads = len(lengths), len(lengths[0])
    q = torch.randn(batch, kv_heads * group, dim).to(dtype)
    gap = 3
    total = sum(map(sum, lengths)) + gap * (batch * kv_heads + 1)
    formats = ("fp8", "int4") if codec == "k8v4" else (codec, codec)
    poison = {"plain": torch.nan, "int4": 255, "fp8": torch.nan}
    kinds = {"plain": (dtype, dim), "int4": (torch.uint8, dim // 2), "fp8": (torch.float8_e4m3fn, dim)}
    planes = [torch.full((total, kinds[f][1]), poison[f], dtype=torch.float32).to(kinds[f][0]) for f in formats]
    scales = [torch.full((total,), torch.nan, dtype=torch.bfloat16) for _ in "kv"]
    offsets = torch.zeros(batch, kv_heads, dtype=torch.int64)
    told: list[list[list[Tensor]]] = [[], []]
    start = gap
    for b in reversed(range(batch)):
        for tokens in told:
            tokens.insert(0, [])
        for h in range(kv_heads):
            offsets[b, h] = start
            for form, plane, scale, tokens in zip(formats, planes, scales, told, strict=True):
                x = (torch.randn(lengths[b][h], dim) * spread).to(dtype)
                at = slice(start, start + lengths[b][h])
                if form == "plain":
                    plane[at], real = x, x.double()
                else:
                    plane[at], scale[at], real = {"int4": int4, "fp8": fp8}[form](x)
                tokens[0].append(real)
            start += lengths[b][h] + gap
    given: dict[str, object] = {
        "k": planes[0],
        "v": planes[1],
        "offsets": offsets,
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "scale": dim**-0.5,
        "capacity": max(map(max, lengths)) if capacity is None else capacity,
    }
    if codec != "plain":
        given |= {"k_scale": scales[0], "v_scale": scales[1]}
    if recent is not None:
        given["recent_length"] = torch.tensor(recent if len(recent) > 1 else recent[0], dtype=torch.int32)
        for name, tokens in zip(("recent_k", "recent_v"), told, strict=True):
            ring = torch.full((batch, kv_heads, width, dim), torch.nan, dtype=dtype)
            for b in range(batch):
                new = recent[b % len(recent)]
                ring[b, :, :new] = torch.randn(kv_heads, new, dim).to(dtype)
                for h in range(kv_heads):
                    tokens[b][h] = torch.cat([tokens[b][h], ring[b, h, :new].double()])
            given[name] = ring
    moved = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}
    return Case(q.to(device), dim**-0.5, moved, *told)


def poisoned(call: object, *args: object, **kwargs: object) -> object:
    """Call with every tensor that torch hands out uninitialised filled with NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return call(*args, **kwargs)  # type: ignore[operator]
    finally:
        torch.use_deterministic_algorithms(False)


def errors(case: Case) -> tuple[float, float]:
    """Relative errors of output and log-sum-exp of the kernel."""
    from manyheads.kernels.decode import decode_attention

    out, lse = poisoned(decode_attention, case.q, **case.given)
    assert out.dtype == case.q.dtype and lse.dtype == torch.float32
    want = case.truth()
    return tolerance.error(out.cpu(), want[0]), tolerance.error(lse.cpu(), want[1])


def agrees(case: Case) -> bool:
    return max(errors(case)) <= LIMIT[case.q.dtype]


def mass_truth(q: Tensor, k: Tensor, scale: float, anchor: int = 0) -> tuple[Tensor, Tensor]:
    """Column sums ``[B, Hkv, S]`` and log-sum-exp ``[B, H, T]`` in float64; ``anchor`` moves the diagonal."""
    (_, heads, length, _), (_, kv_heads, size, _) = q.shape, k.shape
    keys = k.double().repeat_interleave(heads // kv_heads, 1)
    x = torch.einsum("bhtd,bhsd->bhts", q.double(), keys) * scale
    t, s = torch.arange(length)[:, None], torch.arange(size)[None, :]
    x = x.cpu().masked_fill(s > t + size - length + anchor, -torch.inf)
    lse = x.logsumexp(-1)
    return (x - lse[..., None]).exp().nan_to_num().sum(2).unflatten(1, (kv_heads, -1)).sum(2), lse
