# SPDX-License-Identifier: Apache-2.0
"""A linear layer with INT4 weights and FP8 activations: ``y = a 2^-i sum_k x8[k] w8[n, k]``.

Weights ``W [N, K]`` are multiplied by 2^i (one i for the matrix) and cut into groups of ``group`` channels along K. A
group has one scale sigma = max |w| / 7, in e4m3 or bfloat16, and a code c in -7..7 per weight; a last group that is
shorter is filled with zeros. i brings the largest scale just below 64, so that no scale is lost below the least e4m3
number (2^-9) before it has to be, and 7 sigma still is one.

``table`` says what a code stands for: ``fp8``, the e4m3 number nearest to sigma c, which is what a table of 16 FP8
numbers per group holds and FP8 tensor cores multiply; or ``exact``, sigma c itself, sigma multiplying the sum of a
group.

Activations ``x [..., K]`` are rounded to e4m3 with one bfloat16 scale a per token, max |x| / 448. Sums are float32.

Smoothing: with factors s_k, W[:, k] is multiplied and x[k] divided by s_k before either is rounded. A channel with
small weights then has as many codes as one with large ones, and the difference is left to the activations, whose
rounding is relative.

Shapes: N outputs, K inputs, P = K rounded up to whole groups. Codes are ``uint8 [N, P / 2]``; byte j of a group holds
channel j in its low and channel j + group / 2 in its high nibble, as c + 8.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels import available
from .codec import FP8, pack, unpack

__all__ = [
    "GROUPS", "PackedWeight", "decode", "encode", "linear", "multiply", "multiply_reference", "smoothing_factors",
    "weight",
]  # fmt: skip

GROUPS = (32, 64, 128)
_TOP, _CODE = 64.0, 7.0  # largest scale after 2^i; largest code
_LEAST = 2.0**-9  # of e4m3
_FLOOR = 1e-3  # of the largest channel, the least that a channel counts as in a factor


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight as it is stored.

    Attributes:
        codes: ``uint8 [N, P / 2]``.
        scale: ``[N, P / group]``, float8_e4m3fn or bfloat16.
        factors: what inputs are divided by, float32 ``[K]``, None for 1.
        shift: 2^i.
        width: K.
        group: channels of a scale.
        table: ``fp8`` or ``exact``.
    """

    codes: Tensor
    scale: Tensor
    factors: Tensor | None
    shift: float
    width: int
    group: int
    table: str

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (self.codes, self.scale, self.factors) if x is not None)

    def to(self, device: torch.device) -> "PackedWeight":
        """The same on a device."""
        if self.codes.device == device:
            return self
        factors = None if self.factors is None else self.factors.to(device)
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), factors=factors)


def smoothing_factors(matrix: Tensor, kind: str) -> Tensor | None:
    """s ``[K]`` float32 for ``matrix [N, K]``: 1 over a channel's largest (``absmax``) or mean (``mean``) magnitude.

    A factor that all channels share changes nothing that 2^i and the token's scale do not take back. Channels count as
    at least a thousandth of the largest, so that one without weights leaves its inputs alone.

    Raises:
        UserError: another ``kind`` than these and ``none``.
    """
    if kind == "none":
        return None
    if kind not in ("absmax", "mean"):
        raise UserError(f"smoothing is none, absmax or mean, not {kind!r}")
    size = matrix.float().abs()
    size = size.amax(0) if kind == "absmax" else size.mean(0)
    top = size.max()
    return torch.where(top > 0, top / torch.maximum(size, _FLOOR * top), 1.0)


def encode(
    matrix: Tensor, *, group: int = 128, scale: torch.dtype = torch.float8_e4m3fn, table: str = "fp8",
    smoothing: str = "none",
) -> PackedWeight:  # fmt: skip
    """Pack ``matrix [N, K]`` of any float dtype.

    Raises:
        UserError: a group, dtype of scales, table or smoothing that there is not; weights that are not finite.
    """
    if group not in GROUPS or table not in ("fp8", "exact") or scale not in (torch.float8_e4m3fn, torch.bfloat16):
        raise UserError(
            f"INT4 weights have groups of {', '.join(map(str, GROUPS))} channels, scales in float8_e4m3fn or bfloat16, "
            f"and a table that is fp8 or exact; not {group}, {scale} and {table!r}"
        )
    wide = matrix.detach().float()
    factors = smoothing_factors(wide, smoothing)
    if factors is not None:
        wide = wide * factors
    wide = torch.nn.functional.pad(wide, (0, -matrix.shape[1] % group)).unflatten(1, (-1, group))  # [N, P / g, g]
    size = wide.abs().amax(2) / _CODE
    top = float(size.max()) if size.numel() else 0.0
    if not top < torch.inf:
        raise UserError("weights that are not finite cannot be packed")
    shift = 2.0 ** torch.tensor(_TOP / top).log2().floor().item() if top > 0 else 1.0
    sigma = (size * shift).clamp(min=_LEAST, max=_TOP).to(scale)
    codes = (wide * shift / sigma.float()[..., None]).round().clamp(-_CODE, _CODE)
    packed = pack((codes + 8).to(torch.uint8)).flatten(1)
    return PackedWeight(packed.contiguous(), sigma, factors, shift, matrix.shape[1], group, table)


