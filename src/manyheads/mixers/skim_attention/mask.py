# SPDX-License-Identifier: Apache-2.0
"""The strongest of Skim-Attention's weights as a mask for an encoder that knows nothing of layout."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...call import AttentionCall, MixerConfig, Site
from ...errors import UserError
from ...spec import parse
from ...strategy import AttentionEdit
from .layout import check_boxes
from .skim_attention import SkimAttention, SkimMixer

__all__ = ["SkimmingMask", "load_map", "page_weights"]

By = Literal["skim", "nearest", "random"]


@dataclass(frozen=True, kw_only=True)
class SkimmingMask(AttentionEdit):
    """Each word sees the ``top_k`` words of the page that Skim-Attention gives most to, by head, in every layer.

    The boxes are those of one call of the model: :meth:`on_pages` binds them.

    Attributes:
        weights: folder of a page encoder trained with ``skim_attention``.
        top_k: words that a word sees.
        by: ``skim``; to compare with, the ``nearest`` words on the page, or ``random`` ones.
        seed: of the random ones.
        seen: which pairs are seen, ``[B, H, T, T]``, of the pages that it is bound to.
    """

    kinds: ClassVar[frozenset[str]] = frozenset({"self"})

    weights: str = field(default="", metadata={"help": "folder of a page encoder trained with skim_attention"})
    top_k: int = field(default=128, metadata={"help": "words that a word sees"})
    by: By = field(default="skim", metadata={"help": "skim, or to compare with it nearest or random"})
    seed: int = field(default=0, metadata={"help": "of random words"})
    seen: Any = field(default=None, compare=False, repr=False, metadata={"help": "set by on_pages(boxes)"})

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise UserError(f"{self.slug}: top_k counts words that a word sees, at least 1")

    def selects(self, site: Site) -> bool:
        return super().selects(site) and not site.causal

    def on_pages(self, boxes: Tensor, mixer: SkimMixer | None = None) -> "SkimmingMask":
        """The mask of pages, for the calls that read them.

        Args:
            boxes: ``[B, T, 4]`` of all tokens that the model is given, see
                :func:`~manyheads.mixers.skim_attention.token_boxes`. Tokens whose box is all zeros stand nowhere on the
                page (special tokens, padding): they see everything that the model's own mask lets them, and are seen.
            mixer: first layer of a trained page encoder, in place of the folder ``weights``.

        Raises:
            UserError: no boxes, or no trained weights where they are needed.
        """
        boxes = check_boxes(boxes)
        placed = boxes.any(-1)
        score = self._scores(boxes, mixer).masked_fill(~placed[:, None, None], -torch.inf)
        best = score.topk(min(self.top_k, boxes.shape[1]), -1).indices
        seen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
        return replace(self, seen=seen | ~placed[:, None, None] | ~placed[:, None, :, None])

    def _scores(self, boxes: Tensor, mixer: SkimMixer | None) -> Tensor:
        """By what keys are chosen, ``[B, H or 1, T, T]``."""
        pages, length = boxes.shape[:2]
        if self.by == "random":
            generator = torch.Generator().manual_seed(self.seed)
            return torch.rand(pages, 1, length, length, generator=generator).to(boxes.device)
        if self.by == "nearest":
            a, b = boxes[:, :, None].float(), boxes[:, None].float()
            gap = torch.maximum(a[..., :2] - b[..., 2:], b[..., :2] - a[..., 2:]).clamp(min=0).norm(dim=-1)
            middle = (a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]).norm(dim=-1) / 2
            score: Tensor = -(gap + 1e-3 * middle)[:, None]
            return score
        if mixer is None:
            mixer = load_map(self.weights).to(boxes.device)
        return page_weights(mixer, boxes)

    def edit(self, call: AttentionCall) -> AttentionCall:
        if self.seen is None:
            raise UserError(f"{self.slug}: give the boxes of what is read: use(model, strategy.on_pages(boxes))")
        size = (call.q.shape[0], call.q.shape[2], call.k.shape[2])
        if size != (self.seen.shape[0], *self.seen.shape[2:]):
            raise UserError(
                f"{self.slug}: {size[0]} rows of {size[1]} tokens are read, the boxes are of {self.seen.shape[0]} of "
                f"{self.seen.shape[2]}: bind the boxes of this call by on_pages(boxes)"
            )
        heads = torch.arange(call.q.shape[1], device=self.seen.device) % self.seen.shape[1]
        seen = self.seen[:, heads].to(call.q.device)
        return call.replace(mask=seen if call.mask is None else call.mask & seen)


@torch.no_grad()
def page_weights(mixer: SkimMixer, boxes: Tensor) -> Tensor:
    """Skim-Attention ``[B, H, T, T]`` of boxes ``[B, T, 4]``; 0 from and to what has none, all zeros.

    Args:
        mixer: the first layer of a trained page encoder, see :func:`load_map`, without a window.
        boxes: int64, 0 to 1000.
    """
    placed = boxes.any(-1)
    page = mixer.page(boxes, placed.long().cumsum(1) - 1, placed)
    weights = mixer.weights(page).float()
    at = (~placed).long().argsort(dim=1, stable=True).argsort(1)  # of each token, its column among those placed first
    heads, longest = weights.shape[1:3]
    rows = at.clamp(max=longest - 1)[:, None, :, None].expand(-1, heads, -1, longest)
    wide = weights.gather(2, rows).gather(
        3, at.clamp(max=longest - 1)[:, None, None].expand(-1, heads, at.shape[1], -1)
    )
    return wide * (placed[:, None, None] & placed[:, None, :, None])


def load_map(folder: str | Path) -> SkimMixer:
    """The first layer, with the layout's embeddings and its attention, of a page encoder that was trained and saved.

    Raises:
        UserError: the folder holds none, or it was trained with something else.
    """
    place, own = Path(folder), "blocks.0.mixer."
    if not folder or not (place / "config.json").is_file():
        raise UserError(
            "skim_attention.mask needs weights=FOLDER of a trained page encoder: manyheads compare --train --tasks "
            "form_labels --strategies skim_attention makes one"
        )
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    strategy = parse(config["strategy"])
    if not isinstance(strategy, SkimAttention) or strategy.window is not None:
        raise UserError(f"{folder} was trained with {config['strategy']}, not with skim_attention without a window")
    heads, dim = config["heads"], config["dim"]
    size = MixerConfig(
        dim, heads, config["kv_heads"] or heads, dim // heads, 0, config["layers"], config["length"], False
    )
    mixer = SkimMixer(size, strategy)
    held = load_file(place / "model.safetensors")
    mixer.load_state_dict({name.removeprefix(own): x for name, x in held.items() if name.startswith(own)})
    return mixer.eval()
