# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: everything that a training needs to go on as if it had never stopped, as safetensors and JSON.

A checkpoint is a folder ``step-00000500`` with the weights (``model.safetensors``), the optimisers and counts
(``state.*``), and what is each process's own (``process-0.*``: random states, and whatever the caller keeps). It is
written under another name and renamed when complete, so that a reader finds a whole one or none.
"""

import json
import math
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import UserError

__all__ = ["Checkpoint", "RandomState", "Stateful", "newest", "read", "write"]

_PARTIAL = ".partial"


class Stateful(Protocol):
    """What can say its state, made of tensors, numbers, texts, lists and dictionaries, and take it back."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where checkpoints go, and how often; a training that finds one there goes on from it.

    Attributes:
        folder: holds the newest checkpoint and, while it is written, the next.
        every: steps between two; one more is written at the end.
        seconds: between two, where that comes sooner.
        keep: whatever else a training draws from or changes, by name: generators, averages, schedulers.
    """

    folder: Path
    every: int = 500
    seconds: float = math.inf
    keep: Mapping[str, "Stateful | torch.Generator"] = field(default_factory=dict)


class RandomState:
    """The generators that no caller passes: torch's on the CPU and on each GPU, and Python's."""

    def state_dict(self) -> dict[str, Any]:
        return {
            "cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "python": random.getstate(),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        torch.set_rng_state(state["cpu"])
        if state["cuda"]:
            torch.cuda.set_rng_state_all(state["cuda"])
        random.setstate(state["python"])


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of most steps in ``folder``."""
    found = [place for place in folder.glob("step-*") if not place.name.endswith(_PARTIAL)]
    return max(found, default=None)


def write(
    folder: Path, step: int, shared: Mapping[str, Any], own: Mapping[str, Any], rank: int, wait: Callable[[], None]
) -> None:
    """Write a checkpoint and remove older ones.

    Args:
        folder: of the checkpoints; all processes see it.
        step: steps done.
        shared: by name, what is the same in all processes: ``model`` and ``state`` at least.
        own: by name, what is this process's.
        rank: of this process; the first writes what is shared.
        wait: returns when all processes have come to it.
    """
    final = folder / f"step-{step:08d}"
    partial = final.with_name(final.name + _PARTIAL)
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model = {name: x.detach().cpu().clone().contiguous() for name, x in shared["model"].state_dict().items()}
        save_file(model, partial / "model.safetensors")
        _write(partial / "state", {name: _state(part) for name, part in shared.items() if name != "model"})
    wait()
    _write(partial / f"process-{rank}", {name: _state(part) for name, part in own.items()})
    wait()
    if rank == 0:
        partial.rename(final)
        for place in folder.glob("step-*"):
            if place != final:
                shutil.rmtree(place)


def read(place: Path, shared: Mapping[str, Any], own: Mapping[str, Any], rank: int) -> None:
    """Bring everything to what :func:`write` wrote at ``place``.

    Raises:
        UserError: it is of another training: other parts, or a model of other weights.
    """
    try:
        shared["model"].load_state_dict(load_file(place / "model.safetensors"))
        for file, parts in (("state", shared), (f"process-{rank}", own)):
            found = _read(place / file)
            rest = {name: part for name, part in parts.items() if name != "model"}
            if set(found) != set(rest):
                raise KeyError(f"it holds {', '.join(sorted(found))} instead of {', '.join(sorted(rest))}")
            for name, part in rest.items():
                if isinstance(part, torch.Generator):
                    part.set_state(found[name])
                else:
                    part.load_state_dict(found[name])
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = str(error).strip("'\"").splitlines()[0]
        raise UserError(f"{place} is no checkpoint of this training ({reason}); give another folder") from error


def _state(part: Any) -> Any:
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def _write(path: Path, value: Any) -> None:
    tensors: dict[str, Tensor] = {}
    tree = _parted(value, "", tensors)
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(json.dumps(tree) + "\n", encoding="utf-8")


def _read(path: Path) -> Any:
    tree = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    return _joined(tree, load_file(path.with_suffix(".safetensors")))


def _parted(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON that keeps the kinds of containers and of keys; its tensors, by name, go into ``tensors``."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _parted(part, f"{name}/{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        parts = [_parted(part, f"{name}/{i}", tensors) for i, part in enumerate(value)]
        return {"list" if isinstance(value, list) else "tuple": parts}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a checkpoint holds tensors, numbers, texts and lists of them, no {type(value).__name__} ({name})")


def _joined(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, parts),) = tree.items()
    if kind == "tensor":
        return tensors[parts]
    if kind == "items":
        return {key: _joined(part, tensors) for key, part in parts}
    made = [_joined(part, tensors) for part in parts]
    return made if kind == "list" else tuple(made)
