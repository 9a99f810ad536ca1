# SPDX-License-Identifier: Apache-2.0
"""What the inputs of diffusers' denoisers mean: token layout, order of the branches. One row for each class."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..call import Layout

__all__ = ["arguments", "branches_of", "guidance_of", "layout_of", "step_of", "timestep_of"]


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
# Pipelines whose batches are not the unconditional rows and then the conditional ones.
_ORDERS: dict[str, tuple[str, ...]] = {
    "DiTPipeline": ("cond", "uncond"),
    "LuminaPipeline": ("cond", "uncond"),
    "AceStepPipeline": ("cond", "uncond"),
    "StableCascadePriorPipeline": ("cond", "uncond"),
    "StableCascadeDecoderPipeline": ("cond", "uncond"),
    "StableDiffusionInstructPix2PixPipeline": ("cond", "image", "uncond"),
    "StableDiffusionXLInstructPix2PixPipeline": ("cond", "image", "uncond"),
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


def step_of(value: float, scheduler: Any) -> tuple[int | None, int | None]:
    """Which of the scheduler's steps has the timestep ``value``, and how many there are.

    None for both where no scheduler is known.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, Tensor) or not timesteps.numel():
        return None, None
    return int((timesteps.double().flatten().cpu() - value).abs().argmin()), timesteps.numel()


def guidance_of(pipe: Any, asked: dict[str, Any], model: Any = None) -> float | None:
    """The scale of classifier-free guidance of a pipeline's call, None where it does without.

    Args:
        pipe: the pipeline, None for a bare denoiser.
        asked: the arguments of its call by name. Some pipelines keep the scale as a property, some in their call only,
            and where a model takes a guidance of its own as an input the true one has another name.
        model: the denoiser at hand; a pipeline's second may have a scale of its own.
    """
    if "true_cfg_scale" in asked:
        scale = asked["true_cfg_scale"]
        return float(scale) if scale and scale > 1 else None
    scale = getattr(pipe, "guidance_scale", None)
    scale = asked.get("guidance_scale") if scale is None else scale
    own = asked.get("guidance_scale_2")
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    guided = scale is not None and scale > 1 if guided is None else guided
    if own is not None and model is not None and model is getattr(pipe, "transformer_2", None):
        scale = own
    return float(scale) if guided and scale is not None else None


def branches_of(pipe: Any, name: str | None, rows: int, guided: bool) -> tuple[str, ...]:
    """What the rows of a batch are: as the pipeline or its guider names them, or the parts of classifier-free guidance.

    Args:
        pipe: the pipeline, None for a bare denoiser.
        name: of the context the pipeline runs the denoiser in, if it does, or of the guider's batch at hand.
        rows: of the batch.
        guided: whether the pipeline does classifier-free guidance.
    """
    if name is not None and name != "cond_uncond":
        return (name.removeprefix("pred_"),)
    order = _ORDERS.get(type(pipe).__name__, ("uncond", "cond"))
    return order if guided and rows % len(order) == 0 else ("all",)
