# SPDX-License-Identifier: Apache-2.0
"""A decoder layer's attention to its source, whose heads each say when enough has been read."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from ....attention.multihead import MultiHead
from .alignment import Estimator, context_weights, expected_alignment, preserve_mass

__all__ = ["MonotonicAttention", "StepwisePolicy"]


class StepwisePolicy(nn.Module):
    """Probabilities of writing ``p [B, H, T, S]`` of decoder states ``[B, T, D]``, once j of a source are read.

    p_ij = sigmoid((f_q(s_i) . f_k(h_j) / sqrt(d) + b) / tau), f of ``depth`` linear layers with ReLU; keys are means of
    ``ratio`` positions, and p is 0 but for the last of each.

    Args:
        dim, heads: of states, and of probabilities.
        depth, bias, temperature, ratio: f's layers, b at first, tau, and positions that are decided on together.
    """

    def __init__(self, dim: int, heads: int, depth: int, bias: float, temperature: float, ratio: int) -> None:
        super().__init__()
        self.heads, self.temperature, self.ratio = heads, temperature, ratio
        self.q, self.k = (
            nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(dim, dim), nn.ReLU())))
            for _ in range(2)
        )
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, q: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        """Of queries ``[B, T, D]`` and a source ``[B, S, D]``, whose ``mask [B, S]`` is True from its first on."""
        length = mask.shape[1]
        blocks = torch.arange(length, device=mask.device) // self.ratio  # [S]
        if self.ratio > 1:
            summed = x.new_zeros(len(x), int(blocks[-1]) + 1, x.shape[-1]).index_add(1, blocks, x * mask[..., None])
            count = mask.new_zeros(summed.shape[:2], dtype=x.dtype).index_add(1, blocks, mask.to(x.dtype))
            x = summed / count.clamp(min=1)[..., None]
        queries, keys = (
            made.unflatten(-1, (self.heads, -1)).transpose(1, 2).float() for made in (self.q(q), self.k(x))
        )
        with torch.autocast(q.device.type, enabled=False):
            energies = queries @ keys.mT * queries.shape[-1] ** -0.5 + self.bias
        p = (energies / self.temperature).sigmoid()[..., blocks]
        place = torch.arange(1, length + 1, device=mask.device)
        ends = (place % self.ratio == 0) | (place == mask.sum(1, keepdim=True))
        made: Tensor = p * (ends & mask)[:, None, None]
        return made


class MonotonicAttention(nn.Module):
    """``q + Drop(MHA(LN(q), h))`` for words ``q [B, T, D]`` and the one source h ``[B, S, D]``.

    With a mask ``[B, S]`` of the source it is the attention that is expected of the policy: weights are those of
    :func:`context_weights`. With a mask ``[B, T, S]`` of what had been read before each word it is the usual one.

    Attributes:
        p, alpha: ``[B, H, T, S]`` of the last call with the first kind of mask, mass preserved.
        last: ``[B, H]`` of the last call with the second kind, in evaluation mode: p of the last word, at the last
            position that it sees.
    """

    def __init__(self, dim: int, heads: int, rate: float, policy: StepwisePolicy, by: Estimator) -> None:
        super().__init__()
        self.norm, self.attend, self.policy, self.by, self.rate = (
            nn.LayerNorm(dim), MultiHead(dim, heads, rate), policy, by, rate,
        )  # fmt: skip
        self.p = self.alpha = self.last = torch.empty(0)

    def forward(self, q: Tensor, states: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
        (x,), (mask,) = states, masks
        asked = self.norm(q)
        if mask.dim() == 2:
            return q + dropout(self._expected(asked, x, mask), self.rate, self.training)
        if not self.training:
            seen = mask[:, -1]
            place = (seen.sum(1) - 1)[:, None, None, None].expand(-1, self.policy.heads, 1, 1)
            self.last = self.policy(asked[:, -1:], x, seen).gather(-1, place)[..., 0, 0]
        return q + dropout(self.attend(asked, x, mask), self.rate, self.training)

    def _expected(self, asked: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        self.p = self.policy(asked, x, mask)
        self.alpha = preserve_mass(expected_alignment(self.p, self.by), mask.sum(1)[:, None])
        q, k, v = self.attend.projected(asked, x)
        energies = (q @ k.mT).float() * q.shape[-1] ** -0.5
        weights = dropout(context_weights(self.alpha, energies, mask[:, None, None]), self.rate, self.training)
        found: Tensor = self.attend.out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        return found
