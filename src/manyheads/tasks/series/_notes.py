# SPDX-License-Identifier: Apache-2.0
"""Embeddings of texts by a frozen encoder, each computed once in a process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .._embedded import embedded_texts

__all__ = ["WORDS", "embedded", "text_width"]

WORDS = "words"  # the stand-in for an encoder
_WIDTH, _HASHED = 384, 4096
_AT_ONCE = 32  # texts
_KNOWN: dict[tuple[str, str], Tensor] = {}


def text_width(encoder: str) -> int:
    """Numbers of an embedding."""
    return _WIDTH if encoder == WORDS else int(_reader(encoder)[0].config.hidden_size)


def embedded(texts: Sequence[str], encoder: str) -> Tensor:
    """Embeddings ``[N, D]`` of length 1: the mean of the encoder's last hidden states over the first 128 tokens.

    Raises:
        UserError: the encoder cannot be had.
    """
    missing = sorted({text for text in texts if (encoder, text) not in _KNOWN}, key=len)
    for first in range(0, len(missing), _AT_ONCE):
        some = missing[first : first + _AT_ONCE]
        found = _hashed(some) if encoder == WORDS else embedded_texts(*_reader(encoder), some)
        _KNOWN.update({(encoder, text): row for text, row in zip(some, found, strict=True)})
    if not texts:
        return torch.zeros(0, text_width(encoder))
    return torch.stack([_KNOWN[encoder, text] for text in texts])


@cache
def _reader(encoder: str) -> tuple[Any, Any]:
    from ...models import load_reader

    return load_reader(encoder, "cuda" if torch.cuda.is_available() else "cpu", torch.float32)


@cache
def _projection() -> Tensor:
    return torch.randn(_HASHED, _WIDTH, generator=torch.Generator().manual_seed(0))


def _hashed(texts: Sequence[str]) -> Tensor:
    counts = torch.zeros(len(texts), _HASHED)
    for row, text in zip(counts, texts, strict=True):
        for word in text.lower().split():
            row[int.from_bytes(hashlib.sha256(word.strip(".,;:!?()").encode()).digest()[:4], "big") % _HASHED] += 1
    return torch.nn.functional.normalize(counts.sqrt() @ _projection(), dim=-1)
