# SPDX-License-Identifier: Apache-2.0
"""Write what an image makes likelier: contrast with the same image under noise.

    logits = (1 + alpha) l(image) - alpha l(noisy image)

over tokens at least ``beta`` times as likely as the likeliest. What noise hides and a model says all the same comes
from its text alone, and is taken away. The noise is that of a diffusion process after ``noise`` of its 1000 steps, with
the released code's sigmoid schedule.

Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive Decoding (arXiv 2311.16922).
Both readings are one batch.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError
from ..writing import ModelAccess, Request, Written
from ._images import ImageDecoding, plausible

__all__ = ["VisualContrast", "noisy"]

_STEPS = 1000


def noisy(pixels: Tensor, step: int, generator: torch.Generator) -> Tensor:
    """Pixels after so many steps of diffusion, 0 to 1000."""
    betas = torch.linspace(-6, 6, _STEPS, dtype=torch.float64).sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    kept = float((1 - betas)[:step].prod())
    drawn = torch.randn(pixels.shape, generator=generator, device=generator.device).to(pixels)
    made: Tensor = kept**0.5 * pixels + (1 - kept) ** 0.5 * drawn
    return made


@dataclass(frozen=True, kw_only=True)
class VisualContrast(ImageDecoding):
    """Write about an image, against what would be written of the image under noise."""

    alpha: float = field(default=1.0, metadata={"help": "weight of the contrast; 0 for none"})
    beta: float = field(default=0.1, metadata={"help": "tokens at least so many times as likely as the likeliest"})
    noise: int = field(default=500, metadata={"help": "of 1000 diffusion steps"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or not 0 <= self.beta <= 1 or not 0 <= self.noise <= _STEPS:
            raise UserError(
                f"alpha={self.alpha}, beta={self.beta}, noise={self.noise}: alpha is 0 or more, beta in [0, 1], noise "
                f"in 0..{_STEPS}"
            )

    def write(self, request: Request, access: ModelAccess) -> Written:
        image, generator = access.image_columns(request.ids, self.spec), request.generator()
        pixels = request.given.get("pixel_values")
        if pixels is None:
            raise UserError(f"{self.spec} puts noise on pixel_values, and the request has none")
        blurred = {**request.given, "pixel_values": noisy(pixels, self.noise, generator)}

        def combined(logits: Tensor) -> Tensor:
            clear, dull = logits
            return plausible((1 + self.alpha) * clear - self.alpha * dull, clear, self.beta)

        with torch.inference_mode():
            seen = torch.ones(2, len(image), dtype=torch.bool, device=image.device)
            streams = access.readings(request.ids, seen, [request.given, blurred])
            return self.follow(request, streams, generator, combined)
