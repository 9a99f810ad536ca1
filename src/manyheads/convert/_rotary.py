# SPDX-License-Identifier: Apache-2.0
"""Decoders whose attention a conversion may rebuild from its weights alone: rotary, and linear up to the softmax."""

from __future__ import annotations

from ..conversion import Anatomy
from ..errors import UserError

__all__ = ["check_rotary"]

_TYPES = frozenset({"llama", "mistral", "qwen2", "gemma"})  # no norm, no cap between projections and logits


def check_rotary(slug: str, model: Anatomy) -> None:
    """Refuse a model whose keys are something else than linear in what its attention reads, then turned.

    Raises:
        UserError: it is of another type, or of one that is not known.
    """
    kind = model.config.model_type
    if kind not in _TYPES:
        raise UserError(
            f"{slug}: keys of {kind} models are not known to be linear in what their attention reads; convert one of "
            f"{', '.join(sorted(_TYPES))}"
        )
