# SPDX-License-Identifier: Apache-2.0
"""Words in their context: a transformer over chunks of a document that overlap, and over a query."""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ...attention.chunks import cores, pack_chunks, unpack_chunks
from ...attention.positions import sinusoids
from ...errors import UserError
from ...strategy import RankerConfig

__all__ = ["Words"]

_ALIGNED = 16  # places; of other numbers fused attention on a GPU writes out what is masked, for each pair of words
_FIRST = 500  # position of a document's first word, so that no word of a query is at the same


class Words(nn.Module):
    """``m e + (1 - m) TF(e + p)``, 0 where there is no word."""

    def __init__(self, config: RankerConfig, chunk: int, overlap: int) -> None:
        super().__init__()
        if config.dim % config.heads:
            raise UserError(f"{config.dim} channels do not part into {config.heads} heads")
        self.chunk, self.overlap = chunk, overlap
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.mixed = nn.Parameter(torch.tensor(0.5))
        self.query_places = nn.Parameter(sinusoids(torch.arange(config.query), config.dim))
        if chunk:
            places = _FIRST + torch.arange(chunk + 2 * overlap)
            self.document_places = nn.Parameter(sinusoids(places, config.dim))

    def query(self, x: Tensor, real: Tensor) -> Tensor:
        """Of a query ``x [B, Q, dim]``."""
        return self._read(x, real, self.query_places[: x.shape[1]])

    def document(self, x: Tensor, real: Tensor) -> Tensor:
        """Of a document ``x [B, T, dim]``."""
        if not self.chunk:
            length, more = x.shape[1], -x.shape[1] % _ALIGNED
            places = sinusoids(_FIRST + torch.arange(length + more, device=x.device), x.shape[2]).to(x.dtype)
            return self._read(pad(x, (0, 0, 0, more)), pad(real, (0, more)), places)[:, :length]
        chunks, held, kept = pack_chunks(x, real, self.chunk, self.overlap)
        if not len(chunks):
            return torch.zeros_like(x)
        read = self._read(chunks, held, self.document_places)
        return unpack_chunks(cores(read, self.overlap), kept, *x.shape[:2])

    def _read(self, x: Tensor, real: Tensor, places: Tensor) -> Tensor:
        y, seen = x + places, real | ~real.any(1, keepdim=True)  # a row without a word has something to divide by
        for layer in self.layers:
            y = layer(y, seen[:, None, None])
        return (self.mixed * x + (1 - self.mixed) * y) * real[..., None]


class _Layer(nn.Module):
    """A post-norm transformer layer as ``torch.nn.TransformerEncoderLayer``, whose evaluation holds a T x T map."""

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, config.hidden), nn.Linear(config.hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        for bias in (self.qkv.bias, self.out.bias):
            nn.init.zeros_(bias)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        """``x [P, T, dim]`` after a look at what is ``seen [P, 1, 1, T]``."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, seen) if x.shape[1] > 1 else v
        x = self.norm1(x + self.out(mixed.transpose(1, 2).flatten(2)))
        y: Tensor = self.norm2(x + self.down(self.up(x).relu()))
        return y
