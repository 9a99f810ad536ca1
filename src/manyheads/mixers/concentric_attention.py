# SPDX-License-Identifier: Apache-2.0
"""Number the tokens of an image in rings from its edge to its centre, and let a ring see itself and those around it.

Xing et al., "Mitigating Object Hallucination via Concentric Causal Attention", NeurIPS 2024, arXiv 2410.15926. RoPE
lets attention fall with distance, and raster order puts the first rows of an image hundreds of positions from the
question: what is there is seen less, and made up. The patch of row r and column c of H x W lies in the ring

    ring(r, c) = min(r, c, H - 1 - r, W - 1 - c)

and has the position p0 + ring, where p0 text positions were before; text goes on at p0 + ceil(min(H, W) / 2). Of
24 x 24 patches none is more than 12 positions from the question, and 8.5 in the mean instead of 288.5. Within an image
a query sees the keys with ``ring_j <= ring_i``, so that the patches of one ring see each other; everything else stays
causal. What a model without the tower's own positions loses is where in its ring a patch is.

It acts on an unmodified model of transformers that reads images (LLaVA, Qwen2-VL, Qwen2.5-VL), which has to be trained
with it: positions of a model that was trained in raster order are no longer what it knows. There M-RoPE's three axes
all get the ring's position; each frame of a video is an image. ``position_ids`` of the caller's are replaced.

The released code knows square images of even side, one to a row and alike in the batch; here sizes, numbers of images
and padding are free, as the formulas say. ``positions`` and ``mask`` are the paper's two parts, of which ``raster`` is
a model as it is and ``reverse`` its control, raster order from the end.
"""

from dataclasses import dataclass, field

from torch import Tensor

from ..attention.image_layout import ImageLayout, Order, block_mask, block_positions, ranks
from ..strategy import ImagePositions

__all__ = ["ConcentricAttention"]


@dataclass(frozen=True, kw_only=True)
class ConcentricAttention(ImagePositions):
    """Positions and mask of image tokens by rings.

    Attributes:
        positions: order that positions follow.
        mask: order that the mask within an image follows.
    """

    positions: Order = field(default="ring", metadata={"help": "of image tokens: ring, raster or reverse"})
    mask: Order = field(default="ring", metadata={"help": "within an image: ring, raster or reverse"})

    def position_ids(self, layout: ImageLayout) -> Tensor:
        return block_positions(layout, *ranks(layout, self.positions))

    def allowed(self, layout: ImageLayout, queries: int) -> Tensor:
        return block_mask(layout, queries, ranks(layout, self.mask)[0])
