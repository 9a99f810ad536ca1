# SPDX-License-Identifier: Apache-2.0
"""Tell RoPE the number of the frame, and let the tokens of a frame see each other: an image LLM that reads video.

Gao et al., "TC-LLaVA: Rethinking the Transfer from Image to Video Understanding with Temporal Considerations", arXiv
2409.03206. Two changes to the decoder, each an option:

- Temporal-aware dual RoPE: queries and keys are rotated by the token's index n and again, on the same channels, by its
  time t. R(gamma t) R(n) = R(n + gamma t), so it is RoPE at the positions ``n + gamma t``. Within a frame distances
  stay; tokens of frames f apart are ``gamma f`` further apart.
- Frame-wise block causal mask: a token sees the past, and a token of a frame also all of its own frame:
  ``allowed(i, j) = j <= i or (both visual and frame_j <= frame_i)``. Text stays causal.

t of a token is the number of frames that ended before it: 0 before the video, f in frame f = 0, 1, .., F behind it, and
frames of a second video go on counting. The paper's rule for text was not at hand; this is the monotone one. What is a
frame: every image of a LLaVA prompt, in its order. Models with M-RoPE have an axis of time already and are refused. A
prompt may be read in chunks that end between frames. ``mask=visual`` lets all frames of a prompt see each other (which
no cache read in chunks can), ``causal`` leaves the mask as it is.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..attention.image_layout import ImageLayout, block_mask, ranks
from ..errors import UserError
from ..strategy import ImagePositions

__all__ = ["TCLLaVA"]


@dataclass(frozen=True, kw_only=True)
class TCLLaVA(ImagePositions):
    """Positions with a time, and a mask by frames.

    Attributes:
        gamma: positions that a frame counts in addition.
        mask: ``frame``, ``visual`` or ``causal``.
    """

    one_axis: ClassVar[bool] = True

    gamma: float = field(default=1.0, metadata={"help": "positions that a frame counts in addition; 0 for plain RoPE"})
    mask: Literal["frame", "visual", "causal"] = field(
        default="frame", metadata={"help": "what tokens of frames see: their frame, all frames, or the past alone"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.gamma < float("inf"):
            raise UserError(f"{self.slug}: gamma is 0 or more, not {self.gamma}")

    def position_ids(self, layout: ImageLayout) -> Tensor:
        index = (layout.real.long().cumsum(1) - 1).clamp(min=0)
        moved = index + self.gamma * layout.seen
        moved = moved.long() if float(self.gamma).is_integer() else moved
        return torch.where(layout.real, moved, 0)

    def allowed(self, layout: ImageLayout, queries: int) -> Tensor:
        rank = ranks(layout, "raster")[0]
        if self.mask == "causal":
            return block_mask(layout, queries, rank)
        allowed = block_mask(layout, queries, torch.zeros_like(rank))
        if self.mask == "visual":
            visual = layout.visual & layout.real
            allowed = allowed | (visual[:, visual.shape[1] - queries :, None] & visual[:, None])
        return allowed
