# SPDX-License-Identifier: Apache-2.0
"""Boxes of words on a page, and embeddings of them.

A box is ``(x0, y0, x1, y1)``, left, top, right and bottom in integers from 0 to 1000, whatever the size of the page.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ...errors import UserError

__all__ = ["Axes", "LayoutEmbedding", "check_boxes", "token_boxes"]

Axes = Literal["all", "x", "y", "centre", "order", "none"]
_SIDE = 1000  # of a page
_TERMS = {
    "all": ("x0", "y0", "x1", "y1", "h", "w"), "x": ("x0", "x1", "w"), "y": ("y0", "y1", "h"), "centre": ("cx", "cy"),
    "order": ("x0",), "none": (),
}  # fmt: skip


class LayoutEmbedding(nn.Module):
    """``E_x[x0] + E_y[y0] + E_x[x1] + E_y[y1] + E_h[y1 - y0] + E_w[x1 - x0]`` of boxes.

    Args:
        dim: channels.
        axes: which of the terms are there; ``centre`` has ``E_x`` and ``E_y`` of the box's middle, ``order`` has
            ``E_x`` of the token's number in its text in place of a box, ``none`` has nothing.
        resolution: rows of a table; with less than 1001, boxes are rounded down to so many steps.
    """

    def __init__(self, dim: int, axes: Axes = "all", resolution: int = 1024) -> None:
        super().__init__()
        self.axes, self.resolution, self.dim = axes, resolution, dim
        names = dict.fromkeys(name.rstrip("01").replace("c", "") for name in _TERMS[axes])
        self.tables = nn.ModuleDict({name: nn.Embedding(resolution, dim) for name in names})

    def forward(self, boxes: Tensor | None, positions: Tensor) -> Tensor:
        """``[B, T, dim]`` of boxes ``[B, T, 4]``, int64; without any, of positions ``[B, T]`` in the text.

        What has no layout is a line of words of no size: its x is the number of the word.
        """
        if boxes is None or self.axes == "order":
            at, none = positions.clamp(0, self.resolution - 1), torch.zeros_like(positions)
            places = {"x0": at, "y0": none, "x1": at, "y1": none, "w": none, "h": none, "cx": at, "cy": none}
        else:
            x0, y0, x1, y1 = boxes.clamp(0, _SIDE).unbind(-1)
            exact = {
                "x0": x0, "y0": y0, "x1": x1, "y1": y1, "w": (x1 - x0).clamp(min=0), "h": (y1 - y0).clamp(min=0),
                "cx": (x0 + x1) // 2, "cy": (y0 + y1) // 2,
            }  # fmt: skip
            steps = min(self.resolution, _SIDE + 1)
            places = {name: value * steps // (_SIDE + 1) for name, value in exact.items()}
        terms = [self.tables[name.rstrip("01").replace("c", "")](places[name]) for name in _TERMS[self.axes]]
        return torch.stack(terms).sum(0) if terms else torch.zeros(*positions.shape, self.dim, device=positions.device)


def check_boxes(boxes: Tensor) -> Tensor:
    """``boxes [B, T, 4]`` as int64.

    Raises:
        UserError: they are of another shape, not whole numbers from 0 to 1000, or end before they begin.
    """
    if boxes.ndim != 3 or boxes.shape[2] != 4:
        raise UserError(f"boxes are [pages, tokens, 4], not {list(boxes.shape)}; one page is boxes[None]")
    whole = boxes.long()
    if not torch.equal(whole.to(boxes.dtype), boxes) or (boxes.numel() and not 0 <= boxes.min() <= boxes.max() <= 1000):
        raise UserError("boxes are whole numbers from 0 to 1000: divide by the size of the page, times 1000, and round")
    if bool((whole[..., 2:] < whole[..., :2]).any()):
        raise UserError("a box ends before it begins: write it as x0, y0, x1, y1, y from the top")
    return whole


def token_boxes(word_ids: Sequence[int | None], boxes: Tensor) -> Tensor:
    """Boxes ``[T, 4]`` of a tokenizer's pieces, each that of its word; zeros where a piece is of no word.

    Args:
        word_ids: number of the word of each piece, as ``word_ids()`` of an encoding of transformers gives it; None for
            special tokens and padding.
        boxes: ``[words, 4]``.
    """
    whole = torch.cat([boxes, boxes.new_zeros(1, 4)])
    return whole[[len(boxes) if word is None else word for word in word_ids]]
