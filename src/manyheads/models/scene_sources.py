# SPDX-License-Identifier: Apache-2.0
"""What a pipeline of scenes does with images and videos that it did not make: latents, inversion, renoising."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..call import Prompt
from ..data import scenes as data
from ..diffusion._inversion import levels, path
from ..errors import UserError

__all__ = ["Sources", "predict"]


def predict(denoiser: nn.Module, latents: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    """The denoiser's output for ``latents``, by the names that its class gives its inputs.

    Args:
        denoiser: SD3Transformer2DModel, LatteTransformer3DModel, WanTransformer3DModel or UNet2DConditionModel.
        latents: ``[B, C, (F,) H, W]``.
        timestep: ``[B]`` or scalar, of 1,000.
        text: ``[B, 3, dim]``.
    """
    timestep = timestep.expand(latents.shape[0])
    given: dict[str, Any] = {"encoder_hidden_states": text, "timestep": timestep, "return_dict": False}
    name = type(denoiser).__name__
    given["sample" if name.startswith("UNet") else "hidden_states"] = latents
    if name.startswith("SD3"):
        given["pooled_projections"] = text.mean(1)
    out: Tensor = denoiser(**given)[0]
    return out


class Sources:
    """The part of a pipeline of scenes that takes images and videos."""

    captions: Any
    config: Any
    denoiser: Any
    scheduler: Any
    _packed: Any
    _tokens: Any

    def prompt_tokens(self, prompt: "str | list[str] | Tensor | None") -> tuple[Prompt, ...]:
        """The tokens of each prompt, each a word of its own; a missing one is none."""
        made = []
        for row in self._tokens(prompt).tolist():
            words = tuple(data.WORDS[token] for token in row)
            made.append(Prompt(tuple(row), tuple(i if word else -1 for i, word in enumerate(words)), words))
        return tuple(made)

    def invert(
        self, image: "Image.Image | list[Image.Image]", num_inference_steps: int = 20, iterations: int = 5,
        prompt: str = "",
    ) -> Tensor:  # fmt: skip
        """The noise ``[1, C, (F,) H, W]`` from which so many steps without guidance lead to an image or video.

        Args:
            image: is scaled to the pipeline's size; of a video its frames, of which as many as it makes are taken.
            num_inference_steps: of the call that is to start from it.
            iterations: see :func:`manyheads.diffusion.masactrl.invert`.
            prompt: what it shows; it is inverted without a caption where none is given.

        Raises:
            UserError: a video for a pipeline of images or the other way around, or a scheduler whose steps cannot be
                taken backwards.
        """
        return self.path(self.encode_frames(image), num_inference_steps, iterations, prompt)[0]

    def path(
        self, latents: Tensor, num_inference_steps: int = 20, iterations: int = 5, prompt: str | list[str] | Tensor = ""
    ) -> Tensor:  # fmt: skip
        """Latents ``[T + 1, B, C, (F,) H, W]`` by which T steps without guidance lead to ``latents``, noise first."""
        with torch.no_grad():
            text = self.captions(self._tokens(prompt).to(latents.device))
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        return path(self.scheduler, latents, lambda x, t: predict(self.denoiser, x, t, text), iterations)

    def latents(self, pixels: Tensor) -> Tensor:
        """Latents of images or videos ``[B, 3, (F,) H, W]`` in 0..1, of the pipeline's own size."""
        made: Tensor = self._packed((pixels * 2 - 1).to(self.denoiser.device, self.denoiser.dtype))
        return made

    def encode_frames(self, image: "Image.Image | list[Image.Image]") -> Tensor:
        """Latents ``[1, C, (F,) H, W]`` of an image, or of a video's frames.

        Raises:
            UserError: the pipeline makes the other of the two.
        """
        moving, frames = self.config.kind == "moving", image if isinstance(image, list) else [image]
        if moving != (len(frames) > 1):
            made, given = ("videos", "an image is none") if moving else ("images", "a video is none")
            raise UserError(f"this pipeline makes {made}, and {given}; use {'scenes' if moving else 'moving'}")
        side = data.WINDOW if moving else data.SIDE
        if moving:
            frames = [frames[i * len(frames) // data.FRAMES] for i in range(data.FRAMES)]
        pixels = [np.array(frame.convert("RGB").resize((side, side))) for frame in frames]
        x = torch.from_numpy(np.stack(pixels)).movedim(-1, 0)[None] / 255  # [1, 3, F, H, W]
        if not moving:
            return self.encode_images(x[:, :, 0])
        return self.latents(x)

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` of images ``[B, 3, H, W]`` in 0..1, which are brought to the pipeline's size.

        Raises:
            UserError: a pipeline of videos.
        """
        if self.config.kind == "moving":
            raise UserError("this pipeline makes videos, and an image is none; use scenes")
        if images.shape[-2:] != (data.SIDE, data.SIDE):
            images = interpolate(images, (data.SIDE, data.SIDE), mode="bilinear", antialias=True).clamp(0, 1)
        return self.latents(images)

    def renoise(
        self, latents: Tensor, noise: Tensor, prompt: str | list[str] | Tensor, share: float,
        num_inference_steps: int = 20, guidance_scale: float = 3.0, output_type: str = "pt",
    ) -> Any:  # fmt: skip
        """Add noise to ``latents [B, ...]``, as much as at a share of the steps from the end, and take it off again.

        Returns:
            what the pipeline's call does.

        SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations (arXiv 2108.01073).
        """
        self.scheduler.set_timesteps(num_inference_steps, device=latents.device)
        start = min(num_inference_steps - round(share * num_inference_steps), num_inference_steps - 1)
        x = levels(self.scheduler)[max(start, 0)][0].add_noise(latents, noise.to(latents))
        call: Any = self
        return call(
            prompt, latents=x, share=share, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale,
            output_type=output_type,
        )  # fmt: skip
