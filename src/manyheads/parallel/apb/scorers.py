# SPDX-License-Identifier: Apache-2.0
"""Which keys and values of its block a host passes on: scores ``[B, Hkv, T]``, of which each head's highest are taken.

- ``query``: attention of the query to the block (Spava, arXiv 2601.21444, scores by the query, too), or as ``snapkv``
  where there is none;
- ``snapkv``: attention of the block's last tokens to it (SnapKV, arXiv 2404.14469, which also keeps those themselves);
- ``knorm``: small keys (arXiv 2406.11430);
- ``distinct``: keys unlike the mean of the block's (KeyDiff, arXiv 2504.15364);
- ``hedge``: the better of two places, by distinctness and by attention times the size of the value, as the cache of
  that name ranks;
- ``random``;
- ``retaining``: trained heads, see :mod:`.heads`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...attention import reference
from ...attention.rope import Rotary
from ...errors import UserError
from .heads import features

__all__ = ["SCORERS", "Block", "selected"]

_DISTINCT = 0.35  # part of hedge's ranking that is by distinctness, as in the cache


@dataclass(frozen=True)
class Block:
    """What a host knows when it scores its block in a layer.

    Attributes:
        q, k, v: ``[B, H, T, d]``, ``[B, Hkv, T, d]`` and ``[B, Hkv, T, dv]`` of its block, rotated.
        asked: ``[B, H, l_q, d]``, queries of the query, rotated.
        scale: of the logits.
        rotary: cosines and sines ``[B, T, r]`` of the block; None where the model does not pass them on.
        layer, host: by number.
        seed: of random scores.
        window: last tokens of the block whose attention counts.
        heads: retaining heads of the layer.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    asked: Tensor
    scale: float
    rotary: Rotary | None = None
    layer: int = 0
    host: int = 0
    seed: int = 0
    window: int = 32
    heads: Any = None


def _attention(q: Tensor, k: Tensor, scale: float, seen: Tensor | None = None) -> Tensor:
    """Attention weights to ``k [B, Hkv, T, d]``, averaged over queries and a group's heads: ``[B, Hkv, T]``."""
    grouped = reference.widened(q).unflatten(1, (k.shape[1], -1))
    x = torch.einsum("bhgtd,bhsd->bhgts", grouped, reference.widened(k)) * scale
    return (x if seen is None else x.masked_fill(~seen, -torch.inf)).softmax(-1).mean((2, 3))


def _query(block: Block) -> Tensor:
    return _attention(block.asked, block.k, block.scale) if block.asked.shape[2] else _snapkv(block)


def _snapkv(block: Block) -> Tensor:
    size = block.k.shape[2]
    last = min(block.window, size)
    seen = torch.ones(last, size, dtype=torch.bool, device=block.k.device).tril(size - last)
    return _attention(block.q[:, :, size - last :], block.k, block.scale, seen)


def _knorm(block: Block) -> Tensor:
    found: Tensor = -torch.linalg.vector_norm(reference.widened(block.k), dim=-1)
    return found


def _distinct(block: Block) -> Tensor:
    k = torch.nn.functional.normalize(reference.widened(block.k), dim=-1)
    found: Tensor = -torch.nn.functional.cosine_similarity(k, k.sum(2, keepdim=True), dim=-1)
    return found


def _hedge(block: Block) -> Tensor:
    used = _query(block) * torch.linalg.vector_norm(reference.widened(block.v), dim=-1)
    places = [x.argsort(dim=-1, descending=True, stable=True).argsort(-1) + 1.0 for x in (_distinct(block), used)]
    return -torch.minimum(places[0] / _DISTINCT, places[1] / (1 - _DISTINCT))


def _random(block: Block) -> Tensor:
    generator = torch.Generator().manual_seed((block.seed * 1009 + block.layer) * 1009 + block.host)
    drawn = torch.rand(1, *block.k.shape[1:3], generator=generator, dtype=torch.float64)
    return drawn.expand(len(block.k), -1, -1).to(block.k.device)


def _retaining(block: Block) -> Tensor:
    if block.heads is None or block.rotary is None:
        raise UserError("apb: retaining heads are trained ones, and read what a model shows before rotation")
    scores: Tensor = block.heads(features(block.q, block.k, block.v, block.rotary))
    return scores


SCORERS: dict[str, Callable[[Block], Tensor]] = {
    "query": _query, "snapkv": _snapkv, "knorm": _knorm, "distinct": _distinct, "hedge": _hedge, "random": _random,
    "retaining": _retaining,
}  # fmt: skip


def selected(scores: Tensor, count: int, barred: int = 0, pooling: int = 1) -> Tensor:
    """Tokens ``[B, Hkv, count]`` of the highest scores, ascending.

    Args:
        scores: ``[B, Hkv, T]``.
        count: of tokens; at most ``T - barred``.
        barred: first tokens that are not taken.
        pooling: odd; a score becomes the highest of so many neighbours', itself among them. 1 for none.
    """
    if pooling > 1 and scores.shape[2]:
        scores = torch.nn.functional.max_pool1d(scores, pooling, 1, pooling // 2)
    scores = scores.masked_fill(torch.arange(scores.shape[2], device=scores.device) < barred, -torch.inf)
    order = scores.argsort(dim=-1, descending=True, stable=True)  # of equals the first, on every device
    return order[..., :count].sort(-1).values
