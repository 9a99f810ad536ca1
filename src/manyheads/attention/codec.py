# SPDX-License-Identifier: Apache-2.0
"""Compact storage of key and value vectors: one scale per vector, a few bits per channel.

A vector of d channels becomes ``codes`` and one ``scale``, and is read back as ``codes * scale``. The scale is rounded
to bfloat16 first and the codes are made with the rounded scale, so that nothing is lost between the two; the product of
code and scale is exact in float32. Symmetric: no offset, zero stays zero. A vector that holds NaN or infinity is read
back without a finite number in it. Vectors do not see each other: what fills padding reaches nothing else.

Every function is plain tensor code without a branch on data: it compiles and waits for no device.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["FP8", "INT4", "Codec", "Fp8", "Int4", "KVCodec", "kv_codec", "pack", "unpack"]


class Codec(Protocol):
    """How vectors ``[..., d]`` are stored.

    Attributes:
        name: as a user writes it.
    """

    name: ClassVar[str]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x [..., d]`` of any float dtype -> codes ``[..., w]`` and scale ``[...]`` bfloat16."""
        ...

    def numbers(self, codes: Tensor) -> Tensor:
        """Codes ``[..., w]`` as numbers ``[..., d]`` float32, which times the scale are the vectors."""
        ...

    def decode(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes ``[..., w]`` and scale ``[...]`` -> ``[..., d]`` in ``dtype``."""
        ...


def _scale(x: Tensor, top: float) -> Tensor:
    """Scale ``[...]`` bfloat16 that takes the largest magnitude of ``x [..., d]`` float32 to ``top``; 1 for zeros."""
    scale = x.abs().amax(-1) / top
    scale = (_rounded(scale) if torch.compiler.is_compiling() else scale).bfloat16()
    return torch.where(scale == 0, 1.0, scale)  # also where the quotient is too small for bfloat16


def _rounded(x: Tensor) -> Tensor:
    """Numbers ``x >= 0`` float32 rounded to what bfloat16 holds, by their bits.

    A cast there and back would do, but a compiler that fuses it with what comes after leaves it out.
    """
    bits = x.view(torch.int32)
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF
    return torch.where(x.isfinite(), even.view(torch.float32), x)


def pack(codes: Tensor) -> Tensor:
    """Nibbles 0..15 ``uint8 [..., d]`` -> ``uint8 [..., d / 2]``: channel j low, channel j + d / 2 high in byte j."""
    if codes.shape[-1] % 2:
        raise UserError(f"two channels share a byte: {codes.shape[-1]} channels are odd; use codec=fp8")
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of :func:`pack`: ``uint8 [..., d / 2]`` -> nibbles ``uint8 [..., d]``."""
    return torch.cat([packed & 15, packed >> 4], -1)


@dataclass(frozen=True, slots=True)
class Int4:
    """Symmetric 4 bits: codes -7..7, ``scale = max |x| / 7``, ``|x - decoded| <= scale / 2``; d / 2 bytes a vector.

    A nibble holds code + 8; 0, the code -8, is never written, and read as -8.
    """

    name: ClassVar[str] = "int4"

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        scale = _scale(x, 7.0)
        codes = (x / scale[..., None].float()).round().clamp(-7, 7)
        return pack((codes + 8).to(torch.uint8)), scale

    def numbers(self, codes: Tensor) -> Tensor:
        return unpack(codes).float() - 8

    def decode(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.numbers(codes) * scale[..., None].float()).to(dtype)


_EVERY_FP8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


@dataclass(frozen=True, slots=True)
class Fp8:
    """8-bit floats of 3 mantissa bits (e4m3, largest 448), ``scale = max |x| / 448``; d bytes a vector.

    The error is at most 1/16 of the value, or ``scale / 1024`` where that is more (subnormal codes).
    """

    name: ClassVar[str] = "fp8"

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.float()
        scale = _scale(x, 448.0)
        # Clamped: the rounded scale may put the largest value a little past 448.
        return (x / scale[..., None].float()).clamp(-448, 448).to(torch.float8_e4m3fn), scale

    def numbers(self, codes: Tensor) -> Tensor:
        if codes.device.type != "cpu":
            return codes.float()
        # A CPU casts these one by one; looking them up takes a seventh of the time.
        return _EVERY_FP8.index_select(0, codes.view(torch.uint8).flatten().int()).view(codes.shape)

    def decode(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return (self.numbers(codes) * scale[..., None].float()).to(dtype)


INT4, FP8 = Int4(), Fp8()


@dataclass(frozen=True, slots=True)
class KVCodec:
    """How keys and values of a cache are stored: a codec for each.

    Attributes:
        name: as a user writes it.
        keys, values: their codecs.
    """

    name: str
    keys: Codec
    values: Codec


_KV_CODECS = {c.name: c for c in (KVCodec("int4", INT4, INT4), KVCodec("k8v4", FP8, INT4), KVCodec("fp8", FP8, FP8))}


def kv_codec(name: str) -> KVCodec:
    """The codecs of this name: ``int4`` and ``fp8`` for keys and values alike, ``k8v4`` for FP8 keys and INT4 values.

    Raises:
        UserError: there are none.
    """
    if name not in _KV_CODECS:
        raise UserError(f"no codec {name!r}: there are int4, k8v4 and fp8")
    return _KV_CODECS[name]
