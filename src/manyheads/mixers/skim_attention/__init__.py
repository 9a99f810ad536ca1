# SPDX-License-Identifier: Apache-2.0
"""Attention of words on a page by where they stand alone: computed once, shared by all layers, or made a mask.

Nguyen et al., "Skim-Attention: Learning to Focus via Document Layout", arXiv 2109.01078. Of the box of a word,
left, top, right and bottom in 0..1000,

    l = LayerNorm(E_x[x0] + E_y[y0] + E_x[x1] + E_y[y1] + E_h[y1 - y0] + E_w[x1 - x0])
    A = softmax(l W_q (l W_k)^T / sqrt(d))            [heads, T, T], once for a page
    h = h + (A h W_v) W_o, h = h + FFN(h)             in every layer, W_v and W_o of its own

so that what looks at what is said by layout, what is seen by text, and queries, keys and a softmax are computed once in
place of once a layer. The order of the words plays no part. ``axes=order`` puts a word's number in the place of its
box, ``axes=centre`` knows the middle of a box alone, ``window`` is LongSkimformer's, over words near in the text.

    manyheads compare --train --tasks form_labels --strategies skim_attention,skim_attention.embeddings

:mod:`.embeddings` adds the same embeddings to the words of an encoder with softmax attention: LayoutLM's sum, and the
paper's BERT+SkimEmbeddings. :mod:`.mask` is SkimmingMask, the ``top_k`` largest of A by head as a mask for every layer
of an encoder that was trained without layout:

    skim = manyheads.parse("skim_attention.mask:weights=FOLDER,top_k=128")
    boxes = token_boxes(encoding.word_ids(), word_boxes)[None]
    with manyheads.use(model, skim.on_pages(boxes)):
        model(**encoding)

Differs from the released code: blocks are those that all mixers here have (pre-norm, RMSNorm, SwiGLU, no dropout), and
there are no segment embeddings; a model that is given no boxes takes the words' numbers, as with ``axes=order``.
``context=2`` is its optional encoder over the layouts, which is off by default there and on in its pre-trained model.
In a mask, special tokens see and are seen, where the released code gives them boxes; an encoder with more heads than
the map goes through the map's heads in turn. The paper's pre-training on documents is not here: maps are trained on
labels of generated forms.
"""

from .embeddings import SkimEmbeddings
from .layout import LayoutEmbedding, check_boxes, token_boxes
from .mask import SkimmingMask, load_map, page_weights
from .skim_attention import SkimAttention, SkimMixer, layout_weights

__all__ = [
    "LayoutEmbedding", "SkimAttention", "SkimEmbeddings", "SkimMixer", "SkimmingMask", "check_boxes", "layout_weights",
    "load_map", "page_weights", "token_boxes",
]  # fmt: skip
