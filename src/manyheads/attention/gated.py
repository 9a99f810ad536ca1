# SPDX-License-Identifier: Apache-2.0
"""Linear attention whose gates are of every channel, and the gated delta rule: what tokens do to a state, in chunks.

    gated linear attention (GLA, arXiv 2312.06635; HGRN2's, arXiv 2404.07904, with k = 1 - exp(g))
        S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T                                          g_t of each channel of k
    gated delta rule (arXiv 2412.06464; without gates 2406.06484)
        S_t = exp(g_t) (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T                        g_t of each head

and o_t = scale q_t S_t. Both are linear in the state before them, so that a run from a state of zeros leaves all that
is to be known: outputs, and *carried* queries c_t with ``o_t = scale q_t S_t(0) + c_t S_0``; and the pair (M, S) of the
state after all tokens, ``M S_0 + S``. M is a factor on each channel of k, or, for the delta rule, a matrix.

Everything here is torch. Gates of a chunk are compared in pairs, never divided by each other, so that nothing
overflows; for gates of channels that takes ``T size K`` numbers a head. A gate counts as at least 2^-128.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .recurrence import LEAST

__all__ = ["channel_gated", "delta_rule", "suffixes"]

Outputs = Callable[[], tuple[Tensor, Tensor]]


def suffixes(g: Tensor) -> Tensor:
    """Sums of ``g [B, H, T, ...]`` over the tokens after each."""
    after = g.flip(2).cumsum(2).flip(2)
    return torch.cat([after[:, :, 1:], torch.zeros_like(after[:, :, :1])], 2) if g.shape[2] else after


def channel_gated(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float = 1.0, size: int = 16
) -> tuple[Tensor, Tensor, Outputs]:  # fmt: skip
    """Gated linear attention from a state of zeros.

    Args:
        q, k: ``[B, H, T, K]``; all in one dtype, float32 or float64.
        v: ``[B, H, T, V]``.
        g: log decay ``[B, H, T, K]``, at most 0.
        scale: factor on q.
        size: tokens of a chunk.

    Returns:
        M ``[B, H, K]``, S ``[B, H, K, V]``, and what gives outputs ``[B, H, T, V]`` and carried queries
        ``[B, H, T, K]``.
    """
    g = g.clamp_min(LEAST)
    m, s = g.sum(2).exp(), (k * suffixes(g).exp()).mT @ v

    def outputs() -> tuple[Tensor, Tensor]:
        queries, keys, values, gates = _chunks(size, q, k, v, g)
        total = gates.cumsum(3)
        gap = (total[..., :, None, :] - total[..., None, :, :]).masked_fill(_later(size, q)[..., None], -torch.inf)
        weights = scale * (queries[..., :, None, :] * keys[..., None, :, :] * gap.exp()).sum(-1)
        new = (keys * (total[..., -1:, :] - total).exp()).mT @ values
        before = _before(total[..., -1, :].exp()[..., None], new)
        out = weights @ values + (scale * queries * total.exp()) @ before
        return out.flatten(2, 3)[:, :, : q.shape[2]], scale * q * g.cumsum(2).exp()

    return m, s, outputs


def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float = 1.0, size: int = 64
) -> tuple[Tensor, Tensor, Outputs]:  # fmt: skip
    """The gated delta rule from a state of zeros, by the WY form of a chunk's reflections.

    With L_ts = b_t exp(G_t - G_s) k_t k_s^T for s < t, G the running sum of g in a chunk, what tokens write is
    ``U = (I + L)^-1 (b v - b exp(G) k S_0)``. Keys after the values give the columns that the state does not enter.

    Args:
        q, k: ``[B, H, T, K]``; k of norm 1 as a rule; all in one dtype, float32 or float64.
        v: ``[B, H, T, V]``.
        beta: ``[B, H, T]``.
        g: log decay ``[B, H, T]``, at most 0, or None.
        scale: factor on q.
        size: tokens of a chunk.

    Returns:
        M ``[B, H, K, K]``, S ``[B, H, K, V]``, and what gives outputs and carried queries.
    """
    width = v.shape[3]
    gate = torch.zeros_like(beta) if g is None else g.to(beta.dtype).clamp_min(LEAST)
    queries, keys, values, gates = _chunks(size, q, k, v, gate[..., None])
    (rates,) = _chunks(size, beta[..., None])
    total = gates[..., 0].cumsum(-1)
    gap = (total[..., :, None] - total[..., None, :]).masked_fill(_later(size, q), -torch.inf).exp()
    inner = (rates * (keys @ keys.mT) * gap).tril(-1)
    right = torch.cat([rates * values, rates * total.exp()[..., None] * keys], -1)
    written = torch.linalg.solve_triangular(inner, right, upper=False, unitriangular=True)
    written, taken = written.split([width, k.shape[3]], -1)
    left = (keys * (total[..., -1:] - total).exp()[..., None]).mT
    one = torch.eye(k.shape[3], dtype=k.dtype, device=k.device)
    nothing = k[:, :, :0].mT @ v[:, :, :0]  # zeros that gradients pass through, also where there are no tokens
    state = torch.cat([nothing, one.expand(*k.shape[:2], -1, -1)], -1)
    states, wrote = [], []
    for i in range(keys.shape[2]):
        states.append(state)
        u = torch.nn.functional.pad(written[:, :, i], (0, k.shape[3])) - taken[:, :, i] @ state
        state = total[:, :, i, -1].exp()[..., None, None] * state + left[:, :, i] @ u
        wrote.append(u)

    def outputs() -> tuple[Tensor, Tensor]:
        if not states:
            return torch.zeros_like(v), torch.zeros_like(q)
        seen = torch.stack(wrote, 2), torch.stack(states, 2)
        out = ((queries @ keys.mT) * gap) @ seen[0] + (queries * total.exp()[..., None]) @ seen[1]
        found, carried = (scale * out.flatten(2, 3)[:, :, : q.shape[2]]).split([width, k.shape[3]], -1)
        return found, carried

    s, m = state.split([width, k.shape[3]], -1)
    return m, s, outputs


def _chunks(size: int, *given: Tensor) -> list[Tensor]:
    """``[B, H, T, d] -> [B, H, n, size, d]``, zeros behind the last token."""
    pad = -given[0].shape[2] % size
    return [torch.nn.functional.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, size)) for x in given]


def _later(size: int, like: Tensor) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool, device=like.device).triu(1)


def _before(factor: Tensor, new: Tensor) -> Tensor:
    """States before chunks: ``factor [B, H, n, K, 1]`` and what each adds ``[B, H, n, K, V]``."""
    state, found = torch.zeros_like(new[:, :, 0]) if new.shape[2] else new[:, :, :0].sum(2), []
    for i in range(new.shape[2]):
        found.append(state)
        state = factor[:, :, i] * state + new[:, :, i]
    return torch.stack(found, 2) if found else new
