# SPDX-License-Identifier: Apache-2.0
"""Few keys with weights and values of their own, fitted so that attention over them gives what all keys gave.

Zweiger et al., "Fast KV Compaction via Attention Matching", arXiv 2602.16284. A compact cache need not hold tokens: it
has to give the reference queries Q of a key/value head the same mass and the same output. In closed form, with K, V the
head's cache and t keys to keep:

- C, the keys with the largest root mean square of their attention weights over Q (released: ``AM-HighestAttnKeys``);
- w >= 0, a weight for each key of C that makes up for the mass of what is dropped: min |exp(Q C^T) w - exp(Q K^T) 1|^2
  by least squares clipped to [e^-3, e^3] and ``iterations`` of projected gradient; beta = log w joins its logits;
- V' for the keys of C: min |softmax(Q C^T + beta) V' - softmax(Q K^T) V|^2, by least squares.

Every query is taken to see the whole text, as the ones to come will. Tokens of ``sinks``, ``recent`` and ``protect``
stay as they are, and the rest is fitted beside them.

Here Q are the last ``window_size`` queries of the prompt, of all heads of the group (the paper's simplest choice; it
does better with queries of the model talking to itself about the text, and with key selection by matching pursuit,
neither of which is here). Least squares have a ridge of ``ridge`` times the mean diagonal. The prompt is compacted once
(``schedule=prefill``). A slot holds one number more, its beta, in the model's dtype; attention goes through the mask,
and decoding is not compiled. Padding, sliding windows and caches of latents: rows may be padded, sliding-window layers
are left as they are, latents are refused.
"""

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..attention import reference
from ..call import AttentionCall, Site
from ..errors import UserError
from ._policy import Schedule, must_stay
from ._store import PolicyStore
from ._strategy import EvictionStrategy
from ._view import CacheView

__all__ = ["AttentionMatching", "MatchingStore", "fit"]

_BETA = "beta"
_BOUND = 3.0  # of beta, on either side
_POWERS = 60  # of a matrix, until its largest eigenvalue is known


@dataclass(frozen=True, kw_only=True)
class AttentionMatching(EvictionStrategy):
    """Keys of most attention, with weights and values fitted to what all keys gave.

    Attributes:
        window_size: last queries of the prompt that attention is matched for.
        iterations: of projected gradient on the weights, after clipped least squares.
        ridge: of the least squares, times the mean of the diagonal.
        fit_mass, fit_values: with weights, with values of their own.
        schedule: always prefill.
    """

    dense_prefill: ClassVar[bool] = True

    schedule: Schedule = field(default="prefill", metadata={"help": "always prefill"})
    window_size: int = field(default=512, metadata={"help": "last queries that attention is matched for"})
    iterations: int = field(default=2, metadata={"help": "of projected gradient on the weights"})
    ridge: float = field(default=1e-4, metadata={"help": "of the least squares, times the mean diagonal"})
    fit_mass: bool = field(default=True, metadata={"help": "with weights for the mass of what is dropped"})
    fit_values: bool = field(default=True, metadata={"help": "with values that give the same output"})

    def __post_init__(self) -> None:
        if self.window_size < 1 or self.iterations < 0 or not self.ridge > 0:
            raise UserError("attention_matching: window_size is 1 or more, iterations 0 or more, ridge above 0")
        if self.schedule != "prefill":
            raise UserError(f"attention_matching fits once: its schedule is prefill, not {self.schedule}")
        super().__post_init__()

    @property
    def window(self) -> int:
        return self.window_size

    def store(self, site: Site) -> PolicyStore:
        if site.latent is not None:
            raise UserError(f"attention_matching fits keys and values, and {site.name} caches latents: choose snapkv")
        return PolicyStore(replace(self, budget=1.0), site) if site.window is not None else MatchingStore(self, site)

    def score(self, view: CacheView) -> Tensor:
        weights, _, real = reference_attention(view)
        mean = weights.square().masked_fill(~real, 0.0).sum(2) / real.sum(2).clamp(min=1)
        return mean.sqrt()


class MatchingStore(PolicyStore):
    """Slots with a number that is added to their logits."""

    policy: AttentionMatching

    @property
    def why_not_fixed(self) -> str | None:
        return f"{self.policy.spec} adds a number to the logits of each slot, which is not compiled; leave room away"

    def mask(self, call: AttentionCall) -> AttentionCall:
        seen = super().mask(call)
        beta = self.live.extras.get(_BETA)
        if beta is None:
            return seen
        bias = reference.repeat_kv(beta, call.q.shape[1]).transpose(2, 3)
        return seen.replace(bias=bias.to(call.q.dtype))

    def compress(self, view: CacheView, share: Tensor | float | None = None) -> None:
        slots, policy = self.live, self.policy
        before = slots.size
        super().compress(view, share)
        if slots.size == before or not (policy.fit_mass or policy.fit_values):
            return
        # Which of the slots before each kept one was: both hold positions in ascending order, empty ones nowhere.
        positions = slots.positions()
        same = positions[..., None] == view.positions[:, :, None]
        chosen = same.to(torch.uint8).argmax(-1)
        fixed = must_stay(policy, view).gather(2, chosen)
        beta, values = fit(view, chosen, (positions >= 0) & ~fixed, policy)
        slots.values = values.to(slots.values.dtype)
        if policy.fit_mass:
            slots.extras[_BETA] = beta[..., None].to(slots.keys.dtype)


