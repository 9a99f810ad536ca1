# SPDX-License-Identifier: Apache-2.0
"""Attention of the newest token, raised to a share of the image in every head that gives it less.

    with manyheads.use(model, "conscious_gaze.steering:columns=5-580"):
        model.generate(**inputs)

``columns`` are those of the image among the tokens that the model reads. This is the shift of Conscious Gaze at every
token; see :mod:`manyheads.decoding.conscious_gaze`.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ...attention import reference
from ...call import Site
from ...errors import UserError
from .._images import ColumnEdit

__all__ = ["Steering", "chosen_layers", "toward"]

Place = Literal["middle", "last"]


def toward(scores: Tensor, image: Tensor, target: float, shape: float = 0.0, sinks: Tensor | None = None) -> Tensor:
    """What to add to attention logits so that every head with less gives the image a mass of ``target`` exactly.

    Args:
        scores: ``[B, H, S]``, minus infinity where hidden.
        image: columns of the image, bool ``[S]``.
        target: mass, above 0 and below 1.
        shape: weight of the consensus, the mean over heads of attention within the image: ``log(n w_s)`` of its n
            visible columns is added, so that heads look where most heads look.
        sinks: ``[H]`` logits that take mass (gpt-oss).
    """
    rows = scores[:, :, None]
    text = reference.logsumexp(rows, ~image, sinks)[..., 0]  # [B, H]
    odds = reference.logsumexp(rows, image)[..., 0] - text
    want = math.log(target) - math.log1p(-target)
    added = torch.zeros_like(scores)
    if shape:
        visible = image & (scores > -torch.inf)
        agreed = reference.softmax(rows, image)[:, :, 0].mean(1, keepdim=True)
        count = visible.sum(-1, keepdim=True)
        added = torch.where(visible, shape * (count * agreed).clamp(min=1e-12).log(), 0.0)
    shaped = reference.logsumexp(rows + added[:, :, None], image)[..., 0] - text
    low = (odds < want) & odds.isfinite()  # an image that is hidden stays so
    return torch.where(low[..., None] & image, want - shaped[..., None] + added, 0.0)


def chosen_layers(count: int, place: Place) -> range:
    """Layers from a third to two thirds of ``count``, both included; or as many at the end."""
    first, last = count // 3, min(2 * count // 3, count - 1)
    return range(first, last + 1) if place == "middle" else range(count - 1 - last + first, count)


@dataclass(frozen=True, kw_only=True)
class Steering(ColumnEdit):
    """Raise the image's share of the newest token's attention, in the layers from a third to two thirds."""

    target: float = field(default=0.2, metadata={"help": "least share of attention for the image, in every head"})
    shape: float = field(default=0.0, metadata={"help": "weight of where heads agree to look; 0 for none"})
    place: Place = field(default="middle", metadata={"help": "layers where none are named: middle or last"})

    def __post_init__(self) -> None:
        if not 0 < self.target < 1 or self.shape < 0:
            raise UserError(f"target={self.target}, shape={self.shape}: target is in (0, 1), shape 0 or more")

    def selects(self, site: Site) -> bool:
        if not super().selects(site) or self.layers is not None or not site.peers:
            return super().selects(site)
        return site.layer in [site.peers[i] for i in chosen_layers(len(site.peers), self.place)]

    def shift(self, scores: Tensor, image: Tensor, sinks: Tensor | None) -> Tensor:
        return toward(scores, image, self.target, self.shape, sinks)
