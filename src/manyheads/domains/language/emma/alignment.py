# SPDX-License-Identifier: Apache-2.0
"""Where a monotonic head is expected to stop and to look, by its probabilities of stopping, and the losses of that."""

from typing import Literal

import torch
from torch import Tensor

from ....attention.latency import average_lagging

__all__ = [
    "Estimator", "context_weights", "expected_alignment", "expected_delays", "latency_losses", "preserve_mass",
]  # fmt: skip

Estimator = Literal["scan", "matrix", "mma"]
_EPS = 1e-6  # of MMA's clamp
_LEAST = 1e-30  # of sums of exp(u - max u)


def expected_alignment(p: Tensor, by: Estimator = "scan", eps: float = _EPS) -> Tensor:
    """Probability ``alpha [.., T, S]`` that the i-th word is written when j of the source has just been read.

    Args:
        p: probability of writing the i-th word, once j is read, ``[.., T, S]`` from 0 to 1; 0 where there is no source.
        by: ``scan``, the recursion; ``matrix``, the paper's product of matrices, O(T S^2) in memory; ``mma``, the form
            with a division by what may be 0, for which it is clamped.
        eps: of that clamp.
    """
    with torch.autocast(p.device.type, enabled=False):  # in the dtype of p
        return _mma(p, eps) if by == "mma" else _matrix(p) if by == "matrix" else _scan(p)


def _scan(p: Tensor) -> Tensor:
    """q_ij = (1 - p_i,j-1) q_i,j-1 + alpha_i-1,j and alpha_ij = p_ij q_ij, all i with one i + j at a time."""
    rows, columns = p.shape[-2:]
    place = torch.arange(rows, device=p.device)[:, None] + torch.arange(columns, device=p.device)
    place = place.expand(p.shape)
    steps = p.new_zeros(*p.shape[:-1], rows + columns - 1).scatter(-1, place, p)  # of each i + j, [.., T]
    goes_on, edge = (1 - steps).unbind(-1), p.new_zeros(*p.shape[:-2], 1)
    q = torch.cat((edge + 1, p.new_zeros(*p.shape[:-2], rows - 1)), -1)  # alpha_0 is e_1
    found: list[Tensor] = []
    for d, now in enumerate(steps.unbind(-1)):
        if d:
            q = torch.addcmul(torch.cat((edge, found[-1][..., :-1]), -1), goes_on[d - 1], q)
        found.append(now * q)
    return torch.stack(found, -1).gather(-1, place)


def _matrix(p: Tensor) -> Tensor:
    """alpha_i = p_i * (alpha_i-1 T_i), T_i[m, n] = prod_{k = m}^{n - 1} (1 - p_ik) for m <= n and 0 elsewhere."""
    columns = p.shape[-1]
    shifted = torch.cat((p.new_zeros(*p.shape[:-1], 1), p[..., :-1]), -1)  # p_i,n-1 in column n
    stays = (1 - shifted[..., None, :].expand(*p.shape, columns).triu(1)).cumprod(-1).triu()
    alpha, found = torch.zeros_like(p[..., 0, :]), []
    alpha[..., 0] = 1
    for i in range(p.shape[-2]):
        alpha = p[..., i, :] * (alpha[..., None, :] @ stays[..., i, :, :])[..., 0, :]
        found.append(alpha)
    return torch.stack(found, -2)


def _mma(p: Tensor, eps: float) -> Tensor:
    """alpha_i = p_i * cp_i * cumsum(alpha_i-1 / cp_i), cp_ij = prod_{k < j} (1 - p_ik), as in MMA: cp not below eps."""
    stays = torch.cat((torch.ones_like(p[..., :1]), (1 - p[..., :-1]).cumprod(-1)), -1)
    alpha, found = torch.zeros_like(p[..., 0, :]), []
    alpha[..., 0] = 1
    for i in range(p.shape[-2]):
        stay = stays[..., i, :]
        alpha = (p[..., i, :] * stay * (alpha / stay.clamp(min=eps)).cumsum(-1)).clamp(0, 1)
        found.append(alpha)
    return torch.stack(found, -2)


def preserve_mass(alpha: Tensor, length: Tensor) -> Tensor:
    """``alpha [.., T, S]`` with what is missing to 1 at the last position of each source; lengths ``[..]`` of those."""
    rest = (1 - alpha.sum(-1, keepdim=True)).clamp(min=0)
    last = torch.arange(alpha.shape[-1], device=alpha.device) == length[..., None, None] - 1
    return alpha + rest * last


def context_weights(alpha: Tensor, energies: Tensor, mask: Tensor) -> Tensor:
    """Weights ``beta [.., T, S]`` of an attention that sees all up to where its head stops, in expectation.

    beta_ij = sum_{k >= j} alpha_ik exp(u_ij) / sum_{l <= k} exp(u_il). Energies far below the highest, by 69 and more,
    count as if they were not below that.

    Args:
        alpha: ``[.., T, S]``.
        energies: u ``[.., T, S]``.
        mask: True where there is a source, ``[.., 1, S]``.
    """
    energies = energies.masked_fill(~mask, float("-inf"))
    seen = (energies - energies.amax(-1, keepdim=True).detach()).exp()
    share = alpha / seen.cumsum(-1).clamp(min=_LEAST)
    return seen * share.flip(-1).cumsum(-1).flip(-1)


def expected_delays(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[.., T]`` of how much is read before each word, from 1 on, by ``alpha [.., T, S]``."""
    place = torch.arange(1, alpha.shape[-1] + 1, device=alpha.device, dtype=alpha.dtype)
    mean = (alpha * place).sum(-1)
    return mean, (alpha * (place - mean[..., None]).square()).sum(-1)


def latency_losses(alpha: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Average lagging of the expected delays, and their mean variance: of heads, and of sentences, both in positions.

    Args:
        alpha: with mass preserved, ``[B, H, T, S]``.
        source, target: lengths ``[B]``.
    """
    delays, variance = expected_delays(alpha)
    lag = average_lagging(delays, source[:, None].expand(delays.shape[:2]), target[:, None].expand(delays.shape[:2]))
    there = torch.arange(alpha.shape[-2], device=alpha.device) < target[:, None, None]
    return lag.mean(), ((variance * there).sum(-1) / target[:, None]).mean()
