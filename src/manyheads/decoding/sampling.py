# SPDX-License-Identifier: Apache-2.0
"""Sampling as everyone does it: temperature, top-k, nucleus and min-p, each token normalised over what is left of it.

The order is that of transformers: logits are divided by the temperature, then cut to the ``top_k`` likeliest, to the
smallest set whose probability reaches ``top_p``, and to tokens at least ``min_p`` times as likely as the likeliest.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..writing import TokenChoice
from ._cut import Cut, kept

__all__ = ["Sampling", "kept"]


@dataclass(frozen=True, kw_only=True)
class Sampling(Cut, TokenChoice):
    """Draw from the model's distribution, sharpened and cut."""

    def choose(self, logits: Tensor, ids: Tensor, generator: torch.Generator) -> Tensor:
        return torch.multinomial(self.log_weights(logits).softmax(-1), 1, generator=generator)[:, 0]
