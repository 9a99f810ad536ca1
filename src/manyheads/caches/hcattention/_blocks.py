# SPDX-License-Identifier: Apache-2.0
"""A prompt in chunks, each of which is coded as soon as it is read, and reads few blocks of what came before.

Queries of a chunk of T tokens see the sinks, the blocks of coded tokens whose mean keys get most of the attention of
the chunk's mean queries, the tokens less than ``local`` before them, and what of the chunk is not later than they are.
Sinks and tokens of the window are exact; picked ones are as they are stored, their values brought from the host.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ...attention import patterns, product_codes
from ...attention.block_pattern import BlockPattern
from ...attention.reference import widened
from ...attention.sparse import block_sparse_attention
from ...call import AttentionCall
from ...errors import UserError
from ._coded import BLOCK, CodedTokens, Rows, joined
from ._store import OffloadStore

__all__ = ["BlockStore"]


class BlockStore(OffloadStore):
    """The store of ``prompt=blocks``; decoding is that of :class:`OffloadStore`."""

    covers_past = True  # no mask over all columns: it would have as many numbers as dense attention has logits

    @property
    def _waits(self) -> bool:
        return False

    @property
    def _window(self) -> int:
        more = self._seen < self.prompt
        return max(self.strategy.recent, self.strategy.local) if more else self.strategy.recent

    def attend(self, call: AttentionCall) -> Tensor | None:
        """As :class:`OffloadStore` does, but that chunks of a prompt are read over blocks."""
        if self.tokens is None or self._new is None:
            return super().attend(call)
        self.tokens.window = self._window
        if call.q.shape[2] == 1 or self._seen > self.prompt:
            return super().attend(call)
        return self._read(call, self.tokens, self._new)

    def _read(self, call: AttentionCall, tokens: CodedTokens, new: Rows) -> Tensor:
        """Attention of a chunk ``[B, T, H, dv]``."""
        if call.mask is not None or call.bias is not None or call.softcap is not None or tokens.pad is not None:
            raise UserError(
                f"hcattention:prompt=blocks reads no padding, masks and caps of the logits, and {call.site.name} has "
                "one: use prompt=exact"
            )
        (tail, start), self._new = tokens.take(new), None
        self.fetched = self.mass = None
        k, v = joined(*_before(tokens, call, start, self.strategy.picked), tail)
        front = k.shape[2] - tail[0].shape[2]
        pattern = _pattern(call.q.shape[2], k.shape[2], front, self.strategy.local, call.q.device)
        return block_sparse_attention(call.q, k, v, pattern, scale=call.scale).transpose(1, 2)


@lru_cache(maxsize=4)  # the chunks of all layers have few sizes
def _pattern(queries: int, keys: int, front: int, local: int, device: torch.device) -> BlockPattern:
    """The first ``front`` keys and a window of ``local`` before each query, in whole blocks."""
    return patterns.a_shape(queries, keys, front, local, block_q=BLOCK, block_k=BLOCK, device=device)


def _before(tokens: CodedTokens, call: AttentionCall, start: int, picked: int) -> list[Rows]:
    """What a chunk reads of the first ``start`` slots: the sinks, and blocks."""
    count = min(tokens.sinks[0].shape[2], start)
    parts = [(tokens.sinks[0][:, :, :count], tokens.sinks[1][:, :, :count])] if count else []
    first, end = -(-count // BLOCK), start // BLOCK
    if picked and end > first:
        blocks = _pick(tokens, call, first, end, picked)
        slots = (blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=blocks.device)).flatten(1)[:, None]
        codes = tokens.codes.gather(3, slots[:, None].expand(*tokens.codes.shape[:1], *tokens.codes.shape[1:3], -1))
        k = product_codes.decode(codes, tokens.centroids).to(call.k.dtype)
        v = tokens.values.read_pieces((blocks * BLOCK).tolist(), BLOCK)
        if tokens.codec is not None and tokens.value_scale is not None:
            scale = tokens.value_scale.gather(2, slots.expand(-1, v.shape[1], -1))
            v = tokens.codec.decode(v, scale, call.v.dtype)
        parts.append((k, v))
    return parts


def _pick(tokens: CodedTokens, call: AttentionCall, first: int, end: int, picked: int) -> Tensor:
    """Blocks from ``first`` on and below ``end`` with most of the attention of all heads, ascending ``[B, picked]``."""
    assert tokens.sums is not None
    means = tokens.sums[:, :, first:end] / BLOCK
    q = patterns.block_means(widened(call.q), BLOCK).unflatten(1, (means.shape[1], -1)).flatten(2, 3)
    share = ((q @ means.transpose(2, 3)) * call.scale).softmax(3).sum((1, 2))
    best: Tensor = share.topk(min(picked, end - first)).indices.sort().values
    return best + first
