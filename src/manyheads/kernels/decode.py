# SPDX-License-Identifier: Apache-2.0
"""Attention of one query per row over a ragged, possibly packed cache, at the speed at which the cache can be read.

Every (row, key/value head), a pair, holds its own number of tokens in flat planes. The tokens of all pairs are shared
out among as many programs as the device runs at once, to each an equal share of one pair's, so that a long one gets
more of them (split-K, as in Flash-Decoding; the running softmax is that of FlashAttention, arXiv 2205.14135); each
writes a normalised partial output and its log-sum-exp, and a second kernel merges them by these. Every program finds
its share from the lengths on the device, so that neither lengths nor positions ever reach the host and a captured graph
serves every length up to ``capacity``.

Packed codes go to the tensor cores without a shuffle, those of keys and of values each in their format. INT4 and FP8
rows are read as 16-bit elements, each of which holds 4 or 2 channels; piece i of a row is the i-th channel of every
element. One matrix fragment of elements is then, shifted and masked, the fragment of each piece: q·k is the sum over
pieces of q_piece·k_piece, and the output comes out in pieces too. Codes become numbers by integer operations on two at
a time; the scale of a token multiplies its logit and its probability, never its channels.

Legend: B rows, H query heads, Hkv key/value heads, G = H / Hkv, d head dimension, P tokens in the planes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ._decode import combine, partial
from ._operator import LOG2E, launch, operator

__all__ = ["decode_attention"]

_MOST_PAIRS = 1024  # whose lengths each program looks at; of more, each is read by one program
_PARTS = 64  # that the second kernel merges at a time


class _Config(NamedTuple):
    """How a plane is read.

    Attributes:
        block: tokens per step.
        warps: of a program.
        stages: depth of the loop's pipeline.
        programs: aimed at per multiprocessor.
    """

    block: int
    warps: int
    stages: int
    programs: int


# Measured on an H100, groups of 4. Fixed, so that no first call spends its time on tuning. FP8 keys beside INT4 values
# are read as beside FP8 ones, which was not measured.
_CONFIGS = {
    ("plain", 32): _Config(128, 4, 3, 2),
    ("plain", 64): _Config(64, 4, 3, 2),
    ("plain", 128): _Config(64, 4, 3, 2),
    ("plain", 256): _Config(32, 4, 3, 2),
    ("int4", 32): _Config(64, 1, 3, 6),
    ("int4", 64): _Config(32, 1, 3, 6),
    ("int4", 128): _Config(128, 4, 3, 3),
    ("int4", 256): _Config(64, 8, 3, 2),
    ("fp8", 32): _Config(128, 2, 3, 4),
    ("fp8", 64): _Config(128, 4, 3, 3),
    ("fp8", 128): _Config(64, 2, 3, 4),
    ("fp8", 256): _Config(64, 8, 3, 2),
}
_FLOAT32 = _Config(32, 4, 2, 2)


class _Format(NamedTuple):
    """How a plane of keys or values is read: as elements of dtype ``view``, each of ``pieces`` channels."""

    codec: str
    pieces: int
    view: torch.dtype


def _format(plane: Tensor, dim: int) -> _Format:
    if plane.dtype == torch.uint8:  # 32 channels make 8 elements of 16 bits, too few for the tensor cores
        return _Format("int4", 4, torch.int16) if dim >= 64 else _Format("int4", 2, torch.int8)
    if plane.dtype == torch.float8_e4m3fn:
        return _Format("fp8", 2, torch.int16)
    return _Format("plain", 1, plane.dtype)


def _programs(pairs: int, capacity: int, config: _Config, processors: int) -> int:
    """Programs that share the tokens of all pairs, so that the grid fills the device once; 0 for one each."""
    if capacity <= config.block or pairs > _MOST_PAIRS:
        return 0
    return max(processors * config.programs, 2 * pairs)


@operator("decode_attention")
def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    recent_k: Tensor | None,
    recent_v: Tensor | None,
    recent_length: Tensor | None,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    batch, heads, dim = q.shape
    kv_heads = offsets.shape[1]
    group, pairs = heads // kv_heads, batch * kv_heads
    out, lse = torch.empty_like(q), q.new_empty(batch, heads, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    keys, values = _format(k, dim), _format(v, dim)
    wide = q.element_size() == 4
    config = _FLOAT32 if wide else _CONFIGS[keys.codec, dim]
    nvidia = q.is_cuda and torch.version.hip is None
    pdl = nvidia and torch.cuda.get_device_capability(q.device) >= (9, 0)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 8
    programs = _programs(pairs, capacity, config, processors)
    recent = recent_k is not None
    room = 0 if not programs else 32 if pairs <= 32 else _MOST_PAIRS
    programs = programs or pairs
    last = not recent and room == 0
    parts = programs + recent * pairs
    part = out if last else q.new_empty(parts * group * dim, dtype=torch.float32)
    part_lse = lse if last else q.new_empty(parts * group, dtype=torch.float32)
    options: dict[str, Any] = {"launch_pdl": True} if pdl else {}
    launch(
        partial, (parts,),
        q, k.view(keys.view), v.view(values.view),
        q if k_scale is None else k_scale.contiguous(), q if v_scale is None else v_scale.contiguous(),
        q if recent_k is None else recent_k, q if recent_v is None else recent_v,
        lengths if recent_length is None else recent_length, offsets, lengths, part, part_lse,
        scale * LOG2E, programs, pairs, 0 if recent_k is None else recent_k.shape[2],
        0 if recent_length is None or recent_length.dim() == 0 else recent_length.stride(0),
        LENGTHS=room, HEADS=kv_heads, G=group, ROWS=16 if group <= 16 else 32, D=dim, BLOCK=config.block,
        STAGES=config.stages,
        K_PIECES=keys.pieces, K_CODEC=keys.codec, K_ASM=nvidia and not wide and keys.view == torch.int16,
        V_PIECES=values.pieces, V_CODEC=values.codec, V_ASM=nvidia and not wide and values.view == torch.int16,
        RECENT=recent, LAST=last, PDL=pdl,
        RECENT_BLOCK=min(config.block, 64 if dim <= 128 else 32),
        num_warps=config.warps, **options,
    )  # fmt: skip
    if not last:
        width = min(dim, 32)
        launch(
            combine, (batch * heads, dim // width),
            part, part_lse, lengths, out, lse, programs, pairs,
            LENGTHS=room, LEAST=config.block, G=group, D=dim, WIDTH=width, PARTS=_PARTS,
            RECENT=recent, PDL=pdl, num_warps=1, **options,
        )  # fmt: skip
    return out, lse


@_decode.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    recent_k: Tensor | None = None,
    recent_v: Tensor | None = None,
    recent_length: Tensor | None = None,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """Attention of one query per row over the tokens its key/value heads hold. No gradient, no wait for the device.

    Args:
        q: queries ``[B, H, d]``, bfloat16, float16 or float32; d is 32, 64, 128 or 256, G at most 32.
        k, v: planes ``[P, d]`` in q's dtype, or both of codes: uint8 ``[P, d / 2]`` (INT4) or float8_e4m3fn ``[P, d]``,
            each of its own kind.
        offsets: ``[B, Hkv]`` int64, the first row of a head in the planes.
        lengths: ``[B, Hkv]`` int32, how many rows it holds. What lies in other rows is not read.
        scale: factor on ``q k^T``.
        k_scale, v_scale: scale of each row of codes, ``[P]`` bfloat16.
        recent_k, recent_v: more tokens, ``[B, Hkv, W, d]`` in q's dtype.
        recent_length: how many of the W hold a token (the first ones), int32, ``[B]`` or a scalar.
        capacity: no length is above it. It sets the grid; a captured graph serves every length up to it.

    Returns:
        Output ``[B, H, d]`` in q's dtype and log-sum-exp ``[B, H]`` float32; 0 and -inf where there is no token.
    """
    _check(q, k, v, offsets, lengths, k_scale, v_scale, recent_k, recent_v, recent_length)
    if recent_k is not None and recent_v is not None:
        recent_k, recent_v = recent_k.contiguous(), recent_v.contiguous()
    out: tuple[Tensor, Tensor] = _decode(
        q.contiguous(), k, v, offsets.contiguous(), lengths.contiguous(), scale,
        k_scale, v_scale, recent_k, recent_v, recent_length, capacity,
    )  # fmt: skip
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    lengths: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    recent_k: Tensor | None,
    recent_v: Tensor | None,
    recent_length: Tensor | None,
) -> None:
    """Refuse what the kernel would read wrongly."""
    (batch, heads, dim), kv_heads = q.shape, offsets.shape[-1]
    packed = [x.dtype in (torch.uint8, torch.float8_e4m3fn) for x in (k, v)]
    rows = [(k.shape[0], dim // 2 if x.dtype == torch.uint8 else dim) for x in (k, v)]
    alike = all(packed) or k.dtype == v.dtype == q.dtype
    table = offsets.shape == lengths.shape == (batch, kv_heads)
    recent = [x is not None for x in (recent_k, recent_v, recent_length)]
    right = {
        f"d is 32, 64, 128 or 256, not {dim}": dim in (32, 64, 128, 256),
        f"{heads} heads share {kv_heads}, at most 32 each": heads % kv_heads == 0 and heads <= 32 * kv_heads,
        f"planes {k.dtype}, {v.dtype}; queries {q.dtype}": alike,
        f"planes {tuple(k.shape)}, {tuple(v.shape)}, not {rows}": [k.shape, v.shape] == rows,
        "planes are contiguous": k.is_contiguous() and v.is_contiguous(),
        "offsets and lengths are [B, Hkv]": table,
        "offsets are int64, lengths int32": offsets.dtype == torch.int64 and lengths.dtype == torch.int32,
        "codes, and only they, have scales": (k_scale is not None) == (v_scale is not None) == packed[0],
        "recent_k, recent_v and recent_length come together": all(recent) or not any(recent),
    }
    for rule, kept in right.items():
        if not kept:
            raise UserError(f"decode_attention: {rule}")
