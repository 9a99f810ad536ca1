# SPDX-License-Identifier: Apache-2.0
"""Attention as a graph: a graph isomorphism network per head, and Sparse-GIN, an adapter of frozen language models.

"Graph-Aware Isomorphic Attention for Adaptive Dynamics in Transformers", by its released code
(lamm-mit/Graph-Aware-Transformers). Attention weights A are the edges of a graph of tokens. Layers to train from
scratch (``graph_gin_attention``) have no value projection, head h reads its own slice X_h of the normed input:

    A = softmax(alpha q k^T / (sqrt(d) temperature)), causal;   z = eps X_h + A X_h;   out_h = MLP_h(z)

with eps (0 at first, and eps, not 1 + eps, as the code has it) a number per head, alpha one per layer, MLP_h linear to
``r d``, dropout, RMSNorm, SiLU, linear, and the heads side by side. ``A X_h`` is SDPA with X_h for values, so that the
paper's best form (r = .5, alpha, no output projection: the defaults) runs on fused kernels and never holds A. Every
other ``adjacency`` and ``aggregate=pna`` (mean, longest, variance, shortest of the neighbours' values, then an MLP and
an output projection) read A a block of queries at a time; training holds it.

For a published decoder, frozen, ``graph_gin_attention.adapter`` (:mod:`.adapter`) adds between attention and
feed-forward of every layer

    x + lambda RMSNorm(W_out act(g + MLP(g))),   g_i = eps z_i + sum_j w_ij z_j,   z = W_in x
    w_ij = s(min(1, sum_h A_ij)) where that is above .6, else 0,   s(a) = sigmoid(10 (a - .1))

with lambda learned, at first 0 to .5 by depth. It is trained in minutes:

    python -m manyheads.recipes.graph_gin_attention --model MODEL --out FOLDER

The released code takes rows of A for the sources of edges and then keeps those that go to no earlier token, which of a
lower triangle leaves the diagonal: its tokens exchange nothing. ``intended`` is what the paper says, ``released`` what
the code does; ``bottleneck`` (w the identity), ``random`` (the edges' weights at other earlier tokens) and LoRA
(``graph_gin_attention.lora``) are what they are to be held against at equal parameters.

Where this differs: ``top_k`` counts the keys that a query sees, not the batch's length, so that decoding is one pass
over the text; PReLU has one slope a layer, as there; no gradient goes through the adapter's graph; dropout only in
training. Left out: mixtures of adjacencies, differential attention, and scores by an MLP of pairs of tokens.
"""

from .adapter import Adapter, Adapters, SparseGin
from .graph_gin_attention import GraphGinAttention
from .lora import Lora, LoraLayers

__all__ = ["Adapter", "Adapters", "GraphGinAttention", "Lora", "LoraLayers", "SparseGin"]
