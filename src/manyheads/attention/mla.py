# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (MLA): the schedules that compute it, and what each of them costs on given hardware.

A cached token is a latent ``c`` (r channels) and one rotary key ``k_rope`` (dr channels), shared by H heads. Head h has
keys ``[W_UK,h c ; k_rope]`` and values ``W_UV,h c``. Four schedules give the same output (Geens and Verhelst,
"Hardware-Centric Analysis of DeepSeek's Multi-Head Latent Attention", arXiv 2506.02523):

- ``expand``: make keys and values of all S tokens, then attend as usual: 2 S r H (dn + dv) FLOPs for that alone.
- ``absorb``: ``q' = W_UK,h^T q_h`` once per query, then every head attends to the latents themselves.
- ``reuse``: like absorb, with ``W_UQ,h^T W_UK,h`` made once and read at every step: it acts on the query latent.
- ``recompute``: like reuse, but that product is formed anew at every step, so that only the small factors are read
  (if it stays on the chip). It pays where bytes are dear; absorb reads as little and computes less wherever
  dn (rq + r) < rq r, as in DeepSeek-V3.

The paper merges ``W_O,h W_UV,h`` likewise; here ``W_UV`` is applied after attention in all schedules but ``expand``
(merged, it would hold H r D values: 470 million for DeepSeek-V3).

Legend: B batch, H heads, T queries, S tokens held, r latent channels, dn / dr channels of a key without / with rotary
positions, dv channels of a value, rq channels of a query latent. Cost counts a multiplication with addition as 2 FLOPs,
matrix products only, and every byte that a stage reads or writes once.
"""

import re
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import exp, inf, log
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UserError

__all__ = [
    "PLATFORMS", "Dims", "Platform", "Schedule", "Stage", "absorb", "choose", "crossover", "energy", "expand",
    "heads_cost", "keys_values", "latent_attention", "merge", "mla", "mla_cost", "platform_of", "seconds",
]  # fmt: skip

Schedule = Literal["expand", "absorb", "reuse", "recompute"]
_BLOCK = 1 << 26  # logits held at once, in elements


@dataclass(frozen=True, slots=True)
class Dims:
    """Sizes of one MLA layer; ``q_rank`` is 0 where queries come projected."""

    num_heads: int
    rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_rank: int = 0


def keys_values(cache: Tensor, up: Tensor, dims: Dims) -> tuple[Tensor, Tensor]:
    """Keys ``[B, H, S, dn + dr]`` and values ``[B, H, S, dv]`` of all heads.

    Args:
        cache: ``[B, 1, S, r + dr]``, latents first.
        up: ``[H, dn + dv, r]``, per head ``W_UK`` then ``W_UV``.
        dims: of the layer.
    """
    latents, rope = cache.split([dims.rank, dims.rope_dim], -1)
    both = functional.linear(latents[:, 0], up.flatten(0, 1)).unflatten(-1, up.shape[:2]).transpose(1, 2)
    nope, v = both.split([dims.nope_dim, dims.v_dim], -1)
    k = both.new_empty(*nope.shape[:3], dims.nope_dim + dims.rope_dim)  # on a GPU torch.cat is slower than two copies
    k[..., : dims.nope_dim], k[..., dims.nope_dim :] = nope, rope
    return k, v


def expand(q: Tensor, cache: Tensor, up: Tensor, dims: Dims, *, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attention over expanded keys and values: q ``[B, H, T, dn + dr]`` -> ``[B, T, H, dv]``."""
    k, v = keys_values(cache, up, dims)
    return functional.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)


def absorb(
    q: Tensor, cache: Tensor, up: Tensor, dims: Dims, *, scale: float, mask: Tensor | None = None,
    bias: Tensor | None = None, seen: int | None = None,
) -> Tensor:  # fmt: skip
    """Attention in latent space: q ``[B, H, T, dn + dr]`` -> ``[B, T, H, dv]``; for the rest see latent_attention."""
    nope, rope = q.split([dims.nope_dim, dims.rope_dim], -1)
    rows = torch.cat([_per_head(nope, up[:, : dims.nope_dim], scale), rope * scale], -1)
    return latent_attention(rows, cache, up[:, dims.nope_dim :], mask, bias, seen)


