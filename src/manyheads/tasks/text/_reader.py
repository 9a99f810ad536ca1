# SPDX-License-Identifier: Apache-2.0
"""A published encoder and texts that fill it, for tasks that look at its embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...data.texts import corpus
from ...errors import UserError
from ...experiment import RunContext

__all__ = ["embedded", "long_texts", "reader", "whole"]

_AT_ONCE = 8  # texts embedded at once


def reader(run: RunContext, model: str) -> tuple[Any, Any]:
    """An encoder in float32 and its tokenizer, see :func:`manyheads.models.load_reader`; loaded once a process."""

    def make() -> tuple[Any, Any]:
        from ...models import load_reader

        return load_reader(model, run.device, torch.float32)

    return cast(tuple[Any, Any], run.kept(("reader", model), make))


def long_texts(
    run: RunContext, tokenizer: Any, text: str, least: int, count: int, rng: np.random.Generator
) -> list[list[int]]:
    """Texts of at least ``least`` tokens, in a drawn order: the user's, or those of the corpus ``text``.

    Raises:
        UserError: there are fewer than ``count``.
    """
    given = run.data.get("texts") or corpus(text)
    held = [given[int(i)] for i in rng.permutation(len(given))]
    read = [tokenizer.encode(one.content, add_special_tokens=False, verbose=False) for one in held]
    long = [ids for ids in read if len(ids) >= least]
    if len(long) < count:
        raise UserError(f"{count} texts of {least} tokens are needed, not {len(long)}")
    return long


def whole(tokenizer: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of as many tokens as one batch, with the tokens at both ends, int64."""
    return torch.tensor([[tokenizer.cls_token_id, *row, tokenizer.sep_token_id] for row in rows])


@torch.no_grad()
def embedded(model: Any, ids: Tensor) -> Tensor:
    """Embeddings ``[N, dim]`` of length 1 of texts ``[N, T]``: the mean of the last hidden states."""
    means = [model(input_ids=part).last_hidden_state.mean(1) for part in ids.split(_AT_ONCE)]
    return torch.nn.functional.normalize(torch.cat(means), dim=-1)
