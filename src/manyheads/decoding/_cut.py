# SPDX-License-Identifier: Apache-2.0
"""What samplers cut, in transformers' order: divided by the temperature, then top-k, then nucleus, then min-p."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError

__all__ = ["Cut", "kept"]


def kept(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Which tokens may be drawn, ``[B, V]`` of bool; the likeliest always may.

    Args:
        logits: ``[B, V]``, divided by the temperature.
        top_k: so many of the likeliest, with those that tie; 0 for all.
        top_p: the fewest of the likeliest whose probability, of what ``top_k`` left, reaches it.
        min_p: those at least so many times as likely as the likeliest.
    """
    alive = torch.ones_like(logits, dtype=torch.bool)
    if 0 < top_k < logits.shape[-1]:
        alive = logits >= logits.topk(top_k).values[..., -1:]
    if top_p < 1:
        shares, order = logits.masked_fill(~alive, -torch.inf).softmax(-1).sort(descending=True)
        inside = shares.cumsum(-1) - shares < top_p  # what stands before it does not reach top_p yet
        alive = alive & torch.zeros_like(alive).scatter(-1, order, inside)
    if min_p > 0:
        shares = logits.masked_fill(~alive, -torch.inf).softmax(-1)
        alive = alive & (shares >= min_p * shares.amax(-1, keepdim=True))
    return alive


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What may be drawn, and how heavily it weighs; a temperature of 1 and no cut leave the model as it is."""

    temperature: float = field(default=1.0, metadata={"help": "logits are divided by it; above 0"})
    top_k: int = field(default=0, metadata={"help": "draw from so many of the likeliest; 0 for all"})
    top_p: float = field(default=1.0, metadata={"help": "draw from the fewest that have this probability together"})
    min_p: float = field(default=0.0, metadata={"help": "draw from those so many times as likely as the likeliest"})

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"temperature={self.temperature}: it is above 0; leave the strategy away for the likeliest")
        if self.top_k < 0 or not 0 < self.top_p <= 1 or not 0 <= self.min_p <= 1:
            raise UserError(
                f"top_k={self.top_k}, top_p={self.top_p}, min_p={self.min_p}: top_k is not negative, top_p in (0, 1], "
                "min_p in [0, 1]"
            )

    def log_weights(self, logits: Tensor) -> Tensor:
        """``log p / temperature`` of what may be drawn, minus infinity elsewhere, of ``logits [B, V]``.

        Their sum of exponentials is the mass that sampling divides by at every token.
        """
        out = ~kept(logits / self.temperature, self.top_k, self.top_p, self.min_p)
        return (logits.log_softmax(-1) / self.temperature).masked_fill(out, -torch.inf)
