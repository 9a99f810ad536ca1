# SPDX-License-Identifier: Apache-2.0
"""Whether a model's tokens see what comes after them, and dropout in the training of a model that was made without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .anatomy import ModelAnatomy

__all__ = ["dropped_out", "is_bidirectional"]

_TOKENS, _TEXTS = 8, 4
_MOVED = 1e-4  # relative change of a state, far above rounding in float32; in 16 bits rows that are equal stay equal


@torch.inference_mode()
def is_bidirectional(model: Any) -> bool:
    """Whether a later token changes the state of an earlier one, found out by changing it.

    A config that says so proves nothing: versions of transformers ignore the flag, and functions of attention that are
    a user's own may too. So texts are drawn, read twice with another last token, and the states before it compared.

    Args:
        model: of transformers, that reads token ids; it stays as it is.
    """
    words, device = int(model.config.get_text_config().vocab_size), next(model.parameters()).device
    ids = torch.randint(words, (_TEXTS, _TOKENS), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1 + words // 2) % words
    was = model.training
    try:
        both = torch.cat([ids, other]).to(device)
        states = model.eval()(input_ids=both, attention_mask=torch.ones_like(both))[0].float()
    finally:
        model.train(was)
    one, two = states[:, :-1].chunk(2)
    moved = (one - two).norm(dim=-1) / one.norm(dim=-1).clamp(min=1e-12)
    return bool(moved.max() > _MOVED)


@contextmanager
def dropped_out(model: Any, rate: float) -> Iterator[None]:
    """In training, drop so much of the attention weights and of the outputs of feed-forward parts of a decoder.

    Encoders have dropout of their own, which is left alone, as is everything at a rate of 0.

    Args:
        model: of a known family.
        rate: in [0, 1).
    """
    anatomy = ModelAnatomy(model)
    if not rate or not anatomy.map.causal:
        yield
        return

    def drop(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return nn.functional.dropout(out, rate, module.training)

    handles = [block.get_submodule(anatomy.map.modules["mlp"]).register_forward_hook(drop) for block in anatomy.blocks]
    attentions: list[Any] = [block.get_submodule(anatomy.map.head) for block in anatomy.blocks]
    # GPT-2 keeps the rate in a module, the others in a number.
    places = [(m.attn_dropout, "p") if hasattr(m, "attn_dropout") else (m, "attention_dropout") for m in attentions]
    before = [getattr(place, name) for place, name in places]
    try:
        for place, name in places:
            setattr(place, name, rate)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for (place, name), old in zip(places, before, strict=True):
            setattr(place, name, old)