def merge(uq: Tensor, up: Tensor, dims: Dims) -> Tensor:
    """``W_UQ,h^T W_UK,h``, ``[H, rq, r]``, of ``uq [H, dn, rq]``."""
    return uq.transpose(1, 2) @ up[:, : dims.nope_dim]


def mla(
    schedule: Schedule, c_q: Tensor, q_rope: Tensor, cache: Tensor, uq: Tensor, up: Tensor, dims: Dims, *,
    scale: float, mask: Tensor | None = None, merged: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """MLA of query latents under a schedule, ``[B, T, H, dv]``.

    Args:
        schedule: how; the result is the same.
        c_q: query latents ``[B, T, rq]``.
        q_rope: rotated part of the queries ``[B, H, T, dr]``.
        cache: ``[B, 1, S, r + dr]``.
        uq: query up-projection without rotary part, ``[H, dn, rq]``.
        up: ``[H, dn + dv, r]``, per head ``W_UK`` then ``W_UV``.
        dims: of the layer.
        scale: factor on the logits.
        mask: boolean, broadcastable to ``[B, H, T, S]``.
        merged: what :func:`merge` gave, for ``reuse``.
    """
    if schedule in ("expand", "absorb"):
        nope = functional.linear(c_q, uq.flatten(0, 1)).unflatten(-1, uq.shape[:2]).transpose(1, 2)
        q, way = torch.cat([nope, q_rope], -1), expand if schedule == "expand" else absorb
        return way(q, cache, up, dims, scale=scale, mask=mask)
    if schedule == "recompute" or merged is None:
        merged = merge(uq, up, dims)
    latent = (c_q.flatten(0, 1) @ merged).unflatten(1, c_q.shape[:2]).transpose(0, 1)
    rows = torch.cat([latent, q_rope], -1) * scale
    return latent_attention(rows, cache, up[:, dims.nope_dim :], mask)


def latent_attention(
    q: Tensor, cache: Tensor, uv: Tensor, mask: Tensor | None = None, bias: Tensor | None = None,
    seen: int | None = None,
) -> Tensor:  # fmt: skip
    """H heads attend to one set of latents; rows that may attend to nothing give 0.

    With one key head the queries of all heads are rows of one matrix product per batch row, so every latent is read
    once for 128 heads: that is where MLA gets its arithmetic intensity. Logits and softmax are float32 or better; at
    most 2^26 logits are held at once.

    Args:
        q: absorbed queries ``[B, H, T, r + dr]``, scale included.
        cache: ``[B, 1, N, r + dr]``.
        uv: value up-projection ``[H, dv, r]``.
        mask, bias: broadcastable to ``[B, H, T, S]``.
        seen: S, the tokens that count, all N if not given; what follows them must be finite. Rows of N logits are read
            by a GPU twice as fast where they begin at multiples of 16 bytes.

    Returns:
        ``[B, T, H, dv]``.
    """
    batch, heads, new, _ = q.shape
    held = cache[:, 0]
    seen = held.shape[1] if seen is None else seen
    block = max(1, _BLOCK // (batch * heads * held.shape[1]))
    outputs = []
    for t in range(0, new, block):
        cut = slice(t, t + block)
        x = _logits(q[:, :, cut].flatten(1, 2), held).unflatten(1, (heads, -1))
        x[..., seen:] = -torch.inf
        if bias is not None:
            x[..., :seen] += bias[:, :, cut] if bias.shape[2] > 1 else bias
        here = None if mask is None else mask[:, :, cut] if mask.shape[2] > 1 else mask
        if here is not None:
            x[..., :seen].masked_fill_(~here, torch.finfo(x.dtype).min)
        weights = x.softmax(-1).to(held.dtype).flatten(1, 2)
        mixed = (weights @ held[..., : uv.shape[2]]).unflatten(1, (heads, -1))
        outputs.append(mixed if here is None else mixed * here.any(-1, keepdim=True))
    mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    return _per_head(mixed, uv.transpose(1, 2)).transpose(1, 2)


def _per_head(x: Tensor, weights: Tensor, factor: float = 1.0) -> Tensor:
    """``factor`` times ``x [B, H, T, m]`` times ``weights [H, m, n]`` -> ``[B, H, T, n]``, one product per head."""
    rows = x.transpose(0, 1).flatten(1, 2)
    made = torch.baddbmm(rows.new_empty(1, 1, 1), rows, weights, beta=0, alpha=factor)
    per_head: Tensor = made.unflatten(1, (x.shape[0], -1))
    return per_head.transpose(0, 1)


def _logits(q: Tensor, k: Tensor) -> Tensor:
    """``q k^T`` of ``[B, R, d]`` and ``[B, N, d]``, in float32 where they are of half precision."""
    if q.element_size() >= 4:
        return q @ k.transpose(1, 2)
    if q.is_cuda and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        return torch.bmm(q, k.transpose(1, 2), out_dtype=torch.float32)
    return q.float() @ k.float().transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Platform:
    """Hardware as the roofline model sees it.

    Attributes:
        peak_flops: FLOP/s of matrix products in the dtype at hand.
        bandwidth: bytes/s of main memory.
        overhead: seconds that a stage takes beside its work (launching it).
        fused_heads: whether torch's attention keeps logits on the chip where keys are wider than values. On CUDA it
            does, on a CPU it does not.
        flop_energy, byte_energy: joules per FLOP and per byte moved, None where unknown.
        link: bytes/s from the host's memory; infinite where all memory is the host's.
        rates: in place of ``bandwidth``, by the bytes that an operation moves, ascending: those, bytes/s to memory that
            is in use already, and to memory that is new. Small ones stay in caches; new pages cost a CPU much.
    """

    peak_flops: float
    bandwidth: float
    overhead: float = 0.0
    fused_heads: bool = True
    flop_energy: float | None = None
    byte_energy: float | None = None
    link: float = inf
    rates: tuple[tuple[float, float, float], ...] = ()

    def rate(self, moved: float, fresh: bool = False) -> float:
        """Bytes/s of an operation that moves so many bytes, in logarithms between two sizes that were measured."""
        if not self.rates:
            return self.bandwidth
        found = [entry[2 if fresh else 1] for entry in self.rates]
        sizes = [entry[0] for entry in self.rates]
        at = min(max(bisect(sizes, moved), 1), len(sizes) - 1)
        share = log(max(moved, 1.0) / sizes[at - 1]) / log(sizes[at] / sizes[at - 1])
        low, high = log(found[at - 1]), log(found[at])
        return exp(low + (high - low) * min(max(share, 0.0), 1.0))


# Data sheets, dense: FLOP/s at 16 bits and at 32 (without TF32), bytes/s. A device is the first whose words are all in
# its name. None gives joules per FLOP or byte.
PLATFORMS: dict[str, tuple[float, float, float]] = {
    "H200": (989e12, 67e12, 4.8e12),
    "H100 PCIe": (756e12, 51e12, 2.0e12),
    "H100": (989e12, 67e12, 3.35e12),
    "A100 40GB": (312e12, 19.5e12, 1.555e12),
    "A100": (312e12, 19.5e12, 2.04e12),
    "L40S": (362e12, 91.6e12, 864e9),
    "L4": (121e12, 30.3e12, 300e9),
    "A10": (125e12, 31.2e12, 600e9),
    "RTX 4090": (165e12, 82.6e12, 1.008e12),
    "cpu": (2e11, 2e11, 2e10),
}


@lru_cache(maxsize=64)
def platform_of(name: str, itemsize: int = 2) -> Platform:
    """The platform of :data:`PLATFORMS` that a device's ``name`` says it is.

    Raises:
        UserError: none of them is.
    """
    words = set(re.split(r"[\s-]+", name)) if "Laptop" not in name else set()  # same name, other chip
    key = next((key for key in PLATFORMS if words >= set(key.split())), None)
    if key is None:
        raise UserError(
            f"the speed of {name!r} is not known (known are {', '.join(PLATFORMS)}): give peak_tflops and bandwidth_gbs"
        )
    half, full, bandwidth = PLATFORMS[key]
    overhead, fused = (5e-6, False) if key == "cpu" else (3e-6, True)
    return Platform(half if itemsize < 4 else full, bandwidth, overhead, fused)


@dataclass(frozen=True, slots=True)
class Stage:
    """A piece of work between whose parts nothing goes through main memory.

    Attributes:
        name: what it is.
        flops, bytes: computed, and moved through main memory.
        launches: operations that it is launched as; a mean over layers may be a part of one.
        host: bytes that come from the host's memory.
        fresh: whether results go to memory that is new.
    """

    name: str
    flops: float
    bytes: float
    launches: float = 1
    host: float = 0
    fresh: bool = False

    def seconds(self, platform: Platform) -> float:
        """The longest of computing, moving and fetching, and the launches."""
        rate = platform.rate(self.bytes / max(1, self.launches), self.fresh)
        longest = max(self.flops / platform.peak_flops, self.bytes / rate, self.host / platform.link)
        return longest + self.launches * platform.overhead

    @property
    def intensity(self) -> float:
        """FLOPs per byte; above ``peak_flops / bandwidth`` a platform is bound by computing."""
        return self.flops / self.bytes


def seconds(stages: Sequence[Stage], platform: Platform) -> float:
    """Predicted time of stages that run one after another."""
    return sum(stage.seconds(platform) for stage in stages)


def energy(stages: Sequence[Stage], platform: Platform) -> float:
    """Predicted joules: FLOPs and bytes, each times its price.

    Raises:
        UserError: the platform has no prices; those of :data:`PLATFORMS` have none, as their makers publish none.
    """
    if platform.flop_energy is None or platform.byte_energy is None:
        raise UserError(
            "the energy of this platform is not known: give Platform its flop_energy and byte_energy, in joules"
        )
    return sum(stage.flops * platform.flop_energy + stage.bytes * platform.byte_energy for stage in stages)


def _product(name: str, batch: int, m: int, k: int, n: int, itemsize: int, shared: int = 1, out: int = 0) -> Stage:
    """``batch`` products ``[m, k] [k, n]``, the right factor common to ``shared`` of them; ``out`` bytes per result."""
    moved = itemsize * (batch * m * k + batch // shared * k * n) + (out or itemsize) * batch * m * n
    return Stage(name, 2 * batch * m * k * n, moved)


def heads_cost(
    batch: int, q_len: int, seq_len: int, num_heads: int, num_kv_heads: int, k_dim: int, v_dim: int, itemsize: int = 2,
    fused: bool = True,
) -> tuple[Stage, ...]:  # fmt: skip
    """Attention with its own keys and values per head (MHA), per group (GQA) or for all (MQA)."""
    if fused:
        rows, held = batch * num_heads * q_len, batch * num_kv_heads * seq_len
        flops = 2 * rows * seq_len * (k_dim + v_dim)
        return (Stage("attention", flops, itemsize * (rows + held) * (k_dim + v_dim)),)
    each, shared = batch * num_heads, num_heads // num_kv_heads
    logits = _product("logits", each, q_len, k_dim, seq_len, itemsize, shared, max(itemsize, 4))
    mix = _product("mix", each, q_len, seq_len, v_dim, itemsize, shared)
    return logits, _softmax(each * q_len * seq_len, itemsize), mix


def _softmax(count: int, itemsize: int) -> Stage:
    """Logits, of 4 bytes at least, are read and weights written; narrower weights are made in a pass of their own."""
    wide = max(itemsize, 4)
    return Stage("softmax", 0, count * (2 * wide + (0 if itemsize == wide else wide + itemsize)))


def mla_cost(
    schedule: Schedule, dims: Dims, batch: int, q_len: int, seq_len: int, itemsize: int = 2, fused: bool = False,
    fused_heads: bool = True,
) -> tuple[Stage, ...]:  # fmt: skip
    """The stages of a schedule as :func:`mla` runs them, or with ``q_rank`` 0 as :func:`expand` and :func:`absorb` do.

    Args:
        schedule: ``reuse`` and ``recompute`` need a ``q_rank``.
        dims: of the layer.
        batch, q_len, seq_len: rows, queries per row, tokens held per row (the queries' own among them).
        itemsize: bytes per element of weights, activations and cache; logits have 4 at least.
        fused: whether making the absorbed query is one stage, and attention in latent space another, so that neither
            parts nor logits leave the chip. In :func:`mla` they do.
        fused_heads: likewise for the logits over expanded keys, as in :class:`Platform`.
    """
    h, r, dn, dr, dv, rq = dims.num_heads, dims.rank, dims.nope_dim, dims.rope_dim, dims.v_dim, dims.q_rank
    if schedule in ("reuse", "recompute") and not rq:
        raise ValueError(f"{schedule} acts on query latents: give dims with a q_rank")
    tokens = batch * q_len
    queries = _product("queries", 1, tokens, rq, h * dn, itemsize)
    if schedule == "expand":
        made = batch * seq_len * h
        stages = [queries] if rq else []
        stages.append(_product("keys, values", 1, batch * seq_len, r, h * (dn + dv), itemsize))
        stages.append(Stage("join keys", 0, itemsize * (made * (2 * dn + dr) + batch * seq_len * dr)))
        return (*stages, *heads_cost(batch, q_len, seq_len, h, h, dn + dr, dv, itemsize, fused_heads))
    inner = dn if schedule == "absorb" else rq
    stages, between = [_product("absorb", h, tokens, inner, r, itemsize)], 0
    if schedule == "absorb" and rq:
        stages, between = [queries, *stages], h * tokens * dn
    elif schedule != "absorb":  # all heads read the same query latents
        stages[0] = replace(stages[0], bytes=stages[0].bytes - itemsize * (h - 1) * tokens * rq)
    if schedule == "recompute":
        stages, between = [_product("merge", h, rq, dn, r, itemsize), *stages], h * rq * r
    if fused:  # what lies between is neither written nor read
        moved = sum(stage.bytes for stage in stages) - 2 * itemsize * between
        stages = [Stage("absorb", sum(stage.flops for stage in stages), moved)]
    logits = _product("logits", batch, h * q_len, r + dr, seq_len, itemsize, out=max(itemsize, 4))
    mix = _product("mix", batch, h * q_len, seq_len, r, itemsize)
    if fused:
        moved = itemsize * (h * tokens * (2 * r + dr) + batch * seq_len * (r + dr))
        stages.append(Stage("attention", logits.flops + mix.flops, moved))
    else:
        stages += [logits, _softmax(h * tokens * seq_len, itemsize), mix]
    return (*stages, _product("values", h, tokens, r, dv, itemsize))


@lru_cache(maxsize=4096)
def choose(
    dims: Dims, batch: int, q_len: int, seq_len: int, platform: Platform, itemsize: int = 2, fused: bool = False,
    among: tuple[Schedule, ...] = ("absorb", "expand"),
) -> Schedule:  # fmt: skip
    """The schedule with the least predicted time; the first of equals."""

    def predicted(way: Schedule) -> float:
        stages = mla_cost(way, dims, batch, q_len, seq_len, itemsize, fused, platform.fused_heads)
        return seconds(stages, platform)

    return min(among, key=predicted)


def crossover(dims: Dims, seq_len: float = inf) -> float:
    """Queries per row above which ``expand`` needs fewer FLOPs than ``absorb``; infinite where it never does.

    r (dn + dv) / (2 r - dn - dv) for long sequences: 170.7 for DeepSeek-V3.
    """
    pair = dims.nope_dim + dims.v_dim
    gap = 2 * dims.rank - pair + (dims.rank * pair / seq_len)
    return dims.rank * pair / gap if gap > 0 else inf
