# SPDX-License-Identifier: Apache-2.0
"""Outlying key channels, planted: small models lack the ones that large models have, and caches of few bits fail on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from numpy.random import Generator

from ...errors import UserError

__all__ = ["check_same", "planted"]


def planted(model: Any, factor: float, rng: Generator) -> Any:
    """A copy with one outlying rotary pair in every layer and key/value head.

    The pair's rows of W_k (and of its bias) are multiplied by ``factor`` and those of W_q divided by it. With a power
    of two the copy computes bit for bit what the model does, see :func:`check_same`.

    Raises:
        UserError: attention of another make than Llama's.
    """
    other = copy.deepcopy(model)
    layers = other.get_decoder().layers
    if not all(hasattr(getattr(layer, "self_attn", None), "k_proj") for layer in layers):
        raise UserError(f"{type(model).__name__} has no k_proj in every layer to plant outlying channels in")
    with torch.no_grad():
        for attention in (layer.self_attn for layer in layers):
            dim = attention.head_dim
            heads = attention.k_proj.out_features // dim
            pairs = rng.integers(0, dim // 2, heads)
            for part, by in ((attention.k_proj, factor), (attention.q_proj, 1 / factor)):
                for x in (part.weight, part.bias):
                    if x is not None:
                        grouped = x.unflatten(0, (heads, -1, dim))
                        for head, pair in enumerate(pairs.tolist()):
                            grouped[head, :, [pair, pair + dim // 2]] *= by
    return other


def check_same(model: Any, other: Any, ids: torch.Tensor) -> None:
    """Raise UserError unless both predict the same after ``ids [B, T]``, bit for bit."""
    with torch.inference_mode():
        if not torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits):
            raise UserError(
                "planting outlying key channels changed what the model computes (it normalises keys, rotates other "
                "pairs, or the factor is no power of two): no loss of it would be the cache's"
            )
