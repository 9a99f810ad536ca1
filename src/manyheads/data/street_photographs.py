# SPDX-License-Identifier: Apache-2.0
"""Photographs of streets from a driving car: CamVid, 480 x 360 pixels, two drives. For research; see ``files.toml``."""

import io
import zipfile

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import files

__all__ = ["available", "photographs"]

_FILE = "camvid-39"


def available() -> bool:
    """Whether the photographs are on this machine."""
    return files.local(_FILE) is not None


def photographs(side: int, count: int = 39) -> Tensor:
    """The middle squares of ``count`` photographs, spread over both drives: float32 ``[N, 3, side, side]`` in 0..1.

    Raises:
        UserError: they cannot be had.
    """
    with zipfile.ZipFile(files.path(_FILE)) as archive:
        names = sorted(archive.namelist())
        kept = [names[i * len(names) // min(count, len(names))] for i in range(min(count, len(names)))]
        images = [Image.open(io.BytesIO(archive.read(name))).convert("RGB") for name in kept]
    made = []
    for image in images:
        left, edge = (image.width - image.height) // 2, image.height
        square = image.crop((left, 0, left + edge, edge)).resize((side, side), Image.Resampling.BICUBIC)
        made.append(torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255)
    return torch.stack(made)
