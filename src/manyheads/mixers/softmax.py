# SPDX-License-Identifier: Apache-2.0
"""Softmax attention: what every mixer has to be measured against, with the usual ways to tell it of positions.

Scaled dot-product attention (Vaswani et al., arXiv 1706.03762), causal or, in an encoder, of both sides, with grouped
queries and optionally a sliding window, and one of: rotary positions (arXiv 2104.09864; ``ntk`` grows their base beyond
the trained length, ``learned`` gives every head frequencies of its own), ALiBi (arXiv 2108.12409), T5's learned bias by
bucket (arXiv 1910.10683), or none.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..attention import rope
from ..attention.positions import alibi_bias, dynamic_ntk, rope_tables, rotate_per_head, t5_buckets
from ..attention.reference import repeat_kv
from ..call import MixerConfig
from ..errors import UserError
from ..strategy import Mixer
from ._mixer import SoftmaxMixer

__all__ = ["Softmax"]

Position = Literal["rope", "alibi", "t5", "none"]


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
        if self.position == "alibi" and not config.causal:
            raise UserError("softmax: ALiBi is defined for the past only; give an encoder rope, t5 or no positions")
        return Attention(config, self)


class Attention(SoftmaxMixer):
    """Multi-head attention with the positions of ``strategy``."""

    def __init__(self, config: MixerConfig, strategy: Softmax) -> None:
        super().__init__(config, window=strategy.window)
        self.strategy = strategy
        self.buckets = nn.Embedding(32, config.num_heads) if strategy.position == "t5" else None
        planes = config.num_kv_heads * config.head_dim // 2
        self.log_factor = nn.Parameter(torch.zeros(planes)) if strategy.learned else None

    def _rotate(self, x: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        if self.strategy.position != "rope":
            return x
        theta: float | Tensor = self.strategy.theta
        if self.log_factor is not None:
            factor = self.log_factor.exp().view(1, self.config.num_kv_heads, 1, -1)
            return rotate_per_head(x, positions, self.strategy.theta, repeat_kv(factor, x.shape[1]))
        if self.strategy.ntk:
            theta = dynamic_ntk(self.strategy.theta, x.shape[-1], length, self.config.length, self.strategy.ntk)
        return rope.rotate(x, rope_tables(positions, x.shape[-1], theta)).to(x.dtype)

    def transform_q(self, q: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        return self._rotate(q, positions, length)

    def transform_k(self, k: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        return self._rotate(k, positions, length)

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        if self.strategy.position == "alibi":
            return alibi_bias(queries, keys, self.config.num_heads)
        if self.buckets is None:
            return None
        apart = keys[:, None] - queries[:, :, None]
        bias: Tensor = self.buckets(t5_buckets(apart, causal=self.config.causal))
        return bias.permute(0, 3, 1, 2)
