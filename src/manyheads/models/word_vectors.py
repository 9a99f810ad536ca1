# SPDX-License-Identifier: Apache-2.0
"""Vectors of words from the company they keep, for models that begin with GloVe's where there is no download.

Levy and Goldberg, "Neural Word Embedding as Implicit Matrix Factorization", NeurIPS 2014: the positive pointwise mutual
information of words that stand close to each other, its leading singular vectors times the root of their values. Counts
fall with the distance and contexts are smoothed by a power of 0.75, as GloVe and word2vec have them.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["word_vectors"]

_SPREAD = 0.35  # RMS of an entry, GloVe's


def word_vectors(
    texts: Iterable[Sequence[int]], vocab: int, dim: int, *, window: int = 8, first: int = 2, seed: int = 0
) -> Tensor:
    """Vectors ``[vocab, dim]``, float32; 0 for the ids below ``first``, which are no words.

    Args:
        texts: ids of words.
        vocab: number of ids; the counts take ``4 vocab^2`` bytes.
        dim: of a vector; columns that the counts do not fill are drawn small.
        window: words on either side that keep a word company.
        first: ids from here on are words.
        seed: of what is drawn.
    """
    counts = torch.zeros(vocab, vocab)
    for text in texts:
        ids = torch.as_tensor(text, dtype=torch.long)
        for apart in range(1, min(window, len(ids) - 1) + 1):
            counts.index_put_((ids[:-apart], ids[apart:]), torch.tensor(1.0 / apart), accumulate=True)
    counts = counts + counts.T
    counts[:first] = counts[:, :first] = 0
    rows, columns = counts.sum(1), counts.sum(0) ** 0.75
    expected = rows[:, None] * (columns / columns.sum().clamp(min=1e-9))
    information = (counts / expected.clamp(min=1e-9)).clamp(min=1.0).log_()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, _ = torch.svd_lowrank(information, min(dim, vocab), niter=4)
    found = torch.randn(vocab, dim, generator=generator) * 1e-3
    found[:, : u.shape[1]] += u * s.sqrt()
    found = found * (_SPREAD / found[first:].square().mean().sqrt().clamp(min=1e-9))
    found[:first] = 0
    return found
