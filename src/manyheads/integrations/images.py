# SPDX-License-Identifier: Apache-2.0
"""Images of a pipeline of diffusers: their latents, and what strategies make of those it gives."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import UserError
from ..inpainting import Inpainter

__all__ = ["encode", "put_back"]


def encode(pipe: Any, images: Tensor, height: int, width: int) -> Tensor:
    """Latents ``[B, C, height, width]`` of images ``[B, 3, H, W]`` in 0..1, as the pipeline's denoiser has them.

    The most likely ones of its autoencoder; a pipeline without one says them itself (``encode_images``).

    Raises:
        UserError: the pipeline has no way from images to latents, or to latents of another size.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None and not hasattr(pipe, "encode_images"):
        raise UserError(f"{type(pipe).__name__} has no autoencoder, so that no image can be given to it")
    if vae is None:
        made: Tensor = pipe.encode_images(images)
    else:
        scale = int(getattr(pipe, "vae_scale_factor", 8))
        images = images * 2 - 1
        if images.shape[-2:] != (height * scale, width * scale):
            images = interpolate(images, (height * scale, width * scale), mode="bilinear", antialias=True)
        found = vae.encode(images.to(vae.device, vae.dtype))
        z = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        made = (z - (getattr(vae.config, "shift_factor", None) or 0)) * vae.config.scaling_factor
    if made.shape[-2:] != (height, width):
        raise UserError(
            f"{type(pipe).__name__} packs its latents {list(made.shape[-2:])} as {height} x {width}; it fills no holes"
        )
    return made


def put_back(made: Any, output_type: Any, strategies: Sequence[Inpainter]) -> Any:
    """What a pipeline's call returns, with pixels that are kept as they were; latents and videos as they are."""
    if not strategies or output_type == "latent":
        return made
    bare = isinstance(made, (list, np.ndarray, Tensor))  # as a modular pipeline gives one of its outputs
    images = made if bare else made[0] if isinstance(made, tuple) else getattr(made, "images", None)
    if images is None or (isinstance(images, list) and not all(isinstance(x, Image.Image) for x in images)):
        return made
    pixels = _tensor(images)
    for strategy in strategies:
        pixels = strategy.kept(pixels)
    changed = _like(pixels, images)
    if bare:
        return changed
    return (changed, *made[1:]) if isinstance(made, tuple) else dataclasses.replace(made, images=changed)


def _tensor(images: Any) -> Tensor:
    """Images as pipelines give them, float32 ``[B, 3, H, W]`` in 0..1."""
    if isinstance(images, Tensor):
        return images
    if isinstance(images, list):
        images = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images])
    return torch.from_numpy(np.asarray(images, dtype=np.float32)).movedim(-1, 1)


def _like(pixels: Tensor, images: Any) -> Any:
    """Images in the form that a pipeline gave them in."""
    if isinstance(images, Tensor):
        return pixels
    made = pixels.movedim(1, -1).numpy()
    if isinstance(images, list):
        return [Image.fromarray(each) for each in (made * 255).round().astype("uint8")]
    return made
