# SPDX-License-Identifier: Apache-2.0
"""Retaining heads (Locret, arXiv 2410.01805): a small network in each layer that says which tokens will be looked at.

    score = W_2 silu(W_1 [q ; k ; v] + b_1) + b_2        [q ; k ; v] of all heads before rotation, a score per Hkv head

They learn the causal importance of a token: the largest logit that a later query, of those that answer, has for it in a
key/value head's group. The loss is a smooth L1, and a small part for scores that jump from a token to the next:

    loss = smooth_l1(score, target) + alpha mean (score_t+1 - score_t)^2        alpha = 0.0025
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import reference, rope
from ...calls.layer_modules import LayerModules

__all__ = ["HOW", "RetainingHeads", "causal_importance", "features"]

HOW = "python -m manyheads.recipes.apb --model MODEL --out FOLDER"
_SMOOTHING = 0.0025


class _Head(nn.Module):
    """Scores ``[B, Hkv, T]`` of ``[B, T, dim]``."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.SiLU(), nn.Linear(hidden, heads))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layers(reference.widened(x).to(next(self.parameters()).dtype))
        return found.transpose(1, 2)


class RetainingHeads(LayerModules):
    """The heads of a model by layer.

    Args:
        dim: of a token's queries, keys and values of all heads: ``(H + Hkv) d + Hkv dv``.
        kv_heads: Hkv of each layer that has them.
        hidden: units; a sixth of ``dim`` if negative, as the 1,024 of Llama-3-8B are.
        about: how they were trained, plain values.
    """

    files, what, user, how = "retaining_heads", "heads", "apb", HOW

    def __init__(
        self, dim: int, kv_heads: Mapping[int, int], hidden: int = -1, about: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(kv_heads, {"dim": dim, "hidden": max(1, dim // 6) if hidden < 0 else hidden}, about)

    def make(self, heads: int, **more: Any) -> nn.Module:
        return _Head(self.config["dim"], heads, self.config["hidden"])

    @staticmethod
    def loss(scores: Tensor, target: Tensor) -> Tensor:
        """A scalar: how far scores ``[B, Hkv, T]`` are from ``target``, and how much they jump."""
        jumps = scores.diff(dim=-1).square().mean()
        return nn.functional.smooth_l1_loss(scores, target) + _SMOOTHING * jumps


def features(q: Tensor, k: Tensor, v: Tensor, rotary: rope.Rotary) -> Tensor:
    """What the heads of a layer read of its tokens: ``[B, T, (H + Hkv) d + Hkv dv]``, before rotation.

    Args:
        q, k, v: ``[B, H, T, d]``, ``[B, Hkv, T, d]`` and ``[B, Hkv, T, dv]``, rotated.
        rotary: their cosines and sines, ``[B, T, r]``.
    """
    q, k = (rope.unrotate(reference.widened(x), rotary) for x in (q, k))
    return torch.cat([x.transpose(1, 2).flatten(2).to(v.dtype) for x in (q, k, v)], -1)


def causal_importance(q: Tensor, k: Tensor, scale: float, answer: int) -> Tensor:
    """The largest logit that each token gets of the last ``answer`` queries, of those behind it: ``[B, Hkv, T]``.

    Args:
        q: ``[B, H, T, d]``, rotated.
        k: ``[B, Hkv, T, d]``, rotated.
        scale: of the logits.
        answer: queries that count; every token but the last has one behind it.
    """
    size = k.shape[2]
    grouped = reference.widened(q[:, :, size - answer :]).unflatten(1, (k.shape[1], -1))
    x = torch.einsum("bhgtd,bhsd->bhgts", grouped, reference.widened(k)) * scale
    later = torch.ones(answer, size, dtype=torch.bool, device=k.device).tril(size - answer)
    return x.masked_fill(~later, -torch.inf).amax((2, 3))
