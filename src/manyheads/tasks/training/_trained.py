# SPDX-License-Identifier: Apache-2.0
"""A trained decoder and what is to be known of its training, in a folder that is there whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ...files import write_atomically
from ...models.decoder import TokenModel

__all__ = ["Trained", "arm_folder", "read_json", "read_trained", "write_json", "write_trained"]

_RECORD = "training.json"


@dataclass(frozen=True)
class Trained:
    """A decoder, or an encoder, after its training.

    Attributes:
        model: in evaluation mode.
        rate: highest learning rate.
        losses: of each step.
        seconds: that it took.
        order: hash of all batches: the same for arms that read the same.
    """

    model: TokenModel
    rate: float
    losses: list[float]
    seconds: float
    order: str


def arm_folder(folder: Path, arm: str) -> Path:
    """Where the models of an arm are kept in a run's folder."""
    return folder / "models" / re.sub(r"[^\w.-]+", "-", arm)


def read_json(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What :func:`write_json` wrote under the same settings; None where there is nothing of them."""
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if found.get("settings") == json.loads(json.dumps(settings)) else None


def write_json(path: Path, settings: Mapping[str, Any], **values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"settings": settings, **values}) + "\n")


def read_trained(place: Path, settings: Mapping[str, Any], build: Callable[[int], TokenModel]) -> Trained | None:
    """The model in ``place``, None where there is none of these settings.

    Args:
        place: folder that :func:`write_trained` wrote.
        settings: of the training.
        build: the decoder, given its feed-forward width; also of a strategy that the catalogue does not know.
    """
    record = read_json(place / _RECORD, settings)
    if record is None or not (place / "model.safetensors").is_file():
        return None
    model = build(record["hidden"])
    device = next(model.parameters()).device
    model.load_state_dict(load_file(place / "model.safetensors", device=str(device)))
    return Trained(model.eval(), record["rate"], record["losses"], record["seconds"], record["order"])


def write_trained(place: Path, settings: Mapping[str, Any], trained: Trained) -> None:
    """Keep a model, also for :meth:`manyheads.models.decoder.TokenModel.load`; what lay there is replaced."""
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    draft.chmod(0o755)
    try:
        trained.model.save(draft)
        write_json(
            draft / _RECORD, settings, hidden=trained.model.config.hidden, rate=trained.rate, losses=trained.losses,
            seconds=trained.seconds, order=trained.order,
        )  # fmt: skip
        shutil.rmtree(place, ignore_errors=True)
        draft.rename(place)
    except FileExistsError:  # another process was quicker, with the same model
        pass
    finally:
        shutil.rmtree(draft, ignore_errors=True)
