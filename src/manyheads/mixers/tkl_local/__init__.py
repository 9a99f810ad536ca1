# SPDX-License-Identifier: Apache-2.0
"""TKL: long documents are ranked by local attention in overlapping chunks, and by their best passages.

Hofstaetter et al., "Local Self-Attention over Long Text for Efficient Document Retrieval", SIGIR 2020,
arXiv 2005.04908. A document is cut into chunks of ``chunk`` words with ``overlap`` more on either side; a transformer
reads each chunk by itself, at the same positions p in every chunk, and the words of the core are kept. Chunks of
padding alone are not computed. With word vectors e of query and document:

    e'      = m e + (1 - m) TF(e + p)                            one TF, of two post-norm layers, and one learned m
    K_k     = exp(-(cos(q'_i, d'_j) - mu_k)^2 / 2 sigma^2)       11 kernels, from an exact match to its opposite
    x       = sum of K_k over a window of 30 words, every 2      by query word i, window and kernel
    sat(x)  = a max(x, 1e-10)^(1 / b) - c                        a, b, c of query word and words in the window; ~ ln x
    window  = w . sum_i sat(x)
    score   = v . (the 3 best windows apart from each other, and 2 neighbours on either side of each)

It is a ``Ranker``, and the attention alone is a layer of an ``Encoder``: words of a core attend to their chunk, and are
told their places in it. There each layer cuts anew, so that layers see further; in the ranker all read one chunk.

Where the released code differs, this keeps to the paper. It takes a window's score of exactly 0 for an empty window,
counts the window at a border once for each neighbour that is missing, and has more windows the longer the padding is
that a batch needs. Here a missing neighbour adds nothing, and windows end with the text. Sums over windows are made
without a running sum, which cancels what ``ln x`` looks at. As there, unknown words count as padding, and the inputs of
a, b and c go through one LayerNorm, which leaves little but which is larger.

``chunk=0`` is attention over all of a document with sinusoids for positions (TK's way, arXiv 2002.01854, in which they
are learned too, up to the greatest length), ``regions=0`` sums kernels over the whole document, and ``saturation=log``
is TK's logarithm: with all three it is TK.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...attention.chunks import cores, pack_chunks, unpack_chunks
from ...attention.masks import each_text
from ...attention.positions import sinusoids
from ...call import MixerConfig
from ...errors import UserError
from ...strategy import Mixer, Ranker, RankerConfig
from .._mixer import projections, split_heads, whole
from ._scoring import PassageScore
from ._words import Words

__all__ = ["TKL"]


@dataclass(frozen=True, kw_only=True)
class TKL(Mixer, Ranker):
    """Local attention in overlapping chunks, and a ranker around it."""

    directions: ClassVar = ("bidirectional",)

    chunk: int = field(default=40, metadata={"help": "words of a chunk's core; 0: the whole document is one"})
    overlap: int = field(default=5, metadata={"help": "words read on either side of a core"})
    window: int = field(
        default=30, metadata={"help": "words of a passage that is scored; every second word begins one"}
    )
    regions: int = field(default=3, metadata={"help": "best passages that count; 0: kernels of the whole document"})
    saturation: Literal["embedding", "log"] = field(
        default="embedding", metadata={"help": "of matches: by query word and passage, or log (TK's)"}
    )
    terms: int = field(default=2000, metadata={"help": "words of a document that are read at most"})

    def __post_init__(self) -> None:
        if min(self.chunk, self.overlap, self.regions) < 0 or self.terms < 1:
            raise UserError("tkl_local: chunk, overlap and regions are 0 or more, terms 1 or more")
        if self.window < 2 or self.window % 2:
            raise UserError(f"tkl_local: every second word begins a window: give an even one, not {self.window}")

    def build(self, config: MixerConfig) -> nn.Module:
        if config.causal:
            raise UserError("tkl_local: is encoder attention; a chunk's words see those behind them")
        return ChunkAttention(config, self)

    def ranker(self, config: RankerConfig) -> nn.Module:
        return TKLRanker(config, self)


class TKLRanker(nn.Module):
    """Words in their context, and the score of a document by its best passages."""

    def __init__(self, config: RankerConfig, strategy: TKL) -> None:
        super().__init__()
        self.words = Words(config, strategy.chunk, strategy.overlap)
        self.passages = PassageScore(config.dim, strategy.window, strategy.regions, strategy.saturation)

    def query(self, x: Tensor, real: Tensor) -> Tensor:
        """Vectors ``[B, Q, dim]`` of a query's words in their context, of ``x [B, Q, dim]``; 0 where not ``real``."""
        return self.words.query(x, real)

    def document(self, x: Tensor, real: Tensor) -> Tensor:
        """Likewise of a document's."""
        return self.words.document(x, real)

    def score(self, query: Tensor, query_real: Tensor, document: Tensor, document_real: Tensor) -> Tensor:
        """Scores ``[B]``, float32, of vectors ``[B, Q, dim]`` and ``[B, T, dim]``."""
        wide = torch.promote_types(query.dtype, torch.float32)  # a kernel is a tenth of a cosine wide
        with torch.autocast(query.device.type, enabled=False):
            y: Tensor = self.passages(query.to(wide), query_real, document.to(wide), document_real)
        return y


class ChunkAttention(nn.Module):
    """Multi-head attention of the words of a core to those of its chunk; no positions but those within a chunk."""

    def __init__(self, config: MixerConfig, strategy: TKL) -> None:
        super().__init__()
        self.config, self.strategy = config, strategy
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = projections(config)
        if strategy.chunk:
            self.places = nn.Parameter(sinusoids(torch.arange(strategy.chunk + 2 * strategy.overlap), config.dim))

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, state: Any = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Output ``[B, T, dim]`` of ``x [B, T, dim]``, padded anywhere by ``mask`` or packed; there is no state."""
        whole(state)
        return each_text(self._attend, x, mask, cu_seqlens), None

    def _attend(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """Texts ``x [N, T, dim]`` that begin at column 0, of ``lengths [N]``."""
        count, length = x.shape[:2]
        real = x.new_ones(count, length, dtype=torch.bool)
        if lengths is not None:
            real = torch.arange(length, device=x.device) < lengths[:, None]
        if not self.strategy.chunk:
            places = sinusoids(torch.arange(length, device=x.device), x.shape[2]).to(x.dtype)
            return self._chunk(x + places, x + places, real)
        chunks, held, kept = pack_chunks(x, real, self.strategy.chunk, self.strategy.overlap)
        chunks = chunks + self.places.to(x.dtype)
        return unpack_chunks(self._chunk(cores(chunks, self.strategy.overlap), chunks, held), kept, count, length)

    def _chunk(self, asking: Tensor, x: Tensor, real: Tensor) -> Tensor:
        """Words ``asking [P, Q, dim]`` attend to ``x [P, S, dim]`` where it is ``real [P, S]``."""
        config = self.config
        q = split_heads(self.q_proj(asking), config.num_heads)
        k, v = (split_heads(p(x), config.num_kv_heads) for p in (self.k_proj, self.v_proj))
        seen = (real | ~real.any(1, keepdim=True))[:, None, None]  # a text of no word has something to divide by
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, seen, scale=config.head_dim**-0.5, enable_gqa=config.num_heads != config.num_kv_heads
        )
        y: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return y
