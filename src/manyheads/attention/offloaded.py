# SPDX-License-Identifier: Apache-2.0
"""Attention over keys that are codes on the device and values that lie in host memory.

One query a row: the logits of the coded keys come from a table (:mod:`.product_codes`), the weights decide which values
are needed, and only those are fetched. The Triton kernels of :mod:`manyheads.kernels.product_codes` read them where
they lie, in page-locked host memory; the twin in torch, which is also the way without a GPU, takes numbers and weights
to the host, sums there, and brings back the sum.

Legend: B rows, H query heads, Hkv key/value heads, G = H / Hkv, N coded tokens, E exact ones, d channels.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels
from .codec import FP8, INT4, Codec
from .product_codes import lookup_table, select, table_logits
from .reference import repeat_kv, widened

__all__ = ["Attended", "HostRows", "codec_of", "decode_attention", "fetch", "kernel_takes"]

_ROOM = 64  # tokens by which rows in host memory grow at least


def codec_of(values: Tensor) -> Codec | None:
    """What values on the host are stored by; None as they came."""
    if values.dtype == torch.uint8:
        return INT4
    return FP8 if values.dtype == torch.float8_e4m3fn else None


class HostRows:
    """Rows ``[B, Hkv, d]``, one after the other, that lie in host memory: page-locked where the model is on a GPU.

    They lie token by token, so that a token is copied in one piece, without waiting for it. A buffer that is full grows
    by a thirty-second. PyTorch's allocator of page-locked memory may round a buffer up to a power of two.

    Attributes:
        data: ``[C, B, Hkv, d]``, of which the first ``size`` count.
        size: tokens.
        device: of the model.
    """

    def __init__(self, like: Tensor, capacity: int = 0) -> None:
        batch, heads, _, width = like.shape
        self.device, self.size = like.device, 0
        self.data = self._empty(capacity, (batch, heads, width), like.dtype)

    def _empty(self, capacity: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(capacity, *shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    def settle(self) -> None:
        """Wait until what was copied is there: before the host reads."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()

    def _hold(self, rows: Tensor, capacity: int) -> None:
        """Own a buffer that begins with ``rows``."""
        larger = self._empty(capacity, tuple(rows.shape[1:]), rows.dtype)
        larger[: len(rows)] = rows
        self.data = larger

    def reserve(self, capacity: int) -> None:
        """Have room for ``capacity`` tokens."""
        if capacity > len(self.data):
            self.settle()
            self._hold(self.data[: self.size], capacity)

    def append(self, rows: Tensor) -> None:
        """Add ``[B, Hkv, T, d]`` from the device."""
        end = self.size + rows.shape[2]
        if end > len(self.data):
            self.reserve(max(end, self.size + max(_ROOM, self.size // 32)))
        self.data[self.size : end].copy_(rows.detach().permute(2, 0, 1, 3).contiguous(), non_blocking=True)
        self.size = end

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """``[B, Hkv, T, d]`` on the device."""
        rows = self.data[start : self.size if stop is None else stop]
        return rows.to(self.device, non_blocking=True).permute(1, 2, 0, 3)

    def read_pieces(self, starts: list[list[int]], size: int) -> Tensor:
        """Stretches of ``size`` tokens, for each row those that begin at its ``starts``: ``[B, Hkv, n * size, d]``."""
        if len(starts) > 1:
            self.settle()  # a row is then gathered on the host
        pieces = [
            torch.cat([self.data[at : at + size, row].to(self.device, non_blocking=True) for at in mine])
            for row, mine in enumerate(starts)
        ]
        return torch.stack(pieces).transpose(1, 2)

    def reorder(self, rows: Tensor) -> None:
        """Take batch rows ``[B']``."""
        self.settle()
        taken = self.data[: self.size, rows.cpu()]
        self._hold(taken, len(taken))

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostRows":
        twin = memo[id(self)] = HostRows.__new__(HostRows)
        twin.device, twin.size = self.device, self.size
        self.settle()
        twin._hold(self.data[: self.size], self.size)
        return twin

    def state_dict(self) -> dict[str, Any]:
        """What it holds."""
        self.settle()
        return {"rows": self.data[: self.size]}

    @classmethod
    def of(cls, rows: Tensor, device: torch.device) -> "HostRows":
        """Rows ``[N, B, Hkv, d]`` for a model on ``device``."""
        made = cls.__new__(cls)
        made.device, made.size = device, len(rows)
        made._hold(rows.cpu(), len(rows))
        return made


class Attended(NamedTuple):
    """What one step gives.

    Attributes:
        out: ``[B, H, dv]`` in the dtype of the queries.
        mass: of attention, under the coded keys, that the kept tokens have, ``[B, H]``.
        fetched: values that were fetched for each key/value head, ``[B, Hkv]``.
    """

    out: Tensor
    mass: Tensor
    fetched: Tensor


def kernel_takes(q: Tensor, centroids: Tensor) -> bool:
    """Whether the GPU kernels attend for queries ``[B, H, d]`` of this device and dtype."""
    usual = q.dtype in (torch.float32, torch.bfloat16, torch.float16) and q.shape[-1] in (32, 64, 128, 256)
    return usual and q.is_cuda and q.shape[1] // centroids.shape[1] <= 16 and kernels.available()


def fetch(
    logits: Tensor, lse: Tensor, lowest: Tensor, values: HostRows, value_scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum of the values of the kept tokens by their weights, made on the host.

    Only numbers and weights of kept tokens go there, and only the sum comes back.

    Args:
        logits: ``[B, H, N]``; -inf is never kept.
        lse: ``[B, H]`` that makes weights of them.
        lowest: ``[B, H]``, the lowest logit that is kept.
        values: at least N of them.
        value_scale: ``[B, Hkv, C]`` of values in FP8 or INT4.

    Returns:
        The sum ``[B, H, dv]``, the mass of the kept tokens ``[B, H]`` and the number of values read ``[B, Hkv]``.
    """
    batch, heads = logits.shape[:2]
    kv_heads, codec = values.data.shape[2], codec_of(values.data)
    width = values.data.shape[3] * (2 if codec is INT4 else 1)
    kept = (logits >= lowest[..., None]) & (logits > -torch.inf)
    weight = torch.where(kept, (logits - lse[..., None]).exp(), 0.0).unflatten(1, (kv_heads, -1))
    needed = kept.unflatten(1, (kv_heads, -1)).any(2)
    out = weight.new_zeros(batch, kv_heads, heads // kv_heads, width)
    values.settle()
    for b in range(batch):
        for h in range(kv_heads):
            at = needed[b, h].nonzero()[:, 0]
            rows = values.data[at.cpu(), b, h]
            rows = (rows if codec is None else codec.numbers(rows)).to(weight.dtype)
            share = weight[b, h, :, at]
            if value_scale is not None:
                share = share * value_scale[b, h, at].to(share.dtype)
            out[b, h] = (share.to(rows.device) @ rows).to(out.device)
    return out.flatten(1, 2), weight.sum(3).flatten(1, 2), needed.sum(2)


def decode_attention(
    q: Tensor, codes: Tensor, centroids: Tensor, values: HostRows, exact_k: Tensor, exact_v: Tensor, *,
    count: int, scale: float, exact_mask: Tensor | None = None, first: Tensor | None = None,
    mask: Tensor | None = None, value_scale: Tensor | None = None, top_p: float = 0.9, top_k: int = 0,
    renormalize: bool = True, softcap: float | None = None, host: bool = False,
) -> Attended:  # fmt: skip
    """Attention of one query per row over N coded tokens and E exact ones, by the values of the kept ones.

    Args:
        q: ``[B, H, d]``.
        codes: ``[B, Hkv, g, C]``, of which the first ``count`` tokens count.
        centroids: ``[B or 1, Hkv, g, c, w]``.
        values: of the coded tokens, in host memory; in FP8 or INT4 with ``value_scale``.
        exact_k, exact_v: ``[B, Hkv, E, d]``, always kept, their mass counts.
        count: N.
        scale: factor on ``q k^T``.
        exact_mask: which of the E may be attended to, bool ``[B, E]``; None for all.
        first: coded tokens in front that are left out, ``[B]`` int32 (padding, and what is among the exact ones).
        mask: which coded tokens may be attended to, bool ``[B, N]``; None for all.
        value_scale: ``[B, Hkv, C]`` bfloat16.
        top_p: mass of attention that the kept tokens have at least.
        top_k: instead of it, how many coded tokens each head keeps; 0 for ``top_p``.
        renormalize: bring the kept weights back to a sum of one.
        softcap: cap on the logits.
        host: sum values on the host also where the kernels could fetch them.
    """
    heads = exact_k.shape[1]
    exact = (repeat_kv(widened(exact_k), q.shape[1]) @ widened(q)[..., None])[..., 0] * scale
    if softcap is not None:
        exact = torch.tanh(exact / softcap) * softcap
    if exact_mask is not None:
        exact = exact.masked_fill(~exact_mask[:, None], -torch.inf)
    own = exact.logsumexp(2)
    table = lookup_table(q, centroids, scale)
    fast: Any = None
    if kernel_takes(q, centroids) and softcap is None:
        from ..kernels import product_codes as fast
    if fast is not None:
        logits, coded = fast.table_logits(table, codes, count, first, mask)
    else:
        logits = table_logits(table, codes[..., :count])
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        if first is not None:
            hidden = torch.arange(count, device=q.device) < first[:, None]
            logits = logits.masked_fill(hidden[:, None], -torch.inf)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None], -torch.inf)
        coded = logits.logsumexp(2)
    lse = torch.logaddexp(own, coded)
    sure = (own - lse).exp()
    need = torch.full_like(sure, math.inf) if top_p >= 1 and not top_k else top_p - sure
    lowest = (select if fast is None else fast.select)(logits, lse, top_k or need)
    if fast is not None and not host:
        out, mass, fetched = fast.fetch(logits, lse, lowest, values.data, value_scale)
    else:
        out, mass, fetched = fetch(logits, lse, lowest, values, value_scale)
    weight = (exact - lse[..., None]).exp()
    grouped = weight.unflatten(1, (heads, -1)) @ widened(exact_v)
    out, mass = out + grouped.flatten(1, 2), mass + sure
    if renormalize:
        out = out / mass[..., None]
    return Attended(out.to(q.dtype), mass, fetched)
