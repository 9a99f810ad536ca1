# SPDX-License-Identifier: Apache-2.0
"""What DHSA is compared with: other ways to choose the tokens of a block of queries, as many of them.

    block_mean      the chunks of one length whose mean key has the greatest product with the mean query
    a_shape         the most recent tokens: first ones and a window (StreamingLLM, arXiv 2309.17453)
    vertical_slash  half the budget for keys that the last ``estimate`` queries of the prompt attend to, the other half
                    for distances at which they attend (MInference, arXiv 2407.02490)
    minference      of these three the one, head by head, that holds most of the last queries' attention, which
                    MInference decides beforehand for a model and FlexPrefill at run time, as here
    random          chunks at random
    oracle          the keys to which the block's queries truly attend most: no method, the ceiling of all of them

Released kernels read a slash line in blocks; here its keys are counted one by one, and a key's score is the sum of what
the block's queries would give to it by distance, so that all choices cost the same pairs.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...attention.block_pattern import edges
from ...attention.reference import block_size, repeat_kv, widened
from ...errors import UserError
from .._sparse import Row, Spans, SparseAttention, grouped
from .dhsa import chunk_scores, even

__all__ = ["Rival"]

By = Literal["block_mean", "a_shape", "vertical_slash", "minference", "random", "oracle"]


@dataclass(frozen=True, kw_only=True)
class Rival(SparseAttention):
    """Another choice of as many tokens.

    Attributes:
        by: what chooses, see the head of this file.
        chunk: tokens of a chunk, for ``block_mean`` and ``random``.
        estimate: last queries that vertical and slash lines are estimated from.
        vertical: share of the budget for vertical lines.
        seed: of a random choice.
    """

    by: By = field(default="block_mean", metadata={"help": "block_mean, a_shape, vertical_slash, minference, ..."})
    chunk: int = field(default=32, metadata={"help": "tokens of a chunk, for block_mean and random"})
    estimate: int = field(default=64, metadata={"help": "last queries that lines are estimated from"})
    vertical: float = field(default=0.5, metadata={"help": "share of the budget for vertical lines"})
    seed: int = field(default=0, metadata={"help": "of a random choice"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.chunk, self.estimate) < 1 or not 0 <= self.vertical <= 1:
            raise UserError(
                "dhsa.rival: chunk and estimate count tokens, at least 1; vertical is a share of the budget"
            )
        if self.by == "minference" and self.index == "shared":
            raise UserError("dhsa.rival: minference chooses head by head: index=query, or index=kv")

    def choose(self, row: Row) -> Spans:
        if self.by == "minference":
            return self._best(row)
        return self._chosen(row, self.by)

    def _chosen(self, row: Row, by: By) -> Spans:
        """The tokens that one way chooses."""
        size, device = row.keys.shape[1], row.k.device
        if by == "vertical_slash":
            return self._lines(row)
        if by in ("block_mean", "random"):
            bounds = even(size, self.chunk, device)
            scores = chunk_scores(row, bounds, self.block, self.sets(row), "mean")
            if by == "random":
                source = torch.Generator().manual_seed(self.seed * 1_000_003 + row.layer)
                scores = torch.rand(scores.shape, generator=source).to(device)
            return self.filled(scores, bounds, row)
        every = even(size, 1, device)
        if by == "oracle":
            return self.filled(self._attention(row), every, row)
        count = len(edges(row.queries.shape[1], self.block, 0, device)[0])
        return self.filled(torch.arange(float(size), device=device).expand(1, count, -1), every, row)

    def _weights(self, q: Tensor, row: Row, column: int) -> Tensor:
        """Attention of ``q [H, m, d]``, which stand at ``column`` and behind it, mean by index: ``[I, m, S]``."""
        x = widened(q) @ repeat_kv(widened(row.k)[None], len(q))[0].mT * row.scale
        columns = torch.arange(row.k.shape[1], device=q.device)
        seen = row.rule.allows((column + torch.arange(q.shape[1], device=q.device))[:, None], columns)
        weights = x.masked_fill(~seen, -torch.inf).softmax(-1)
        return grouped(weights, self.sets(row))

    def _attention(self, row: Row) -> Tensor:
        """What each block of queries gives to each key, ``[I, n, S - tail]``."""
        q, size = row.queries, row.keys.shape[1]
        step = max(1, block_size(q, len(q) * row.k.shape[1]) // self.block) * self.block
        found = []
        for start in range(0, q.shape[1], step):
            weights = self._weights(q[:, start : start + step], row, size - q.shape[1] + start)[..., :size]
            padded = torch.nn.functional.pad(weights, (0, 0, 0, -weights.shape[1] % self.block))
            found.append(padded.unflatten(1, (-1, self.block)).sum(2))
        return torch.cat(found, 1)

    def _last(self, row: Row) -> Tensor:
        """Attention of the last ``estimate`` queries, ``[I, m, S]``."""
        few = min(self.estimate, row.q.shape[1])
        return self._weights(row.q[:, row.q.shape[1] - few :], row, row.k.shape[1] - few)

    def _lines(self, row: Row) -> Spans:
        """Half the budget by column, half by distance."""
        weights, (begin, end), size = self._last(row), self._edges(row), row.keys.shape[1]
        every = even(size, 1, weights.device)
        columns = weights.sum(1)[:, None, :size].expand(-1, len(begin), -1)
        upright = self.filled(columns, every, row, int(self.budget * self.vertical)).tokens()
        length, whole = weights.shape[1], weights.shape[2]
        at = torch.arange(whole, device=weights.device)
        distance = (whole - length + torch.arange(length, device=weights.device))[:, None] - at
        lines = weights.new_zeros(len(weights), whole + 1)  # those behind a query go to the last place
        lines.scatter_add_(1, torch.where(distance < 0, whole, distance).flatten().expand(len(weights), -1),
                           weights.flatten(1))  # fmt: skip
        sums = torch.nn.functional.pad(lines[:, :whole].cumsum(1), (1, 0))
        near, far = ((x[:, None] - every[:-1]).clamp(min=-1) for x in (begin, end))
        score = sums[:, (far + 1).clamp(max=whole)] - sums[:, near.clamp(min=0)]
        return self.filled(torch.where(upright, torch.inf, score), every, row)

    def _best(self, row: Row) -> Spans:
        """For each head the way whose choice for the last block holds most of the last queries' attention."""
        weights = self._last(row).sum(1)[:, : row.keys.shape[1]]
        ways: tuple[By, ...] = ("a_shape", "vertical_slash", "block_mean")
        made = torch.stack([self._chosen(row, by).tokens().expand(len(weights), -1, -1) for by in ways])
        held = torch.where(made[:, :, -1], weights, 0.0).sum(-1)  # [ways, I]
        best = made[held.argmax(0), torch.arange(len(weights), device=weights.device)]
        columns = torch.arange(best.shape[2], device=best.device)
        return Spans(columns.expand(best.shape[1:]), best.long(), columns)
