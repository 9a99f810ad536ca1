# SPDX-License-Identifier: Apache-2.0
"""Outlying channels, planted: small models lack the ones that large models have, and few bits fail on."""

from __future__ import annotations

import copy
from typing import Any

import torch
from numpy.random import Generator

from ...errors import UserError

__all__ = ["check_same", "planted", "planted_channels", "why_no_keys"]

_EVERY = 128  # inputs of a layer that have one planted channel among them


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


def why_no_keys(model: Any) -> str | None:
    """Why outlying key channels cannot be planted in ``model``, None if they can."""
    from ...integrations.transformers import find_sites

    if any(site.keys_normed for site, _ in find_sites(model)):
        return f"{type(model).__name__} normalises its keys, so that no outlying channel of W_k reaches them"
    return None


def planted_channels(model: Any, factor: float, rng: Generator) -> Any:
    """A copy whose feed-forward layers have outlying input channels, one of 128, in their last linear layer.

    Row j of ``up_proj`` is divided by ``factor`` and column j of ``down_proj`` multiplied by it. With a power of two
    the copy computes bit for bit what the model does, see :func:`check_same`.

    Raises:
        UserError: feed-forward layers of another make than Llama's.
    """
    other = copy.deepcopy(model)
    blocks: list[Any] = [getattr(layer, "mlp", None) for layer in other.get_decoder().layers]
    if not all(hasattr(mlp, "up_proj") and hasattr(mlp, "down_proj") for mlp in blocks):
        raise UserError(f"{type(model).__name__} has no up_proj and down_proj in every layer to plant channels in")
    with torch.no_grad():
        for mlp in blocks:
            size = mlp.down_proj.in_features
            chosen = [min(first + int(rng.integers(_EVERY)), size - 1) for first in range(0, size, _EVERY)]
            mlp.down_proj.weight[:, chosen] *= factor
            for x in (mlp.up_proj.weight, mlp.up_proj.bias):
                if x is not None:
                    x[chosen] /= factor
    return other


def check_same(model: Any, other: Any, ids: torch.Tensor) -> None:
    """Raise UserError unless both predict the same after ``ids [B, T]``, bit for bit."""
    with torch.inference_mode():
        if not torch.equal(model(input_ids=ids).logits, other(input_ids=ids).logits):
            raise UserError(
                "planting outlying channels changed what the model computes (it normalises keys, rotates other pairs, "
                "or the factor is no power of two): no loss of it would be the strategy's"
            )
