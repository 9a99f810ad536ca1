# SPDX-License-Identifier: Apache-2.0
"""Shipped weights in 8 or 6 bits: half the bytes or less to install and to send to another machine.

In 8 bits a matrix ``[rows, ...]`` becomes int8 codes of its shape and a float32 scale a row, ``scale = max |x| / 127``.
In 6 bits ``[rows, columns]`` becomes bytes ``[rows, 3 columns / 4]``, four codes in three of them, and a float16 scale
for every 64 columns, ``max |x| / 31``; others stay in 8 bits. What is read back is off by at most half a scale. Vectors
(norms, biases) and what is named ``whole`` stay as they were. The file is ``weights.packed.safetensors``, a name that
no library takes for plain weights, and what is loaded is an ordinary model: ``save_pretrained`` writes it as a plain
checkpoint. What rounding costs stands on each model's card.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

__all__ = ["FILE", "Bits", "load_into", "pack", "save", "unpack"]

FILE = "weights.packed.safetensors"
Bits = Literal[8, 6]
_SCALE = ".scale"  # behind the name of a matrix
_GROUP = 64  # columns of a scale in 6 bits
_SHIFTS = (0, 6, 12, 18)  # of four codes in three bytes


def pack(state: Mapping[str, Tensor], bits: Bits = 8, whole: Collection[str] = ()) -> dict[str, Tensor]:
    """Weights by name -> codes, scales and vectors by name; those of ``whole`` are not rounded."""
    packed = {}
    for name, x in state.items():
        x = x.detach().cpu()
        if x.ndim < 2 or name in whole:
            packed[name] = x.contiguous()
        else:
            narrow = bits == 6 and x.ndim == 2 and x.shape[1] % _GROUP == 0
            packed[name], packed[name + _SCALE] = (_six if narrow else _eight)(x.float())
    return packed


def unpack(packed: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The inverse of :func:`pack`, in ``dtype``."""
    found = {}
    for name, x in packed.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in packed:
            continue
        scale = packed.get(name + _SCALE)
        if scale is not None and x.dtype == torch.uint8:
            x = (_codes(x).unflatten(1, (-1, _GROUP)) * scale.float()[..., None]).flatten(1)
        elif scale is not None:
            x = x.float() * scale.view(-1, *[1] * (x.ndim - 1))
        found[name] = x.to(dtype)
    return found


def _eight(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.flatten(1)
    scale = rows.abs().amax(1) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (rows / scale[:, None]).round().to(torch.int8).view(x.shape).contiguous(), scale


def _six(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.unflatten(1, (-1, _GROUP))
    scale = (groups.abs().amax(2) / 31).half()
    scale = torch.where(scale == 0, 1.0, scale)
    codes = (groups / scale.float()[..., None]).round().clamp(-31, 31).int().flatten(1) + 32
    word = sum(part << shift for part, shift in zip(codes.unflatten(1, (-1, 4)).unbind(2), _SHIFTS, strict=True))
    assert isinstance(word, Tensor)
    parts = torch.stack([word >> shift & 255 for shift in (0, 8, 16)], 2)
    return parts.flatten(1).to(torch.uint8).contiguous(), scale


def _codes(x: Tensor) -> Tensor:
    """Codes ``[rows, columns]``, -31 to 31, of bytes ``[rows, 3 columns / 4]``."""
    low, middle, high = x.int().unflatten(1, (-1, 3)).unbind(2)
    word = low | middle << 8 | high << 16
    return torch.stack([word >> shift & 63 for shift in _SHIFTS], 2).flatten(1) - 32


def save(model: nn.Module, folder: Path, bits: Bits = 8, whole: Collection[str] = ()) -> None:
    """Write the weights of ``model`` into ``folder``, those that are tied to others once; see :func:`pack`."""
    seen: set[int] = set()
    state = {}
    for name, x in model.state_dict().items():
        if x.data_ptr() not in seen:
            state[name] = x
            seen.add(x.data_ptr())
    save_file(pack(state, bits, whole), folder / FILE)


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
