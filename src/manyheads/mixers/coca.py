# SPDX-License-Identifier: Apache-2.0
"""Make each key start collinear with its query, so that the score only falls as the two move apart.

Zhu et al., "Cure the headache of Transformers via Collinear Constrained Attention", arXiv 2309.08646 (later titled
"CoCA: Fusing Position Embedding with Collinear Constrained Attention in Transformers for Long Context Window
Extending"). Under rotary positions a query and a key may start at an angle to each other in a plane, and then the score
first rises with distance and is not what was trained beyond the trained length. CoCA takes that angle away: a token
gives a non-negative number per plane, t, instead of a key, and the key for a query is that query times t. With f the
rotation to a position, and planes of two channels j and j + d/2:

    t_n = relu(mean of the two halves of W_T x_n), the same in both channels of a plane
    strict  a(m, n) = <f(q_m, m), f(q_m * t_n, n)> = sum_j t_nj |q_mj|^2 cos((m - n) theta_j)
    slack   a(m, n) = <f(q_m, m), q_m * f(t_n, n)>, which the paper releases and finds better

Both are dot products of something of the query and something of the key, so no N x N x d tensor is needed; attention is
SDPA and the cache keeps K':

    strict  Q' = f((|q_j|^2, 0), m)    K' = f((t_j, 0), n)
    slack   Q' = q * f(q, m)           K' = f((t_j, t_j), n)

What to know. Slack is not shift invariant: its scores change when all positions move. The two agree where the halves of
q are equal. Scores are even in q, so a head cannot attend by sign, and relu leaves a plane whose t is negative without
score and without gradient.

Differs from the paper: none known in the mechanism; the official code builds the N x N x d tensor. With grouped
queries, which the paper does not have, one t serves a group. ``ntk`` is the dynamic NTK scaling that the paper combines
CoCA with: the base follows the tokens seen, so a long prompt is read in one call to be read at one base, and keys that
decoding keeps beyond the trained length were turned with the base of their time, as in transformers.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..attention import rope
from ..attention.positions import dynamic_ntk, rope_tables
from ..call import MixerConfig
from ..errors import UserError
from ..strategy import Mixer
from ._mixer import SoftmaxMixer

__all__ = ["CoCA"]


@dataclass(frozen=True, kw_only=True)
class CoCA(Mixer):
    """Collinear constrained attention.

    Attributes:
        form: ``slack`` (released) or ``strict``.
        theta: base of the rotation.
        ntk: factor of dynamic NTK scaling beyond the trained length (the paper tries 2, 4 and 8); 0 turns it off.
    """

    form: Literal["slack", "strict"] = field(default="slack", metadata={"help": "slack (released) or strict"})
    theta: float = field(default=10_000.0, metadata={"help": "base of the rotation"})
    ntk: float = field(
        default=0.0, metadata={"help": "factor of dynamic NTK scaling beyond the trained length; 0: off"}
    )

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise UserError(f"coca: theta is the base of a rotation and positive, not {self.theta:g}")
        if self.ntk and self.ntk < 1:
            raise UserError("coca: ntk is a factor of at least 1, or 0")

    def build(self, config: MixerConfig) -> nn.Module:
        if config.head_dim % 2 or (self.ntk and config.head_dim == 2):
            raise UserError(f"coca: planes are pairs of channels, and ntk needs two of them; got {config.head_dim}")
        return Attention(config, self)


class Attention(SoftmaxMixer):
    """CoCA: ``k_proj`` is W_T; the cache keeps the turned t."""

    def __init__(self, config: MixerConfig, strategy: CoCA) -> None:
        super().__init__(config)
        self.strategy = strategy

    def _rotate(self, x: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        theta: float | Tensor = self.strategy.theta
        if self.strategy.ntk:
            theta = dynamic_ntk(self.strategy.theta, x.shape[-1], length, self.config.length, self.strategy.ntk)
        return rope.rotate(x, rope_tables(positions, x.shape[-1], theta, x.dtype))

    def transform_q(self, q: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        if self.strategy.form == "slack":
            return (wide * self._rotate(wide, positions, length)).to(q.dtype)
        first, second = wide.chunk(2, -1)
        square = first * first + second * second
        return self._rotate(torch.cat([square, torch.zeros_like(square)], -1), positions, length).to(q.dtype)

    def transform_k(self, k: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        first, second = k.to(torch.promote_types(k.dtype, torch.float32)).chunk(2, -1)
        t = ((first + second) / 2).relu()
        other = t if self.strategy.form == "slack" else torch.zeros_like(t)
        return self._rotate(torch.cat([t, other], -1), positions, length).to(k.dtype)
