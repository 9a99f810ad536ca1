# SPDX-License-Identifier: Apache-2.0
"""Who may attend to whom, said once and lowered three ways.

A :class:`MaskSpec` names a pattern by rules on positions and documents. ``dense`` is the definition, a boolean mask;
``banded`` runs a sliding window in O(T w) by blocks of neighbours, anywhere; ``mod`` is the same rule as
FlexAttention's ``mask_mod`` for GPUs. :func:`masked_attention` picks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import UserError
from .reference import attention, repeat_kv

__all__ = [
    "MaskSpec", "banded", "each_text", "masked_attention", "neighbours", "padded", "texts_with_state", "zero_padding",
]  # fmt: skip

Impl = Literal["auto", "dense", "banded", "flex"]
S = TypeVar("S")


@dataclass(frozen=True)
class MaskSpec:
    """A pattern of attention: a pair is allowed when every rule that is set allows it.

    Attributes:
        causal: no key later than its query.
        window: keys less than so many positions from their query (before it; if not causal, on either side).
        chunk: only keys of the query's own chunk of so many positions.
        prefix: the first so many positions are seen by all, whatever ``causal``, ``window`` and ``chunk`` say.
        documents: ``[B or 1, S]`` number of each token's document; pairs of two documents are not allowed.
        blocks: bool ``[B or 1, H or 1, T / block, S / block]`` of allowed blocks of ``block`` columns.
        block: columns of a block.
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    prefix: int = 0
    documents: Tensor | None = None
    blocks: Tensor | None = None
    block: int = 64

    def __post_init__(self) -> None:
        for name in ("window", "chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} counts positions and is at least 1, not {value}")

    @property
    def plain(self) -> bool:
        """Whether it is causal attention and nothing else."""
        return (
            self == replace(MaskSpec(), block=self.block) if self.documents is None and self.blocks is None else False
        )

    def allows(self, apart: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The rules on positions; ``apart = query - key``, all broadcastable."""
        allowed = torch.ones_like(apart, dtype=torch.bool)
        if self.causal:
            allowed = allowed & (apart >= 0)
        if self.window is not None:
            allowed = allowed & (apart < self.window) & (apart > -self.window)
        if self.chunk is not None:
            allowed = allowed & (query // self.chunk == key // self.chunk)
        return allowed | (key < self.prefix) if self.prefix else allowed

    def dense(
        self, num_queries: int, num_keys: int, *, positions: tuple[Tensor, Tensor] | None = None,
        real: Tensor | None = None, device: torch.device | str = "cpu",
    ) -> Tensor:  # fmt: skip
        """Boolean ``[B or 1, H or 1, T, S]``, True = attend. Queries are the last T of the S columns.

        Args:
            num_queries, num_keys: T and S.
            positions: ``[B, T]`` and ``[B, S]`` of queries and keys where columns are not positions.
            real: ``[B, S]`` keys that are tokens.
            device: of the mask where no positions are given.
        """
        if positions is None:
            columns = torch.arange(num_keys, device=device)[None]
            positions = columns[:, num_keys - num_queries :], columns
        query, key = positions[0][:, None, :, None], positions[1][:, None, None, :]
        allowed = self.allows(query - key, query, key)
        if self.documents is not None:
            mine = self.documents[:, None, num_keys - num_queries :, None]
            allowed = allowed & (mine == self.documents[:, None, None, :])
        if self.blocks is not None:
            whole = self.blocks.repeat_interleave(self.block, -1).repeat_interleave(self.block, -2)
            allowed = allowed & whole[..., :num_queries, :num_keys]
        return allowed if real is None else allowed & real[:, None, None]

    def mod(self, shift: int = 0) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The same rules as FlexAttention's ``mask_mod``; ``shift = S - T`` columns come before the first query."""

        def mask_mod(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            query = t + shift
            allowed = self.allows(query - s, query, s)
            if self.documents is not None:
                row = b if self.documents.shape[0] > 1 else b * 0
                allowed = allowed & (self.documents[row, query] == self.documents[row, s])
            if self.blocks is not None:
                row = b if self.blocks.shape[0] > 1 else b * 0
                head = h if self.blocks.shape[1] > 1 else h * 0
                allowed = allowed & self.blocks[row, head, t // self.block, s // self.block]
            return allowed

        return mask_mod


def neighbours(x: Tensor, causal: bool = False) -> Tensor:
    """Blocks ``x [B, H, n, w, d]``, each with the one before it and the one after: ``[B, H, n, 3 w, d]``.

    Where there is none stand zeros. A causal block has only the one before it, ``[B, H, n, 2 w, d]``.
    """
    empty = torch.zeros_like(x[:, :, :1])
    parts = [torch.cat([empty, x[:, :, :-1]], 2), x] + ([] if causal else [torch.cat([x[:, :, 1:], empty], 2)])
    return torch.cat(parts, 3)


def banded(q: Tensor, k: Tensor, v: Tensor, window: int, *, scale: float, causal: bool = True) -> Tensor:
    """Sliding-window attention in O(T w): blocks of ``window`` queries see their own block and its neighbours.

    Args:
        q: ``[B, H, T, d]``.
        k, v: ``[B, Hkv, T, d]``.
        window: keys less than so many positions away are seen.
        scale: factor on ``q k^T``.
        causal: the past only.

    Returns:
        ``[B, H, T, dv]``.
    """
    batch, heads, length, _ = q.shape
    k, v = repeat_kv(k, heads), repeat_kv(v, heads)
    pad = -length % window
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, window)) for x in (q, k, v))
    count = q.shape[2]
    at = torch.arange(count * window, device=q.device).view(count, window)
    first = (torch.arange(count, device=q.device) - 1)[:, None] * window
    keys = first + torch.arange((2 if causal else 3) * window, device=q.device)  # [n, 2w or 3w]
    apart = at[:, :, None] - keys[:, None]
    allowed = (apart < window) & (apart >= 0 if causal else apart > -window)
    allowed = allowed & (keys >= 0)[:, None] & (keys < length)[:, None]
    allowed = allowed | (at >= length)[:, :, None]  # rows of padding see anything, and are cut off
    q, k, v = (
        x.flatten(0, 1) for x in (q, neighbours(k, causal), neighbours(v, causal))
    )  # [B * H, n, w or more, d]: blocks are SDPA's heads
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allowed[None], scale=scale)
    return out.reshape(batch, heads, count * window, -1)[:, :, :length]


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, *, scale: float, bias: Tensor | None = None,
    positions: tuple[Tensor, Tensor] | None = None, real: Tensor | None = None, impl: Impl = "auto",
) -> Tensor:  # fmt: skip
    """Softmax attention under a pattern.

    Args:
        q: ``[B, H, T, d]``, the last T of the S columns.
        k, v: ``[B, Hkv, S, d]``.
        spec: the pattern.
        scale: factor on ``q k^T``.
        bias: additive logits, broadcastable to ``[B, H, T, S]``.
        positions: as for :meth:`MaskSpec.dense`.
        real: ``[B, S]`` keys that are tokens.
        impl: ``auto`` takes plain SDPA where the pattern is causal or nothing, ``banded`` for a window on all keys, and
            else ``dense``; ``flex`` (GPU) is taken on request.

    Returns:
        ``[B, H, T, dv]``; rows that may see nothing give 0.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    bare = bias is None and positions is None and real is None
    if impl == "auto" and bare and replace(spec, causal=True).plain and num_queries in (1, num_keys):
        k, v = repeat_kv(k, q.shape[1]), repeat_kv(v, q.shape[1])
        causal = spec.causal and num_queries > 1
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    only_window = spec.window is not None and replace(spec, window=None, causal=True).plain
    if impl == "banded" and not (bare and only_window and num_queries == num_keys):
        raise UserError("banded attention is for a sliding window over all keys, without padding, bias or documents")
    if impl == "banded" or (
        impl == "auto" and bare and only_window and num_queries == num_keys > 2 * (spec.window or 0)
    ):
        assert spec.window is not None
        return banded(q, k, v, spec.window, scale=scale, causal=spec.causal)
    if impl == "flex":
        return _flex(q, k, v, spec, scale, bare)
    mask = spec.dense(num_queries, num_keys, positions=positions, real=real, device=q.device)
    return attention(q, k, v, scale=scale, mask=mask, bias=bias).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, spec: MaskSpec, scale: float, bare: bool) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if not bare:
        raise UserError("impl=flex takes patterns by column only: no bias, positions or padding")
    shift = k.shape[2] - q.shape[2]
    heads = None if spec.blocks is None or spec.blocks.shape[1] == 1 else q.shape[1]
    rows = q.shape[0] if spec.documents is not None or spec.blocks is not None else None
    pattern = create_block_mask(spec.mod(shift), rows, heads, q.shape[2], k.shape[2], device=str(q.device))
    call: Any = torch.compile(flex_attention) if q.is_cuda else flex_attention
    out: Tensor = call(q, k, v, block_mask=pattern, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x [B, T, dim]`` with zeros, never NaN, where ``mask [B, T]`` is False."""
    return x if mask is None else x.masked_fill(~mask[..., None], 0.0)


