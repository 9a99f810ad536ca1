# SPDX-License-Identifier: Apache-2.0
"""The kind of strategies that fill a hole of an image and keep the rest."""

from abc import abstractmethod
from typing import TYPE_CHECKING

from .strategy import DenoiserPrediction

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Inpainter"]


class Inpainter(DenoiserPrediction):
    """Has a denoiser fill a hole of an image; what is around the hole comes back as it was.

    Attributes:
        source: the image's file, empty where there is none or it is given otherwise.
    """

    source: str

    @abstractmethod
    def kept(self, images: "Tensor") -> "Tensor":
        """What a pipeline made, float32 ``[B, 3, H, W]`` in 0..1, with the pixels that are kept put back."""
