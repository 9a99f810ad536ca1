# SPDX-License-Identifier: Apache-2.0
"""Keep what the question at the end of the prompt attends to, the same part of every chunk.

Corallo and Papotti, "FINCH: Prompt-guided Key-Value Cache Compression", arXiv 2408.00167. A question stands behind a
long text. Its queries say what of the text is needed, chunk by chunk, so that no part of the text is lost altogether:
of every chunk of ``chunk_size`` tokens the best-scored part ``budget`` stays. A query at position p spreads its weight
over p keys, so weights are multiplied by that number before they are averaged over the question, else late tokens of
the question count less:

    score_j = mean over queries t of the question, and over the heads of a group, of  p_t * softmax(q_t . k)_j

The question itself stays. Finch is told where it begins; here ``window_size`` says how many tokens it has, and a prompt
whose question is not known yet is compressed by its own end, as SnapKV does (without pooling).

Differs, as the authors' code in kvpress does: the text is read at once and not chunk by chunk with the question behind
each, so that the peak is a whole cache and a text longer than the model reads is not served. Kept keys keep their
rotary positions, here as everywhere (the paper moves them together).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..attention import reference
from ..errors import UserError
from ._strategy import LastQueries
from ._view import CacheView

__all__ = ["Finch"]


@dataclass(frozen=True, kw_only=True)
class Finch(LastQueries):
    """Keys that the question attends to, by chunks.

    Attributes:
        window_size: tokens of the question at the end of the prompt; they are never dropped.
        chunk_size: tokens of a chunk, 0 for one chunk.
        normalize: multiply weights by the number of keys that the query sees.
    """

    window_size: int = field(default=32, metadata={"help": "tokens of the question, at the end of the prompt"})
    chunk_size: int = field(default=512, metadata={"help": "tokens of a chunk, which keeps its part; 0 for all"})
    normalize: bool = field(default=True, metadata={"help": "weigh queries by how many keys they see"})

    def __post_init__(self) -> None:
        if self.chunk_size < 0:
            raise UserError("finch: chunk_size counts tokens, 0 for one chunk")
        super().__post_init__()

    def score(self, view: CacheView) -> Tensor:
        assert view.queries is not None
        heads = view.queries.q.shape[1]
        x = reference.logits(
            reference.widened(view.queries.q), reference.widened(view.k), scale=view.scale, softcap=view.softcap
        )
        asked = view.queries.positions[:, None, :, None]
        positions = reference.repeat_kv(view.positions[..., None], heads)[..., 0][:, :, None, :]
        weights = reference.softmax(x, (positions >= 0) & (positions <= asked), view.sinks)
        if self.normalize:
            weights = weights * asked.clamp(min=0)
        votes = weights.unflatten(1, (view.positions.shape[1], -1)).mean((2, 3))  # [B, Hs, N]
        return votes if not self.chunk_size else self._by_chunk(votes, view)

    def _by_chunk(self, votes: Tensor, view: CacheView) -> Tensor:
        """Minus the place of each token in its chunk over the chunk's size: the best of all are as many of each."""
        text = (view.positions >= 0) & (view.positions < (view.counts - self.window_size)[:, None, None])
        chunk = (view.positions // self.chunk_size).where(text, -1)
        # Sorted by votes, of equals the newer first, and then, stably, by chunk: places count within a chunk.
        order = votes.shape[2] - 1 - votes.flip(-1).argsort(dim=-1, descending=True, stable=True)
        by_chunk = chunk.gather(2, order).argsort(dim=-1, stable=True)
        order = order.gather(2, by_chunk)
        ordered = chunk.gather(2, order)
        first = torch.searchsorted(ordered.contiguous(), ordered.contiguous())
        size = torch.searchsorted(ordered.contiguous(), ordered.contiguous(), right=True) - first
        place = torch.arange(votes.shape[2], device=votes.device) - first
        part = -(place + 0.5) / size
        return torch.empty_like(votes).scatter(2, order, part.to(votes.dtype))
