# SPDX-License-Identifier: Apache-2.0
"""Adapters of low rank in all linear layers of a model, trained in place of its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import UserError

__all__ = ["adapters"]


@contextmanager
def adapters(model: Any, rank: int) -> Iterator[Any]:
    """Put adapters in as long as this is open, and merge them into the weights at its end; alpha is twice the rank.

    After an error they are taken out, and the weights are those from before.

    Args:
        model: of transformers; its own weights get no gradients meanwhile.
        rank: 0 for no adapters: all weights are trained.

    Raises:
        UserError: peft is not there.
    """
    if not rank:
        yield model
        return
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("adapters need peft: pip install 'manyheads[train]'") from error
    adapted: Any = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    try:
        yield adapted
    except BaseException:
        adapted.unload()
        raise
    else:
        adapted.merge_and_unload()
    finally:
        model.requires_grad_(True)
