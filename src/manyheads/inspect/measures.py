# SPDX-License-Identifier: Apache-2.0
"""All figures that the doctor takes of a model, before anything is said of them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..heads import HeadTable
from ..lens import LensResult

__all__ = ["Measures"]


@dataclass
class Measures:
    """All figures.

    Attributes:
        found: what the lenses found, by slug, and ``attention`` and ``body`` of our own.
        losses: nats of each token of each prompt.
        alone: what the loss gains when a head is ablated alone, as a table; NaN where it was not.
        head_distance: share of the attention that a head gives elsewhere than the most similar head of its layer,
            ``[L, H]``.
        most_similar: that head.
        contexts: tokens read before the same scored tokens, ascending, and their losses ``[C, N]``.
        padding: for each way to pad, greatest change of a logit over their spread, and share of changed choices.
        max_context: tokens that the config says the model reads.
        weights: parameters that are not finite, by name.
        unread: parameters that are offloaded, of which that is not known.
    """

    found: dict[str, LensResult] = field(default_factory=dict)
    losses: list[Any] = field(default_factory=list)
    alone: HeadTable | None = None
    head_distance: Any = None
    most_similar: Any = None
    contexts: tuple[list[int], Any] = field(default_factory=lambda: ([], np.zeros((0, 0))))
    padding: dict[str, dict[str, float]] = field(default_factory=dict)
    max_context: int = 0
    weights: dict[str, int] = field(default_factory=dict)
    unread: int = 0
    groups: int = 1
    dtype: str = "float32"
    refused: dict[str, str] = field(default_factory=dict)
