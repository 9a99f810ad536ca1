# SPDX-License-Identifier: Apache-2.0
"""TransNormerLLM with lightning attention: linear attention with a fixed decay per head, gated, normed, never divided.

Qin et al., "Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention", arXiv 2405.17381:

    q, k, v, u = silu(x W_q), silu(x W_k), x W_v, x W_u        S_t = lambda S_{t-1} + k_t v_t^T
    y_t = (SRMSNorm(q_t S_t) * u_t) W_o                        SRMSNorm(x) = x sqrt(d) / |x|

A layer is ``x + mixer(SRMSNorm(x))``, then ``x + ((h W_v) * (h W_u)) W_o`` of h = SRMSNorm(x) (SGLU: a gated unit
without activation); the mixer brings both to the decoder. The state is H matrices, whatever the length, and time per
token is constant because attention is quadratic only within chunks. Without a denominator nothing can grow small and be
divided by; the norm takes its place, over all heads at once as in the released model. q and k have no scale.

``decay`` is one of the two tables of :mod:`manyheads.attention.decay`. LRPE-d multiplies the score by ``cos(theta (t -
s))`` per channel, theta learned, in the first layer only: q and k become ``[x cos(theta t), x sin(theta t)]``, so that
its state is twice as large. Theta starts at ``10000^(-2 i / D)`` for channel i of all D of the layer, which is ours:
the paper does not say.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..attention.decay import Decay, lightning_attention, log_decay
from ..attention.masks import zero_padding
from ..attention.recurrence import DecayState, SharedState
from ..call import MixerConfig
from ..errors import UserError
from ..strategy import Mixer
from ._mixer import positions_of, split_heads

__all__ = ["SGLU", "TNLLightning", "TNLMixer", "TNLState"]


@dataclass(frozen=True, kw_only=True)
class TNLLightning(Mixer):
    """TransNormerLLM's token mixer.

    Attributes:
        decay: ``paper`` (linear in the head), ``alibi`` (geometric, as the released models) or ``none``.
        lrpe: learned relative positions in the first layer.
        gate: multiply the output by u.
    """

    decay: Decay = field(default="paper", metadata={"help": "paper, alibi (the released models) or none"})
    lrpe: bool = field(default=True, metadata={"help": "learned relative positions (LRPE-d) in the first layer"})
    gate: bool = field(default=True, metadata={"help": "gate of the output"})

    def __post_init__(self) -> None:
        if self.decay not in ("paper", "alibi", "none"):
            raise UserError(f"tnl_lightning: decay is paper, alibi or none, not {self.decay!r}")

    def build(self, config: MixerConfig) -> nn.Module:
        return TNLMixer(config, self)


@dataclass(frozen=True, slots=True)
class TNLState:
    """The state of the mixer; its size does not depend on the length.

    Attributes:
        decay: sums of k v^T.
        seen: ``[B]`` tokens so far.
    """

    decay: DecayState
    seen: Tensor

    def reorder(self, rows: Tensor) -> "TNLState":
        return TNLState(self.decay.reorder(rows), self.seen[rows])

    def detach(self) -> "TNLState":
        return TNLState(self.decay.detach(), self.seen)

    @property
    def nbytes(self) -> int:
        return self.decay.nbytes + self.seen.nbytes


class SGLU(nn.Module):
    """``((x W_v) * (x W_u)) W_o``, without activation."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.gate(x) * self.up(x))
        return y


def srms_norm(dim: int) -> nn.Module:
    """RMS norm without a weight."""
    return nn.RMSNorm(dim, eps=1e-6, elementwise_affine=False)


class TNLMixer(nn.Module):
    """Gated linear attention of TransNormerLLM; key/value heads are as many as query heads."""

    norm = staticmethod(srms_norm)
    channel_mixer = SGLU

    def __init__(self, config: MixerConfig, strategy: TNLLightning) -> None:
        super().__init__()
        self.config = config
        wide = config.num_heads * config.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.dim, wide, bias=False) for _ in range(3))
        self.gate = nn.Linear(config.dim, wide, bias=False) if strategy.gate else None
        self.out_norm = srms_norm(wide)
        self.out_proj = nn.Linear(wide, config.dim, bias=False)
        self.decay: Tensor | None
        table = log_decay(strategy.decay, config.num_heads, config.layer, config.num_layers)
        self.register_buffer("decay", table, persistent=False)
        self.theta: nn.Parameter | None = None
        if strategy.lrpe and config.layer == 0:
            self.theta = nn.Parameter((10_000.0 ** (-2 / wide * torch.arange(wide))).view(config.num_heads, 1, -1))

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, state: TNLState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, TNLState]:  # fmt: skip
        """``x [B, T, dim] -> [B, T, dim]``, see :mod:`manyheads.mixers._mixer`."""
        x = zero_padding(x, mask)
        past = None if state is None else state.seen
        at = positions_of(x.shape[0], x.shape[1], x.device, mask, past, cu_seqlens)
        count = x.new_full(x.shape[:1], x.shape[1], dtype=torch.long) if mask is None else mask.sum(1)
        count = count if cu_seqlens is None else cu_seqlens.diff()
        seen = count if past is None else past + count
        silu = nn.functional.silu
        q, k, v = (
            split_heads(y, self.config.num_heads) for y in (silu(self.q_proj(x)), silu(self.k_proj(x)), self.v_proj(x))
        )
        if self.theta is not None:
            q, k = self._rotate(q, at), self._rotate(k, at)
        before = None if state is None else state.decay
        out, after = lightning_attention(q, k, v, self.decay, mask=mask, state=before, cu_seqlens=cu_seqlens)
        out = self.out_norm(out.transpose(1, 2).flatten(2))
        y: Tensor = self.out_proj(out if self.gate is None else out * self.gate(x))
        return y, TNLState(after, seen)

    def shared_state(self, before: SharedState, seen: Tensor) -> TNLState:
        """The state of a sequence of which other processes have the first ``seen [B]`` tokens."""
        return TNLState(before, seen)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """``[B, H, T, d] -> [B, H, T, 2 d]``: x cos and x sin of theta times the position."""
        assert self.theta is not None
        angles = self.theta.double() * positions[:, None, :, None]
        return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], -1)
