# SPDX-License-Identifier: Apache-2.0
"""Sparse attention of long prompts: chunks of keys are scored against blocks of queries, and the best are read.

Xiong et al., "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs", arXiv 2510.24606;
the mechanism of the paper, which the released code keeps as its legacy version. The model stays as it is:

    manyheads.use(model, "dhsa:budget=1024")                                        # chunks of 32 tokens
    fit_boundaries(model, ids, port=manyheads.use).save("boundaries")               # a minute, once for a model
    manyheads.use(model, "dhsa:budget=1024,boundaries=boundaries")                  # chunks that follow the text

A prompt's keys are cut into chunks, of one length or where a small network sees a boundary (:mod:`.boundaries`). Every
chunk has one vector, the mean of its keys times the square root of its length; a block of queries likewise. With c for
chunk and b for block,

    score[b, c] = (sum_{t in b} q_t / sqrt(|b|)) . (sum_{s in c} k_s / sqrt(|c|)),   q and k averaged over heads

The root is what a sum of |c| independent vectors grows by: the mean of a long chunk would vanish in the noise, the sum
of one would drown the others. Each token has the score of its chunk, and a block of queries reads the ``budget`` best
of those between the first and the local tokens, which it always reads. The last queries, the instruction, read
everything. Chunks and scores hold for all heads of a layer (``index``: or for a key/value or a query head each).

:mod:`.rival` has what it is compared with, at exactly equal pairs of query and key: block means, A-shape, vertical and
slash lines, MInference's choice among them, a random choice, and as a ceiling the true attention.

Left open by the paper, or chosen here. Keys are those after rotary positions, as the port gives them, each scaled to
root mean square 1 for the predictor. Of the last chunk that fits only in part its first tokens are read. The released
code decodes densely, as the default here does; ``decode=sparse`` chooses anew for every token, from sums over all keys,
so that it saves the reading of values and not that of keys, and learned boundaries are predicted anew each time. A
prompt that comes in pieces is cut into chunks of keys and blocks of queries anew in each, and the last queries of each
piece read everything. Rows of a batch are computed one after the other, each without its padding. With chunks of one
length the square root is a constant, and the strategy is a top-k of block means.
"""

from .boundaries import Boundaries, fit_boundaries
from .dhsa import DHSA
from .rival import Rival

__all__ = ["DHSA", "Boundaries", "Rival", "fit_boundaries"]
