# SPDX-License-Identifier: Apache-2.0
"""Give every head a gain and an offset of its own on the phase between queries and keys.

Shao et al., "ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific Complex Vector
Attention", arXiv 2505.10222. The paper has been withdrawn: a mirror of the paper page says so, and its claims are
unproven. Its method is kept here because it is a question that can be tried. Channels i and i + d/2 of a head are one
complex number of magnitude |q_i| = sqrt(re^2 + im^2 + 1e-9) and phase phi = atan2(im, re), and with delta and b learned
per head and plane

    score(m, n) = scale * sum_i |q_mi| |k_ni| cos(delta_i (phi(q_mi) - phi(k_ni)) + b_i + (m - n) g_i)
    g_i = theta ** (-2 i / d)

The cosine is of a difference, A - B with A = delta phi(q) + b + m g and B = delta phi(k) + n g, so that the score is
the dot product of [|q| cos A, |q| sin A] and [|k| cos B, |k| sin B]: attention is SDPA of the same head dimension and
the cache keeps the second. With delta = 1 and b = 0 it is RoPE; with delta = 0 only magnitudes and offset count.

``phase``: ``atan2`` is the formula. For delta that is no integer it jumps where a phase passes from pi to -pi.
``smooth`` has no phase to scale: delta acts only as an extra learned rotation, by delta - 1 radians beside b,

    cos(phi(q) - phi(k) + (delta - 1) + b + (m - n) g)

which is continuous everywhere, equal to ``atan2`` at delta = 1, and no more than a learned offset; its start should be
``one``. (The paper has no such form.)

Differs from the released code: it builds a phase for every pair, plane and head, in O(T^2 d) memory; it has no
1/sqrt(d), which is ``scale=1`` here, with 1/sqrt(d) as the default; ``start=normal`` is its start, delta ~ N(0,
1/sqrt(d/2)) read as a standard deviation, ``one`` is RoPE's. The paper's auxiliary "PCL" loss is left out: neither the
abstract nor the released attention describes it. With grouped queries, which the code does not have, delta belongs to
the group, because the keys that are kept hold it, and b to the query head. Where |q_i|^2 is below 1e-9 the phase takes
no gradient, which would explode; phases are computed in float32 at least.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..attention import rope
from ..attention.positions import rope_tables
from ..attention.reference import repeat_kv
from ..call import MixerConfig
from ..errors import UserError
from ..strategy import Mixer
from ._mixer import SoftmaxMixer

__all__ = ["ComplexFormer"]

_SMALLEST = 1e-9  # squared magnitude, as in the released code


@dataclass(frozen=True, kw_only=True)
class ComplexFormer(Mixer):
    """Polar attention with a learned gain and offset on the phase, per head and plane.

    Attributes:
        start: of delta: ``one`` (RoPE) or ``normal`` (the released code).
        phase: ``atan2`` (the formula) or ``smooth``.
        scale: factor on the scores, 1/sqrt(d) when not given; the released code has 1.
        theta: base of the rotation.
    """

    start: Literal["one", "normal"] = field(default="one", metadata={"help": "of delta: one (RoPE) or normal (code)"})
    phase: Literal["atan2", "smooth"] = field(default="atan2", metadata={"help": "atan2 (the formula) or smooth"})
    scale: float | None = field(default=None, metadata={"help": "factor on the scores; 1/sqrt(d) when not given"})
    theta: float = field(default=10_000.0, metadata={"help": "base of the rotation"})

    def __post_init__(self) -> None:
        if self.scale is not None and self.scale <= 0:
            raise UserError(f"complexformer: scale is a positive factor, not {self.scale:g}")
        if self.theta <= 0:
            raise UserError(f"complexformer: theta is the base of a rotation and positive, not {self.theta:g}")

    def build(self, config: MixerConfig) -> nn.Module:
        if config.head_dim % 2:
            raise UserError(f"complexformer: complex numbers are pairs of channels; a head has {config.head_dim}")
        return Attention(config, self)


class Attention(SoftmaxMixer):
    """CMHA. ``delta [Hkv * d/2]`` and ``b [H * d/2]`` are vectors: what optimisers decay are matrices."""

    def __init__(self, config: MixerConfig, strategy: ComplexFormer) -> None:
        super().__init__(config, scale=strategy.scale)
        self.strategy = strategy
        planes = config.head_dim // 2
        self.delta = nn.Parameter(torch.ones(config.num_kv_heads * planes))
        self.b = nn.Parameter(torch.zeros(config.num_heads * planes))
        if strategy.start == "normal":
            nn.init.normal_(self.delta, std=planes**-0.5)

    def _rotate(self, x: Tensor, delta: Tensor, b: Tensor | None, positions: Tensor) -> Tensor:
        """``x [B, H, T, d]`` with its phases times ``delta [H, 1, d/2]`` plus ``b``, rotated to its positions."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.strategy.phase == "atan2":
            size, phase = _polar(wide)
            angle = delta * phase if b is None else delta * phase + b
            wide = torch.cat([size * angle.cos(), size * angle.sin()], -1)
        elif b is not None:
            turn = delta - 1 + b
            first, second = wide.chunk(2, -1)
            cos, sin = turn.cos(), turn.sin()
            wide = torch.cat([first * cos - second * sin, first * sin + second * cos], -1)
        tables = rope_tables(positions, x.shape[-1], self.strategy.theta, wide.dtype)
        return rope.rotate(wide, tables).to(x.dtype)

    def _delta(self) -> Tensor:
        return self.delta.view(self.config.num_kv_heads, 1, -1)

    def transform_q(self, q: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        heads = self.config.num_heads
        delta = repeat_kv(self._delta()[None], heads)[0]
        return self._rotate(q, delta, self.b.view(heads, 1, -1), positions)

    def transform_k(self, k: Tensor, positions: Tensor, length: Tensor) -> Tensor:
        return self._rotate(k, self._delta(), None, positions)


def _polar(x: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude and phase, each ``[..., d/2]``; a phase of next to nothing is held fast."""
    re, im = x.chunk(2, -1)
    square = re * re + im * im
    sure = square > _SMALLEST
    phase = torch.atan2(torch.where(sure, im, im.detach()), torch.where(sure, re, re.detach()))
    return (square + _SMALLEST).sqrt(), phase
