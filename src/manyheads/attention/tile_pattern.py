# SPDX-License-Identifier: Apache-2.0
"""Which keys each query sees, tile by tile of 128 x 128: none, all, or those whose bits are set.

A :class:`TilePattern` stands where :class:`.block_pattern.BlockPattern` stands, for masks that no rule of positions
describes, as those of queries and keys in any order are. All heads share it. Only tiles seen in part carry bits, 2 KiB
each, packed into int32: bit i of a row's word j is key ``32 j + i``. Queries or keys past the last one are never seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block_pattern import Lists, Rule, blocks_of

__all__ = ["BLOCK", "PART", "WHOLE", "TilePattern", "pack", "unpack"]

BLOCK = 128
PART, WHOLE = 1, 2  # of a tile that is seen at all
_WEIGHTS = tuple(1 << i for i in range(8))
_AT_ONCE = 2048  # tiles that are unpacked together


def pack(seen: Tensor) -> Tensor:
    """``bool [..., 32 n] -> int32 [..., n]``."""
    if seen.device.type == "cpu":
        return torch.from_numpy(np.packbits(seen.numpy(), axis=-1, bitorder="little").view(np.int32))
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=seen.device)
    packed: Tensor = (seen.contiguous().view(torch.uint8).unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
    return packed.view(torch.int32)


def unpack(words: Tensor) -> Tensor:
    """``int32 [..., n] -> bool [..., 32 n]``."""
    if words.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(words.numpy().view(np.uint8), axis=-1, bitorder="little").view(bool))
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts) & 1).bool().flatten(-2)


@dataclass(frozen=True, eq=False)
class TilePattern:
    """Tiles of queries and keys.

    Attributes:
        state: uint8 ``[n_q, n_k]``, on the host: 0, ``PART`` or ``WHOLE``. No tile of a last, incomplete block is
            whole.
        words: int32 ``[m, 128, 4]``, the bits of the m tiles seen in part, by row and column of the grid of tiles.
        num_queries, num_keys: T and S.
    """

    state: NDArray[np.uint8]
    words: Tensor
    num_queries: int
    num_keys: int
    _memo: dict[Any, Any] = field(default_factory=dict, repr=False)

    block_q = block_k = tile = BLOCK
    masked = True

    @classmethod
    def of(cls, seen: Tensor) -> TilePattern:
        """Of a mask ``bool [T, S]``, for tests and short sequences."""
        length, size = seen.shape
        tiles = torch.nn.functional.pad(seen, (0, -size % BLOCK, 0, -length % BLOCK))
        tiles = tiles.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2)
        state = torch.where(tiles.all(3).all(2), WHOLE, tiles.any(3).any(2) * PART).to(torch.uint8).cpu().numpy()
        words = pack(tiles.flatten(0, 1)[torch.from_numpy(state.ravel() == PART).to(seen.device)].contiguous())
        return cls(state, words, length, size)

    @property
    def rows(self) -> int:
        """Blocks of queries."""
        return int(blocks_of(self.num_queries, BLOCK))

    @property
    def columns(self) -> int:
        """Blocks of keys."""
        return int(blocks_of(self.num_keys, BLOCK))

    @property
    def indices(self) -> Tensor:
        """Lists of :meth:`lists`."""
        return self.lists().indices

    @property
    def busy(self) -> int:
        """Blocks of queries that see anything."""
        if "busy" not in self._memo:
            self._memo["busy"] = int(self.state.any(1).sum())
        return int(self._memo["busy"])

    @property
    def nbytes(self) -> int:
        """Bytes held on the device: bits and lists, those of both directions once they were asked for."""
        lists = [x for made in self._memo.values() if isinstance(made, Lists) for x in made if x is not None]
        return sum(x.nbytes for x in {id(x): x for x in (self.words, *lists)}.values())

    def lists(self, rule: Rule | None = None) -> Lists:
        """Lists of key blocks for each block of queries: whole ones first. A pattern with bits has no other rule."""
        if "lists" not in self._memo:
            self._memo["lists"] = _listed(self.state, self.words)
        found: Lists = self._memo["lists"]
        return found

    def transposed(self, rule: Rule | None = None, groups: int = 1) -> Lists:
        """Lists of blocks of queries for each block of keys."""
        if "transposed" not in self._memo:
            row, column = np.nonzero(self.state == PART)
            order = torch.from_numpy(np.lexsort((row, column))).to(self.words.device)
            words = torch.empty_like(self.words)
            for start in range(0, len(words), _AT_ONCE):
                part = slice(start, start + _AT_ONCE)
                words[part] = pack(unpack(self.words[order[part]]).transpose(1, 2).contiguous())
            self._memo["transposed"] = _listed(np.ascontiguousarray(self.state.T), words)
        found: Lists = self._memo["transposed"]
        return found

    def seen(self, rows: slice, columns: NDArray[np.int64]) -> Tensor | None:
        """Of some blocks of queries, which keys of some blocks they see: bool ``[T', S']``; None if all."""
        state = self.state[rows, columns]
        if (state == WHOLE).all():
            return None
        if "number" not in self._memo:
            self._memo["number"] = (self.state == PART).cumsum().reshape(self.state.shape) - 1
        device = self.words.device
        tiles = torch.from_numpy(state == WHOLE).to(device)[:, :, None, None].repeat(1, 1, BLOCK, BLOCK)
        part = torch.from_numpy(state == PART).to(device)
        numbers = self._memo["number"][rows, columns][state == PART]
        tiles[part] = unpack(self.words[torch.from_numpy(numbers).to(device)])
        start, end = rows.start * BLOCK, min(rows.stop * BLOCK, self.num_queries)
        width = len(columns) * BLOCK - (-self.num_keys % BLOCK if columns[-1] == self.columns - 1 else 0)
        return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)[: end - start, :width]


def _listed(state: NDArray[np.uint8], words: Tensor) -> Lists:
    """Lists of the columns of each row: whole tiles, then those with bits, whose words follow each other."""
    rows, columns = state.shape
    counts = [(state == kind).sum(1) for kind in (WHOLE, PART)]
    lengths = counts[0] + counts[1]
    indices = np.full((rows, max(1, lengths.max(initial=0))), columns, np.int32)
    before = np.zeros(rows, np.int64)
    for kind, count in zip((WHOLE, PART), counts, strict=True):
        row, column = np.nonzero(state == kind)
        starts = count.cumsum() - count
        indices[row, np.arange(len(row)) - starts[row] + before[row]] = column
        before = before + count
    zero = np.zeros(rows, np.int64)
    spans = np.stack([zero, zero, counts[0], lengths], 1).astype(np.int32)
    base = (counts[1].cumsum() - counts[1]).astype(np.int32)
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    made = [torch.from_numpy(x).to(words.device) for x in (indices, spans, order, base)]
    return Lists(made[0][None, None], made[1][None, None], made[2][None, None], None, words, made[3])