def reference_attention(view: CacheView) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of the reference queries over all keys, ``[B, Hkv, G W, N]``; exp of their logits; which are real."""
    assert view.queries is not None
    heads, queries = view.k.shape[1], view.queries
    q = reference.widened(queries.q).unflatten(1, (heads, -1)).flatten(2, 3)  # [B, Hkv, G W, d]
    x = q @ reference.widened(view.k).transpose(-1, -2) * view.scale
    if view.softcap is not None:
        x = torch.tanh(x / view.softcap) * view.softcap
    x = x.masked_fill((view.positions < 0)[:, :, None], -torch.inf)
    mass = (x - x.amax(-1, keepdim=True)).exp()
    real = (queries.positions >= 0)[:, None].repeat(1, heads, q.shape[2] // queries.positions.shape[1])[..., None]
    return mass / mass.sum(-1, keepdim=True), mass, real


def fit(view: CacheView, chosen: Tensor, free: Tensor, policy: AttentionMatching) -> tuple[Tensor, Tensor]:
    """beta ``[B, Hkv, t]`` and values ``[B, Hkv, t, dv]`` of the slots ``chosen [B, Hkv, t]`` of a view.

    Slots that are not ``free [B, Hkv, t]`` keep a beta of 0 and their own value. In float64: the columns of the least
    squares are nearly the same.
    """
    weights, mass, real = (x.double() if x.is_floating_point() else x for x in reference_attention(view))
    weights, mass = weights.masked_fill(~real, 0.0), mass.masked_fill(~real, 0.0)
    columns = mass.gather(3, chosen[:, :, None].expand(-1, -1, mass.shape[2], -1))  # [B, Hkv, G W, t]
    held = columns.masked_fill(~free[:, :, None], 0.0)
    beta = torch.zeros_like(free, dtype=columns.dtype)
    if policy.fit_mass:
        rest = mass.sum(-1, keepdim=True) - (columns - held).sum(-1, keepdim=True)
        gram, target = held.transpose(-1, -2) @ held, held.transpose(-1, -2) @ rest
        low, high = math.exp(-_BOUND), math.exp(_BOUND)
        w = _solve(gram, target, free, policy.ridge).clamp(low, high)
        step = 1 / _largest(gram).clamp(min=torch.finfo(gram.dtype).tiny)
        for _ in range(policy.iterations):
            w = (w - step * (gram @ w - target)).clamp(low, high)
        beta = w[..., 0].log().masked_fill(~free, 0.0)
    own = view.v.double()
    values = own.gather(2, chosen[..., None].expand(-1, -1, -1, own.shape[3]))
    if policy.fit_values:
        shares = columns * beta.exp()[:, :, None]
        shares = shares / shares.sum(-1, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
        moving = shares.masked_fill(~free[:, :, None], 0.0)
        missing = weights @ own - (shares - moving) @ values
        gram, target = moving.transpose(-1, -2) @ moving, moving.transpose(-1, -2) @ missing
        values = torch.where(free[..., None], _solve(gram, target, free, policy.ridge), values)
    return beta, values


def _largest(gram: Tensor) -> Tensor:
    """The largest eigenvalue ``[..., 1, 1]`` of matrices without negative entries, by power iteration."""
    x = torch.ones_like(gram[..., :1])
    for _ in range(_POWERS):
        x = gram @ x
        x = x / torch.linalg.vector_norm(x, dim=-2, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    found: Tensor = torch.linalg.vector_norm(gram @ x, dim=-2, keepdim=True)
    return found


def _solve(gram: Tensor, target: Tensor, free: Tensor, ridge: float) -> Tensor:
    """Least squares of a Gram matrix ``[..., t, t]`` with a ridge; rows that are not ``free [..., t]`` give 0."""
    mean = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / free.sum(-1).clamp(min=1)
    size = (ridge * mean).clamp(min=torch.finfo(gram.dtype).tiny)[..., None].expand_as(free)
    found: Tensor = torch.linalg.solve(gram + torch.diag_embed(torch.where(free, size, 1.0)), target)
    return found
