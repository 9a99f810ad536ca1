# SPDX-License-Identifier: Apache-2.0
"""Texts as vectors, by a model that learns nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["embedded_texts"]


@torch.no_grad()
def embedded_texts(
    model: Any, tokenizer: Any, texts: Sequence[str], most: int | None = 128, at_once: int = 64
) -> Tensor:
    """Embeddings ``[N, dim]`` of length 1 of texts of any length: the mean of the last hidden states, float32.

    Args:
        model, tokenizer: as of :func:`manyheads.models.load_reader`.
        texts: ``[N]``.
        most: tokens of a text that are read; None for as many as the tokenizer says.
        at_once: texts of a batch.
    """
    found = []
    for first in range(0, len(texts), at_once):
        given = tokenizer(list(texts[first : first + at_once]), padding=True, truncation=True, max_length=most,
                          return_tensors="pt").to(model.device)  # fmt: skip
        mask = given["attention_mask"][..., None].float()
        found.append((model(**given).last_hidden_state.float() * mask).sum(1) / mask.sum(1))
    return torch.nn.functional.normalize(torch.cat(found), dim=-1).cpu()
