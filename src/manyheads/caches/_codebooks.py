# SPDX-License-Identifier: Apache-2.0
"""Codebooks of a model's keys on disk: one safetensors file in a folder, a tensor for each layer."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError

__all__ = ["FILE", "read_codebooks", "write_codebooks"]

FILE = "codebooks.safetensors"
_FORMAT = "manyheads-codebooks-1"


def write_codebooks(folder: str | Path, codebooks: dict[int, Tensor], about: dict[str, Any]) -> Path:
    """Write codebooks ``[Hkv, g, c, w]`` by layer, and where they come from, into ``folder``, which is made.

    Args:
        folder: of the file.
        codebooks: by layer.
        about: JSON values: the model, the text, how they were fitted.
    """
    place = Path(folder).expanduser()
    place.mkdir(parents=True, exist_ok=True)
    tensors = {str(layer): x.detach().cpu().contiguous() for layer, x in codebooks.items()}
    save_file(tensors, place / FILE, metadata={"format": _FORMAT, "about": json.dumps(about)})
    return place / FILE


def read_codebooks(folder: str) -> tuple[dict[int, Tensor], dict[str, Any]]:
    """Codebooks ``[Hkv, g, c, w]`` by layer, on the CPU, and what was written about them.

    Raises:
        UserError: there is no such file, or it is of another kind.
    """
    path = Path(folder).expanduser() / FILE
    if not path.is_file():
        raise UserError(
            f"there is no {FILE} in {folder}: make it by `python -m manyheads.recipes.hcattention --model MODEL --text "
            "TEXT --out FOLDER`, or leave codebooks away"
        )
    return _read(str(path), path.stat().st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: str, _written: int) -> tuple[dict[int, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except Exception as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if about.get("format") != _FORMAT:
        raise UserError(f"{path} holds no codebooks that this version wrote")
    return {int(name): x for name, x in found.items()}, json.loads(about["about"])
