# SPDX-License-Identifier: Apache-2.0
"""The dtype of a model's weights, changed as transformers loads them."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["cast"]


def cast(model: Any, dtype: torch.dtype) -> Any:
    """``model`` in place, its parameters and the buffers that are saved with them in ``dtype``.

    Buffers that are not saved stay: rotary frequencies in bfloat16 would turn a token at position 200 by up to 0.4
    radians too far or too little, and a checkpoint that is loaded in bfloat16 has them in float32.
    """
    saved = model.state_dict(keep_vars=True)
    for tensor in {id(x): x for x in saved.values() if x.is_floating_point()}.values():
        tensor.data = tensor.data.to(dtype)
    return model
