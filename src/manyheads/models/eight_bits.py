# SPDX-License-Identifier: Apache-2.0
"""Shipped weights in 8 bits: half the bytes to install and to send to another machine.

A matrix ``[rows, ...]`` becomes int8 codes of its shape and a float32 scale a row, ``scale = max |x| / 127``; what is
read back is off by at most half a scale. Vectors (norms, biases) stay as they were. The file is
``weights.int8.safetensors``, a name that no library takes for plain weights, and what is loaded is an ordinary model:
``save_pretrained`` writes it as a plain checkpoint. What rounding costs stands on each model's card.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["FILE", "load_into", "pack", "save", "unpack"]

FILE = "weights.int8.safetensors"
_SCALE = ".scale"  # behind the name of a matrix


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by name -> codes, scales and vectors by name."""
    packed = {}
    for name, x in state.items():
        x = x.detach().cpu()
        if x.ndim < 2:
            packed[name] = x.contiguous()
            continue
        rows = x.float().flatten(1)
        scale = rows.abs().amax(1) / 127
        scale = torch.where(scale == 0, 1.0, scale)
        packed[name] = (rows / scale[:, None]).round().to(torch.int8).view(x.shape).contiguous()
        packed[name + _SCALE] = scale
    return packed


def unpack(packed: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inverse of :func:`pack`, in ``dtype``."""
    found = {}
    for name, x in packed.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in packed:
            continue
        scale = packed.get(name + _SCALE)
        found[name] = (x if scale is None else x.float() * scale.view(-1, *[1] * (x.ndim - 1))).to(dtype)
    return found


def save(model: nn.Module, folder: Path) -> None:
    """Write the weights of ``model`` into ``folder``, those that are tied to others once."""
    seen: set[int] = set()
    state = {}
    for name, x in model.state_dict().items():
        if x.data_ptr() not in seen:
            state[name] = x
            seen.add(x.data_ptr())
    save_file(pack(state), folder / FILE)


def load_into(model: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Fill ``model``, built from the configuration in ``folder``, with its weights; return it.

    Raises:
        ValueError: a weight is missing or is of no module.
    """
    missing, unexpected = model.load_state_dict(unpack(load_file(folder / FILE), dtype), strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ())
    if wrong := sorted({*missing} - tied) + sorted(unexpected):
        raise ValueError(f"{wrong[0]} is in the model or in {FILE}, and not in both")
    if tied:
        model.tie_weights()
    return model
