# SPDX-License-Identifier: Apache-2.0
"""Words in their context: a transformer over chunks of a document that overlap, and over a query."""

import torch
from torch import Tensor, nn

from ...attention.chunks import cores, pack_chunks, unpack_chunks
from ...attention.positions import sinusoids
from ...call import RankerConfig
from ...errors import UserError

__all__ = ["Words"]

_FIRST = 500  # position of a document's first word, so that no word of a query is at the same


class Words(nn.Module):
    """``m e + (1 - m) TF(e + p)``, 0 where there is no word."""

    def __init__(self, config: RankerConfig, chunk: int, overlap: int) -> None:
        super().__init__()
        if config.dim % config.heads:
            raise UserError(f"{config.dim} channels do not part into {config.heads} heads")
        self.chunk, self.overlap = chunk, overlap
        layer = nn.TransformerEncoderLayer(
            config.dim, config.heads, config.hidden, dropout=0.0, batch_first=True,
            activation=torch.relu,  # nn.functional.relu would have torch take a path that holds a T x T map
        )  # fmt: skip
        self.layers = nn.TransformerEncoder(layer, config.layers, enable_nested_tensor=False)
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
            places = _FIRST + torch.arange(x.shape[1], device=x.device)
            return self._read(x, real, sinusoids(places, x.shape[2]).to(x.dtype))
        chunks, held, kept = pack_chunks(x, real, self.chunk, self.overlap)
        if not len(chunks):
            return torch.zeros_like(x)
        read = self._read(chunks, held, self.document_places)
        return unpack_chunks(cores(read, self.overlap), kept, *x.shape[:2])

    def _read(self, x: Tensor, real: Tensor, places: Tensor) -> Tensor:
        hidden = ~real & real.any(1, keepdim=True)  # a row without a word has something to divide by
        y: Tensor = self.layers(x + places, src_key_padding_mask=hidden)
        return (self.mixed * x + (1 - self.mixed) * y) * real[..., None]
