# SPDX-License-Identifier: Apache-2.0
"""Prompts that a cache strategy has the model read twice, before it drops anything of them."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.cache_utils import Cache, EncoderDecoderCache

from ..errors import UserError
from .cache import StoreLayer, cache_arguments, store_layers

__all__ = ["read_again"]

_PROMPT = "_manyheads_prompt"  # of a cache: tokens read so far of a prompt that will be read again


def read_again(model: nn.Module, cache: Cache | None, ids: Tensor) -> None:
    """After a forward of ``ids [B, T]`` into ``cache``: read the prompt again where it ended and a strategy wants that.

    Args:
        model: that ran, and that runs again.
        cache: of the forward, None where there is none.
        ids: its tokens, or their embeddings ``[B, T, D]``.

    Raises:
        UserError: a layer of the cache is not kept by the strategy, or the prompt came as embeddings.
    """
    if cache is None or isinstance(cache, EncoderDecoderCache):  # whose prompt is the encoder's
        return
    layers = cache.layers
    stores = [layer.store for layer in store_layers(cache) if layer.strategy.rereads]
    if not any(store.second_reading or store.prefilling for store in stores):
        return
    before = cache.__dict__.pop(_PROMPT, None)
    if isinstance(before, _Reading):
        cache.__dict__[_PROMPT] = before
        return  # this is the second reading
    if ids.ndim != 2:
        raise UserError(f"{stores[0].site.name}: a prompt that is read twice is given as input_ids, not as embeddings")
    ids = ids if before is None else torch.cat([before, ids], 1)
    reading = next((store.second_reading for store in stores if store.second_reading), None)
    if reading is None:
        cache.__dict__[_PROMPT] = ids
        return
    if any(type(layer) is not StoreLayer for layer in layers):
        raise UserError("a prompt is read twice where the strategy keeps all layers: leave layers= away")
    more = cache_arguments(model, cache)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        more["logits_to_keep"] = 1
    cache.__dict__[_PROMPT] = _Reading()
    try:
        with torch.no_grad():
            for piece in reading(ids, lambda text: _encode(model, text)):
                model(input_ids=piece, **more)
    finally:
        del cache.__dict__[_PROMPT]


class _Reading:
    """Stands in place of a prompt while it is read again."""


def _encode(model: Any, text: str) -> list[int]:
    name = model.config.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the prompt is read again behind an instruction, and no tokenizer is found at {name!r}: use instruct=false"
        ) from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
