# SPDX-License-Identifier: Apache-2.0
"""Attention to the image amplified at every token, and contrast with what text alone would say.

Logits of the newest token on image columns become ``s + alpha |s|`` in layers from ``start_layer`` on, and the next
token goes by

    gamma log p(image, text) - (gamma - 1) log p(text)

over tokens at least ``beta`` times as likely as the likeliest.

Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in LVLMs (arXiv 2407.21771). Where
the paper leaves the image's tokens out of the second reading, they are hidden here, at unchanged positions; both
readings are one batch. With ``gamma=1`` there is one reading. For ``generate`` of transformers the amplification alone
is an edit of attention, to whose image ``columns`` have to be named:

    with manyheads.use(model, "pai:columns=5-580"):
        model.generate(**inputs)
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..call import Site
from ..errors import UserError
from ..writing import ModelAccess, Request, Written
from ._images import ColumnEdit, ImageDecoding, Switch, Switched, plausible

__all__ = ["MoreAttention"]


@dataclass(frozen=True, kw_only=True)
class MoreAttention(ColumnEdit, ImageDecoding):
    """Write about an image with attention to it amplified, against what text alone would say."""

    alpha: float = field(default=0.5, metadata={"help": "of the size of an image column's logit, added to it"})
    gamma: float = field(default=1.1, metadata={"help": "weight of the contrast with text alone; 1 for none"})
    beta: float = field(default=0.1, metadata={"help": "tokens at least so many times as likely as the likeliest"})
    start_layer: int = field(default=2, metadata={"help": "first layer that is amplified where none are named"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or self.gamma < 1 or not 0 <= self.beta <= 1 or self.start_layer < 0:
            raise UserError(
                f"alpha={self.alpha}, gamma={self.gamma}, beta={self.beta}, start_layer={self.start_layer}: alpha and "
                "start_layer are 0 or more, gamma 1 or more, beta in [0, 1]"
            )

    def selects(self, site: Site) -> bool:
        return super().selects(site) and (self.layers is not None or (site.layer or 0) >= self.start_layer)

    def shift(self, scores: Tensor, image: Tensor, sinks: Tensor | None) -> Tensor:
        return torch.where(image & scores.isfinite(), self.alpha * scores.abs(), 0.0)

    def write(self, request: Request, access: ModelAccess) -> Written:
        image, generator = access.image_columns(request.ids, self.spec), request.generator()
        inner = replace(self, columns=tuple(image.nonzero()[:, 0].tolist()))
        seen = torch.stack([torch.ones_like(image), ~image])[: 1 if self.gamma == 1 else 2]
        if not bool(seen[:, 0].all()):
            raise UserError(f"{self.spec} hides images, and the prompt begins with one: begin it with a start of text")
        switch = Switch()

        def combined(logits: Tensor) -> Tensor:
            told = logits[0]
            if len(logits) > 1:
                with_image, alone = logits.log_softmax(-1)
                told = self.gamma * with_image - (self.gamma - 1) * alone
            return plausible(told, logits[0], self.beta)

        with access.use(Switched(inner=inner, switch=switch)), torch.inference_mode():
            streams = access.readings(request.ids, seen, [request.given] * len(seen))
            switch.on = True
            return self.follow(request, streams, generator, combined)
