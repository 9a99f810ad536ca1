# SPDX-License-Identifier: Apache-2.0
"""Texts cut into chunks that overlap, those without a word left out, and chunks put together again.

Chunk c holds the places ``[c size - overlap, (c + 1) size + overlap)`` of a text. Its core are the ``size`` in the
middle, and each place is in one core.
"""

from torch import Tensor
from torch.nn.functional import pad

__all__ = ["cores", "pack_chunks", "unpack_chunks"]


def pack_chunks(x: Tensor, real: Tensor, size: int, overlap: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks of texts that have something real in their core.

    Args:
        x: ``[N, T, ...]``, any dtype.
        real: ``[N, T]``, whether a place holds a word.
        size: places of a core.
        overlap: places on either side of it.

    Returns:
        chunks ``[P, size + 2 overlap, ...]`` with zeros beyond the ends of a text, what is real in them, and which of
        the ``N * ceil(T / size)`` chunks these are, bool.
    """
    rows = size + 2 * overlap
    behind = overlap + (-x.shape[1]) % size
    wide = pad(x, (*[0] * (2 * (x.ndim - 2)), overlap, behind))
    chunks = wide.unfold(1, rows, size).movedim(-1, 2).flatten(0, 1)
    chunked = pad(real, (overlap, behind)).unfold(1, rows, size).flatten(0, 1)
    kept = cores(chunked, overlap).any(1)
    return chunks[kept], chunked[kept], kept


def cores(x: Tensor, overlap: int) -> Tensor:
    """The cores ``[P, size, ...]`` of chunks ``[P, size + 2 overlap, ...]``."""
    return x[:, overlap : x.shape[1] - overlap]


def unpack_chunks(packed: Tensor, kept: Tensor, count: int, length: int) -> Tensor:
    """``count`` texts ``[count, length, ...]`` of the cores ``packed [P, size, ...]``; zeros in chunks left out."""
    out = packed.new_zeros(len(kept), *packed.shape[1:])
    out = out.index_put((kept.nonzero()[:, 0],), packed)
    texts: Tensor = out.unflatten(0, (count, -1)).flatten(1, 2)[:, :length]
    return texts
