# SPDX-License-Identifier: Apache-2.0
"""What the inputs of diffusers' denoisers mean: token layout and timestep. One row for each class."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..call import Layout

__all__ = ["arguments", "layout_of", "timestep_of"]


def _image(config: Any, given: dict[str, Any]) -> tuple[int, int, int]:
    size = config.patch_size
    *_, height, width = given["hidden_states"].shape
    return 1, height // size, width // size


def _video(config: Any, given: dict[str, Any]) -> tuple[int, int, int]:
    *_, frames, height, width = given["hidden_states"].shape
    size = config.patch_size
    step, high, wide = size if isinstance(size, (tuple, list)) else (getattr(config, "patch_size_t", None), size, size)
    return frames // (step or 1), height // high, width // wide


def _frames_first(config: Any, given: dict[str, Any]) -> tuple[int, int, int]:
    _, frames, _, height, width = given["hidden_states"].shape
    return frames // (config.patch_size_t or 1), height // config.patch_size, width // config.patch_size


def _packed(config: Any, given: dict[str, Any]) -> tuple[int, int, int]:
    ids = given["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    return 1, int(ids[:, 1].max()) + 1, int(ids[:, 2].max()) + 1


def _given_sizes(config: Any, given: dict[str, Any]) -> tuple[int, int, int]:
    return given["num_frames"], given["height"], given["width"]


def _sample(config: Any, given: dict[str, Any]) -> tuple[int, int, int]:
    *_, height, width = given["sample"].shape
    return 1, height, width


@dataclass(frozen=True, slots=True)
class _Row:
    """How one class of denoisers lays out its tokens.

    Attributes:
        grid: frames, rows and columns of tokens, from config and inputs.
        joint: text is in one sequence with the image: ``first``, ``last``, or nowhere (empty).
        share: the pipeline gives the timestep as a share of the training steps.
    """

    grid: Callable[[Any, dict[str, Any]], tuple[int, int, int]]
    joint: str = ""
    share: bool = False


_ROWS = {
    "DiTTransformer2DModel": _Row(_image),
    "PixArtTransformer2DModel": _Row(_image),
    "SD3Transformer2DModel": _Row(_image, "last"),
    "FluxTransformer2DModel": _Row(_packed, "first", share=True),
    "WanTransformer3DModel": _Row(_video),
    "HunyuanVideoTransformer3DModel": _Row(_video, "last"),
    "LatteTransformer3DModel": _Row(_video),
    "CogVideoXTransformer3DModel": _Row(_frames_first, "first"),
    "LTXVideoTransformer3DModel": _Row(_given_sizes),
    "UNet2DConditionModel": _Row(_sample),
    "UNet2DModel": _Row(_sample),
}


def arguments(
    this: Any, args: tuple[Any, ...], kwargs: dict[str, Any], function: Callable[..., Any] | None = None
) -> dict[str, Any]:  # fmt: skip
    """The arguments of a method by name, defaults included: of a denoiser's forward where none is given."""
    bound = inspect.signature(function or type(this).forward).bind(this, *args, **kwargs)
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])  # without self


def layout_of(module: nn.Module, given: dict[str, Any]) -> Layout | None:
    """The token layout that a denoiser's inputs mean, None for a class without a row or unclear inputs."""
    row = _ROWS.get(type(module).__name__)
    if row is None:
        return None
    try:
        frames, height, width = row.grid(module.config, given)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    if not all(isinstance(size, int) for size in (frames, height, width)):
        return None
    text = given.get("encoder_hidden_states")
    length = text.shape[1] if row.joint and isinstance(text, Tensor) else 0
    return Layout(frames, height, width, length, row.joint == "first")


def timestep_of(module: nn.Module, given: dict[str, Any], scheduler: Any) -> float:
    """The timestep that a denoiser was given, as the scheduler counts; of tokens that differ, the noisiest."""
    timestep = given.get("timestep")
    value = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep or 0)
    row = _ROWS.get(type(module).__name__)
    if row is None or not row.share or scheduler is None:
        return value
    return value * float(getattr(scheduler.config, "num_train_timesteps", 1) or 1)
