# SPDX-License-Identifier: Apache-2.0
"""Loading a pipeline of diffusers from a folder, or a shipped one by its name.

Weights are read from safetensors alone, and no code of a folder's own is ever run.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import diffusers

from ..errors import UserError
from . import named_dtype, placed
from .scenes import NAMES, is_scene_pipeline, load_scenes

__all__ = ["load", "parameters"]

_GIVEN = frozenset({"prompt", "class_labels"})


def load(model: str, device: str = "cpu", dtype: str | None = None) -> Any:
    """Load a pipeline.

    Args:
        model: one of the shipped, see ``manyheads.models.scenes.NAMES``, or a folder with model_index.json.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; float32 on a CPU and bfloat16 on a GPU when not given, float32
            for the shipped ones.

    Raises:
        UserError: there is none that can be loaded; says what to do.
    """
    given = named_dtype(dtype)
    place, kind = placed(device, given)
    folder = Path(model).expanduser()
    if model in NAMES or is_scene_pipeline(folder):
        return load_scenes(model, place, given)
    _check(folder, model)
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(folder), dtype=kind, use_safetensors=True, local_files_only=True
        )
    except Exception as error:
        reason = " ".join(str(error).split())
        if "safetensors" in reason:
            raise UserError(
                f"{model}: weights are read from safetensors only, and not all of them are; save the pipeline again "
                "with save_pretrained(folder, safe_serialization=True)"
            ) from error
        raise UserError(f"{model} cannot be loaded ({reason[:200]}); save it again with save_pretrained") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(place)


def _check(folder: Path, model: str) -> None:
    """Refuse a folder that is no pipeline of diffusers' own classes."""
    if not folder.is_dir():
        raise UserError(
            f"{model}: no such folder; give the folder of a pipeline saved by save_pretrained, or {', '.join(NAMES)}"
        )
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{model} has no model_index.json; give the folder of a whole pipeline, not of its transformer or unet"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{model}/model_index.json cannot be read ({error}); save the pipeline again") from error
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str) or not inspect.isclass(getattr(diffusers, name, None)):
        raise UserError(f"{model}: diffusers {diffusers.__version__} has no pipeline {name!r}; a newer one may have")
    for part, value in index.items():
        library = value[0] if isinstance(value, list) and value else None
        own = library in (None, "diffusers", "transformers") or hasattr(diffusers.pipelines, str(library))
        if not part.startswith("_") and not own:
            raise UserError(f"{model}: its {part} is code of its own ({library}), which is not run; open it in Python")


def parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    """What a pipeline's call takes.

    Raises:
        UserError: it needs something that is neither a prompt nor a class.
    """
    takes = dict(inspect.signature(type(pipe).__call__).parameters)
    takes.pop("self", None)
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [n for n, p in takes.items() if p.default is p.empty and p.kind not in rest and n not in _GIVEN]
    if needed:
        raise UserError(
            f"{type(pipe).__name__} needs {', '.join(needed)}, which this command cannot give; call it in "
            "Python inside manyheads.use(pipe, ...)"
        )
    return takes
