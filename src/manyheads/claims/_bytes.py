# SPDX-License-Identifier: Apache-2.0
"""What claims on byte language models share: text, the same draws for every arm, intervals over seeds."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from manyheads.claims._old import Figure
    from manyheads.compare.stats import Estimate
    from manyheads.training import BatchFn
    from manyheads.training.language import Batch

__all__ = ["Corpus", "corpus", "estimate", "text_draw", "windows"]


@dataclass(frozen=True, slots=True)
class Corpus:
    """Bytes to train on, to tune and calibrate with, and to judge by, uint8 each; no file is in two of them."""

    train: "Tensor"
    tune: "Tensor"
    test: "Tensor"


def corpus() -> Corpus:
    """The standard library's source: eight of ten files to train on, one to tune with, one to judge by."""
    import torch

    from manyheads.data.texts import standard_library

    files = [text.content.encode() for text in standard_library()]
    random.Random(0).shuffle(files)
    parts = [[f for i, f in enumerate(files) if i % 10 in digits] for digits in (range(8), [8], [9])]
    return Corpus(*(torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts))


def windows(data: "Tensor", count: int, length: int, seed: int) -> "Tensor":
    """``count`` stretches of ``data``, one in each equal part of it: int64 ``[count, length + 1]``."""
    import torch

    room = len(data) // count
    if room < length + 1:
        raise ValueError(f"{len(data)} bytes do not hold {count} windows of {length + 1}")
    start = torch.randint(room - length, (count,), generator=torch.Generator().manual_seed(seed))
    return data[(torch.arange(count) * room + start)[:, None] + torch.arange(length + 1)].long()


def text_draw(data: "Tensor", batch: int, length: int, seed: int, device: str) -> "BatchFn[Batch]":
    """Random stretches of ``data``: what a step gets depends on seed and step alone."""
    import torch

    def draw(step: int) -> "tuple[Tensor, Tensor | None]":
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        start = torch.randint(len(data) - length, (batch, 1), generator=generator)
        return data[start + torch.arange(length + 1)].long().to(device), None

    return draw


def estimate(
    figures: "list[Figure]", label: str, values: "Sequence[Sequence[float]] | torch.Tensor", unit: str = ""
) -> "Estimate":
    """Mean of ``values [seeds, texts]``, its interval over seeds or, with one seed, over texts; adds a figure."""
    import numpy as np

    from manyheads.claims._old import Figure
    from manyheads.compare import stats

    table = np.array([[float(x) for x in row] for row in values], dtype=float)
    each = table.mean(1) if len(table) > 1 else table[0]
    found = stats.mean(each, np.arange(len(each), dtype=float), 0, label)
    figures.append(Figure(label, found.value, found.n, found.low, found.high, unit))
    return found
