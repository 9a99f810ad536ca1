# SPDX-License-Identifier: Apache-2.0
"""Softmax attention with the usual ways to tell it of positions: what a mixer is that changes something else of it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..attention import rope
from ..attention.positions import alibi_bias, dynamic_ntk, rope_tables, rotate_per_head, t5_buckets
from ..attention.reference import repeat_kv
from ..call import MixerConfig
from ..errors import UserError
from ._mixer import SoftmaxMixer

__all__ = ["Position", "PositionedMixer", "Positions"]

Position = Literal["rope", "alibi", "t5", "none"]


@dataclass(frozen=True)
class Positions:
    """How attention is told of positions.

    Attributes:
        position: rotary, ALiBi, T5's learned bias by bucket, or none.
        theta: base of the rotation.
        ntk: factor of dynamic NTK scaling beyond the trained length; 0 turns it off.
        learned: a learned factor on every rotary frequency, per key/value head and plane.
    """

    position: Position = "rope"
    theta: float = 10_000.0
    ntk: float = 0.0
    learned: bool = False


class PositionedMixer(SoftmaxMixer):
    """Multi-head attention with ``told`` positions, in a sliding ``window`` where there is one.

    Raises:
        UserError: ALiBi in an encoder.
    """

    def __init__(self, config: MixerConfig, told: Positions, window: int | None = None) -> None:
        if told.position == "alibi" and not config.causal:
            raise UserError("softmax: ALiBi is defined for the past only; give an encoder rope, t5 or no positions")
        super().__init__(config, window=window)
        self.told = told
        self.buckets = nn.Embedding(32, config.num_heads) if told.position == "t5" else None
        planes = config.num_kv_heads * config.head_dim // 2
        self.log_factor = nn.Parameter(torch.zeros(planes)) if told.learned else None

    def _rotate(self, x: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        if self.told.position != "rope":
            return x
        theta: float | Tensor = self.told.theta
        if self.log_factor is not None:
            factor = self.log_factor.exp().view(1, self.config.num_kv_heads, 1, -1)
            return rotate_per_head(x, positions, self.told.theta, repeat_kv(factor, x.shape[1]))
        if self.told.ntk:
            theta = dynamic_ntk(self.told.theta, x.shape[-1], length, self.config.length, self.told.ntk)
        return rope.rotate(x, rope_tables(positions, x.shape[-1], theta)).to(x.dtype)

    def transform_q(self, q: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        return self._rotate(q, positions, length)

    def transform_k(self, k: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        return self._rotate(k, positions, length)

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor | None:
        if self.told.position == "alibi":
            return alibi_bias(queries, keys, self.config.num_heads)
        if self.buckets is None:
            return None
        apart = keys[:, None] - queries[:, :, None]
        bias: Tensor = self.buckets(t5_buckets(apart, causal=self.config.causal))
        return bias.permute(0, 3, 1, 2)
