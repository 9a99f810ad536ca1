# SPDX-License-Identifier: Apache-2.0
"""A message of bits hidden in what a frozen language model writes: trained cross-attention, and a trained reader.

"Cross-Attention Watermarking of Large Language Models" (2401.06829). Layers are added to a decoder that stays as it is;
in them its stream x attends to the embeddings M of a message's bits, one of two learned vectors for each bit:

    x + r tanh(g) XAttn(norm(x), M),  then  x + r tanh(g') FFN(norm(x))

between blocks (``xattn_watermark``, gated cross-attention), or within blocks between attention and feed-forward
(``xattn_watermark.substituted``, decoder layers replaced by ones with cross-attention). A bidirectional transformer,
the extractor, reads the bits from the text alone. Both are trained together on

    BCE(bits, extractor(edit(draw(q)))) + quality * max(0, KL(q || p) - allowed)

with q the watermarked and p the plain next-token distribution, tokens drawn by straight-through Gumbel-softmax, and
edits (deletion, insertion, substitution, swaps, pieces in another order) for robustness; then the extractor alone goes
on with texts that the watermarked model wrote. The text counts as marked with message m where it agrees with more bits
than chance: ``P[Binomial(b, 1/2) >= matches]``, which holds of texts and extractor whatever they are where m was drawn
at random.

    python -m manyheads.recipes.xattn_watermark --model MODEL --out FOLDER --bits 8
    manyheads.reply(model, tokenizer, "...", "xattn_watermark:weights=FOLDER,message=10110010 + sampling")
    manyheads.detect("...", "xattn_watermark:weights=FOLDER,message=10110010", tokenizer)

The paper's text gives few sizes, and there is no released code. Chosen here: gates that start at 0, so that at first
nothing changes, one layer in three blocks of the upper half, r the stream's size at the start, draws behind the
corpus' own text (one forward for all places), ``allowed`` (0 is the plain sum), whitened embeddings of the model as the
extractor's table. Left out: training whole substituted layers (they keep the frozen weights) and attacks by a
paraphrasing model. What is hidden depends on how much choice the text leaves: where the next token is sure, nothing is.

Costs: a few small layers a token; the message's keys and values are computed once.
"""

from .edits import EDITS, edited
from .embedder import Embedder
from .extractor import Extractor
from .substituted import Substituted
from .xattn_watermark import XattnWatermark

__all__ = ["EDITS", "Embedder", "Extractor", "Substituted", "XattnWatermark", "edited"]