def decode(packed: PackedWeight) -> Tensor:
    """What codes stand for, float32 ``[N, P]``: 2^i times the smoothed weight; with ``table=fp8`` all are e4m3."""
    codes = unpack(packed.codes.unflatten(1, (-1, packed.group // 2))).float() - 8
    numbers = codes.mul_(packed.scale.float()[..., None]).flatten(1)
    return numbers.to(torch.float8_e4m3fn).float() if packed.table == "fp8" else numbers


def weight(packed: PackedWeight) -> Tensor:
    """The weight that codes stand for, smoothing and 2^i taken back: float32 ``[N, K]``."""
    found = decode(packed)[:, : packed.width] / packed.shift
    return found if packed.factors is None else found / packed.factors


def multiply_reference(x8: Tensor, scale: Tensor, packed: PackedWeight) -> Tensor:
    """:func:`multiply` in float64, from the definition."""
    out = x8.double() @ decode(packed)[:, : packed.width].double().T
    return out * scale.double()[:, None] / packed.shift


def multiply(x8: Tensor, scale: Tensor, packed: PackedWeight, dtype: torch.dtype, impl: str = "auto") -> Tensor:
    """``y [M, N]`` in ``dtype`` from ``x8 [M, K]`` e4m3 and the scales of its tokens ``[M]``.

    Args:
        x8: codes of the inputs, divided by the factors of the weight before.
        scale: of the tokens.
        packed: the weight.
        dtype: of the result; sums are float32.
        impl: ``kernel`` (Triton), ``torch``, or ``auto``: the kernel where it can run.

    Raises:
        UserError: shapes that do not fit.
    """
    if x8.ndim != 2 or x8.shape[1] != packed.width or scale.shape != x8.shape[:1]:
        raise UserError(
            f"inputs {tuple(x8.shape)} with scales {tuple(scale.shape)} do not fit a weight of {packed.width} channels"
        )
    if impl == "kernel" or (impl == "auto" and x8.is_cuda and available()):
        from ..kernels.int4_fp8 import int4_fp8_matmul

        return int4_fp8_matmul(
            x8, scale, packed.codes, packed.scale, group=packed.group, factor=1 / packed.shift, dtype=dtype,
            exact=packed.table == "exact",
        )  # fmt: skip
    if _scaled_mm_can(x8, packed):
        return _scaled_mm(x8, scale, packed).to(dtype)
    out = x8.float() @ decode(packed)[:, : packed.width].T
    return (out * (scale.float() / packed.shift)[:, None]).to(dtype)


def _scaled_mm_can(x8: Tensor, packed: PackedWeight) -> bool:
    """Whether torch multiplies these by FP8 tensor cores."""
    return (
        x8.is_cuda and packed.table == "fp8" and torch.cuda.get_device_capability(x8.device) >= (9, 0)
        and packed.codes.shape[0] % 16 == 0
    )  # fmt: skip


def _scaled_mm(x8: Tensor, scale: Tensor, packed: PackedWeight) -> Tensor:
    """By ``torch._scaled_mm``, bfloat16: the weight is decoded to e4m3 first, ``P`` bytes a row."""
    table = decode(packed).to(torch.float8_e4m3fn)
    padded = torch.nn.functional.pad(x8.view(torch.uint8), (0, table.shape[1] - packed.width)).view(x8.dtype)
    ones = torch.ones(1, table.shape[0], dtype=torch.float32, device=x8.device)
    token = (scale.float() / packed.shift)[:, None].contiguous()
    return torch._scaled_mm(
        padded.contiguous(), table.T, scale_a=token, scale_b=ones, out_dtype=torch.bfloat16, use_fast_accum=False
    )


def linear(x: Tensor, packed: PackedWeight, bias: Tensor | None = None, impl: str = "auto") -> Tensor:
    """``x [..., K]`` through the layer, ``[..., N]`` in the dtype of ``x``; gradients pass the rounding of x unchanged.

    Args:
        x: inputs of any float dtype.
        packed: the weight.
        bias: ``[N]`` or None.
        impl: as of :func:`multiply`.
    """
    rows = x.reshape(-1, x.shape[-1])
    wide = rows.float() if packed.factors is None else rows.float() / packed.factors
    codes, scale = FP8.encode(wide.detach())
    if torch.is_grad_enabled() and x.requires_grad:
        read = wide + (FP8.decode(codes, scale, torch.float32) - wide).detach()
        out = (read @ decode(packed)[:, : packed.width].T / packed.shift).to(x.dtype)
    else:
        out = multiply(codes, scale, packed, x.dtype, impl)
    out = out if bias is None else out + bias.to(out.dtype)
    return out.reshape(*x.shape[:-1], out.shape[-1])