def padded(rows: Sequence[Tensor], value: float = 0.0) -> tuple[Tensor, Tensor]:
    """Rows of several lengths, filled up with ``value``, and where they are: ``B x [T_i, ...]`` -> ``[B, T, ...]`` and
    bool ``[B, T]``.
    """
    there = torch.arange(max(map(len, rows))) < torch.tensor([len(row) for row in rows])[:, None]
    return pad_sequence(list(rows), batch_first=True, padding_value=value), there


def each_text(
    attend: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """What ``attend(texts [N, T', dim], lengths [N])`` gives for the texts of ``x [B, T, dim]``, each from column 0 on.

    Without ``mask`` and ``cu_seqlens`` it is given x itself and None. Padding may stand anywhere, and gets 0.
    """
    return texts_with_state(lambda texts, lengths: (attend(texts, lengths), None), x, mask, cu_seqlens)[0]


def texts_with_state(
    mix: Callable[[Tensor, Tensor | None], tuple[Tensor, S]], x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, S]:
    """As :func:`each_text`, of what also gives a state."""
    if mask is None and cu_seqlens is None:
        return mix(x, None)
    x = zero_padding(x, mask)
    rows, lengths = _texts(x, mask, cu_seqlens)
    y, state = mix(x.flatten(0, 1)[rows], lengths)
    real = torch.arange(rows.shape[1], device=x.device) < lengths[:, None]
    out = y.new_zeros(x.shape[:2].numel(), y.shape[2])
    return out.index_put((rows[real],), y[real]).view_as(x), state


def _texts(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where the tokens of each text stand in ``x [B, T, dim]`` laid flat, ``[N, longest]``, and how many ``[N]``."""
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff()
        at = torch.arange(max(1, int(lengths.max())), device=x.device)
        return (cu_seqlens[:-1, None] + at).clamp(max=x.shape[1] - 1), lengths
    assert mask is not None
    lengths = mask.sum(1)
    first = (~mask).long().argsort(dim=1, stable=True)[:, : max(1, int(lengths.max()))]
    return first + x.shape[1] * torch.arange(len(x), device=x.device)[:, None], lengths
