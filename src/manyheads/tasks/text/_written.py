# SPDX-License-Identifier: Apache-2.0
"""What generated texts are like beside one another and beside what people wrote: self-BLEU, distinct n-grams, MAUVE."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["cells", "distinct", "mauve", "self_bleu"]

_ROUNDS = 12  # of k-means
_SCALE = 5.0  # of a divergence, as MAUVE has it


def _grams(tokens: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def self_bleu(texts: Sequence[Sequence[int]], order: int = 4) -> float:
    """Mean BLEU of each text with the others as its references, in [0, 1]: 1 where all say the same.

    Precisions of n-grams above words are smoothed by one (Lin and Och, 2004): short texts may share none.
    """
    found = []
    for i, text in enumerate(texts):
        others = [other for j, other in enumerate(texts) if j != i]
        if not text or not any(others):
            found.append(0.0)
            continue
        total = 0.0
        for n in range(1, order + 1):
            own = _grams(text, n)
            most: Counter[tuple[int, ...]] = Counter()
            for other in others:
                most |= _grams(other, n)
            shared, extra = sum((own & most).values()), int(n > 1)
            total += math.log(max((shared + extra) / (max(0, len(text) - n + 1) + extra), 1e-9)) / order
        nearest = min((len(other) for other in others), key=lambda size: (abs(size - len(text)), size))
        found.append(math.exp(total + min(0.0, 1 - nearest / len(text))))
    return sum(found) / len(found)


def distinct(texts: Sequence[Sequence[int]], n: int = 2) -> float:
    """Different n-grams of all texts over their number, in (0, 1]; 1 where there are none."""
    every = [gram for text in texts for gram in _grams(text, n).elements()]
    return len(set(every)) / len(every) if every else 1.0


def cells(points: Tensor, count: int, seed: int = 0) -> Tensor:
    """Cell of each of ``points [N, dim]`` among ``count``, int64 ``[N]``, by k-means from points drawn apart."""
    generator = torch.Generator().manual_seed(seed)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    for _ in range(count - 1):
        far = torch.cdist(points, centres).amin(1).pow(2) + 1e-12
        centres = torch.cat([centres, points[torch.multinomial(far, 1, generator=generator)]])
    for _ in range(_ROUNDS):
        own = torch.cdist(points, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, own, points)
        sizes = torch.bincount(own, minlength=count)[:, None]
        centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
    return torch.cdist(points, centres).argmin(1)


def mauve(p: Any, q: Any) -> float:
    """MAUVE of two histograms ``[K]``, in (0, 1], 1 if equal: area under the frontier of divergences from mixtures.

    Pillutla and others, MAUVE: Measuring the Gap Between Neural Text and Human Text (arXiv 2102.01454).
    """
    p, q = (np.asarray(x, float) / np.sum(x) for x in (p, q))
    points = [(0.0, 1.0), (1.0, 0.0)]
    for share in np.linspace(0.01, 0.99, 49):
        mixed = share * p + (1 - share) * q
        points.append((math.exp(-_SCALE * _divergence(q, mixed)), math.exp(-_SCALE * _divergence(p, mixed))))
    x, y = np.array(sorted(points, key=lambda point: (point[0], -point[1]))).T
    return float(np.trapezoid(y, x))


def _divergence(p: Any, q: Any) -> float:
    inside = p > 0
    return float((p[inside] * np.log(p[inside] / q[inside])).sum())
