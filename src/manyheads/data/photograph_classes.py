# SPDX-License-Identifier: Apache-2.0
"""Photographs of 32 x 32 pixels by what they show: CIFAR-10, 2,000 to learn from and 500 to judge by for each class."""

import io
import zipfile
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import files

__all__ = ["CLASSES", "available", "photographs"]

_FILE = "cifar10-25k"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def available() -> bool:
    """Whether the photographs are on this machine."""
    return files.local(_FILE) is not None


@cache
def photographs(split: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Photographs uint8 ``[N, 3, 32, 32]`` and the numbers of their classes ``[N]``, class by class.

    Raises:
        UserError: they cannot be had.
    """
    images, labels = [], []
    with zipfile.ZipFile(files.path(_FILE)) as archive:
        for name in sorted(archive.namelist()):
            if name.startswith(f"{split}/") and name.endswith(".jpg"):
                images.append(np.array(Image.open(io.BytesIO(archive.read(name))).convert("RGB")))
                labels.append(CLASSES.index(name.split("/")[1]))
    return torch.from_numpy(np.stack(images)).movedim(-1, 1).contiguous(), torch.tensor(labels)
