# SPDX-License-Identifier: Apache-2.0
"""Softmax attention: what every mixer has to be measured against, with the usual ways to tell it of positions.

Scaled dot-product attention (Vaswani et al., arXiv 1706.03762), causal or, in an encoder, of both sides, with grouped
queries and optionally a sliding window, and one of: rotary positions (arXiv 2104.09864; ``ntk`` grows their base beyond
the trained length, ``learned`` gives every head frequencies of its own), ALiBi (arXiv 2108.12409), T5's learned bias by
bucket (arXiv 1910.10683), or none.
"""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from ..call import MixerConfig
from ..errors import UserError
from ..strategy import Mixer
from ._positions import Position, PositionedMixer, Positions

__all__ = ["Softmax"]


@dataclass(frozen=True, kw_only=True)
class Softmax(Mixer):
    """Softmax attention.

    Attributes:
        position: ``rope``, ``alibi``, ``t5`` or ``none``.
        window: keys that a query sees, all when None.
        theta: base of the rotation.
        ntk: factor of dynamic NTK scaling beyond the trained length; 0 turns it off.
        learned: a learned factor on every rotary frequency, per key/value head and plane, which starts at 1.
    """

    directions: ClassVar = ("causal", "bidirectional")

    position: Position = field(default="rope", metadata={"help": "rope, alibi, t5 or none"})
    window: int | None = field(default=None, metadata={"help": "keys that a query sees; all when not given"})
    theta: float = field(default=10_000.0, metadata={"help": "base of the rotation"})
    ntk: float = field(
        default=0.0, metadata={"help": "factor of dynamic NTK scaling beyond the trained length; 0: off"}
    )
    learned: bool = field(default=False, metadata={"help": "a learned factor on every rotary frequency, per head"})

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise UserError(f"softmax: window counts keys and is at least 1, not {self.window}")
        if self.ntk and (self.ntk < 1 or self.position != "rope"):
            raise UserError("softmax: ntk is a factor of at least 1 on rotary positions, or 0")
        if self.learned and (self.position != "rope" or self.ntk):
            raise UserError("softmax: learned frequencies are of rotary positions without ntk")

    def build(self, config: MixerConfig) -> nn.Module:
        positions = Positions(self.position, self.theta, self.ntk, self.learned)
        return PositionedMixer(config, positions, self.window)
