# SPDX-License-Identifier: Apache-2.0
"""Folders of what was trained beside a model: weights in safetensors, and in JSON how to make the modules again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import UserError

__all__ = ["load_trained", "save_trained"]

_FORMAT = 1
_Module = TypeVar("_Module", bound=nn.Module)


def save_trained(folder: str | Path, files: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write ``files.safetensors`` and ``files.json`` into ``folder``, made if missing; its path."""
    place = Path(folder).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, place / f"{files}.safetensors")
    text = json.dumps({"format": _FORMAT, **config}, indent=1)
    (place / f"{files}.json").write_text(text + "\n", encoding="utf-8")
    return place


def load_trained(
    folder: str | Path, files: str, make: Callable[[dict[str, Any]], _Module], what: str, how: str
) -> _Module:  # fmt: skip
    """The module that ``make`` makes of what :func:`save_trained` was given, with its weights, for inference.

    Args:
        folder, files: as there.
        make: a module by its settings.
        what: the modules in an error, ``gates``.
        how: the command that trains some.

    Raises:
        UserError: the folder does not hold such modules.
    """
    place = Path(folder).expanduser()
    try:
        config = json.loads((place / f"{files}.json").read_text(encoding="utf-8"))
        if (found := config.pop("format")) != _FORMAT:
            raise ValueError(f"its format is {found}, not {_FORMAT}")
        made = make(config)
        made.load_state_dict(load_file(place / f"{files}.safetensors"))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip("'\"").splitlines()[0]
        raise UserError(f"{folder} holds no {what} ({reason}); train some: {how}") from None
    return made.requires_grad_(False).eval()
