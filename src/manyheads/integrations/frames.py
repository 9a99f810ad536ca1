# SPDX-License-Identifier: Apache-2.0
"""Running a video denoiser on some of its frames: the hook by which another part shares them among processes.

What is known here is the denoiser: which of its modules attend over time, which arguments have frames, and where
positions in time are added. Which frames a process has, and what processes exchange, is the :class:`FrameSplit`'s.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
from diffusers import LatteTransformer3DModel
from torch import Tensor, nn

from ..call import Axis, Layout
from ..errors import UserError
from .diffusers import denoisers, is_open, repacked, set_layout
from .layouts import arguments, layout_of
from .module_calls import wrap_call

__all__ = ["FrameSplit", "split_frames"]

_OPEN = "_manyheads_frames"
_COMPARED = ("hidden_states", "timestep", "encoder_hidden_states")


class FrameSplit(Protocol):
    """Which frames this process has, and how it exchanges them, see :class:`manyheads.parallel.FrameParallel`."""

    def begin(self, batch: int, layout: Layout, inputs: Mapping[str, Tensor | None]) -> slice: ...
    def part(self, axis: Axis) -> Layout: ...
    def over_time(self, attention: Callable[[Tensor], Tensor], x: Tensor) -> Tensor: ...
    def gather(self, sample: Tensor) -> Tensor: ...
    def end(self, attentions: int) -> None: ...


Split = TypeVar("Split", bound=FrameSplit)


@contextmanager
def split_frames(target: Any, split: Split) -> Iterator[Split]:
    """Run a denoiser on this process's frames of a video, for as long as a ``with`` block lasts.

        with split_frames(pipe, FrameParallel()) as frames, manyheads.use(pipe, "slug:field=value"):
            video = pipe(prompt, generator=torch.Generator().manual_seed(0)).frames

    Every process makes the same call with the same inputs, and gets the same whole output. The frames must divide by
    the number of processes. The denoiser runs on frames ``[B, C, F / R, H, W]``, and its attention over time on
    ``[B * places / R, F, C]``; text encoders and the decoder of latents work on everything, in each process.
    Strategies are opened inside. At each site they see the part that this process computes, with the layout of that
    part: its frames, or all frames with its places in one row. So a strategy has to decide from steps and sites, not
    from the values of tokens: processes that decide differently wait for each other until the group's timeout ends it,
    as they do where one of them fails. Give ``torch.distributed.init_process_group`` a timeout that suits.

    Args:
        target: a ``LattePipeline`` or ``LatteTransformer3DModel``.
        split: this process's share, and its exchanges.

    Yields:
        ``split``, which counts what this process sends.

    Raises:
        UserError: another class of denoiser, without attention over time in modules of its own; opened inside of
            ``manyheads.use`` or of itself. While it is open: a number of frames that does not divide or for which the
            denoiser has no positions, more processes than places in a frame, inputs that differ between the processes,
            a call that records gradients.
    """
    model = _latte(target)
    if _OPEN in model.__dict__:
        raise UserError("split_frames is open on this denoiser already; close it first")
    if is_open(model):
        raise UserError("open split_frames first and manyheads.use inside of it, so that strategies wrap exchanges")

    def over_time(inner: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return split.over_time(lambda x: inner(x, *args, **kwargs), hidden_states)

    restorers = [wrap_call(block.attn1, over_time)[1] for block in model.temporal_transformer_blocks]
    restorers.append(wrap_call(model, _over_frames(model, split))[1])
    model.__dict__[_OPEN] = split
    try:
        yield split
    finally:
        del model.__dict__[_OPEN]
        for restore in reversed(restorers):
            restore()


def _latte(target: Any) -> Any:
    """The one denoiser of a target, of the class that is supported."""
    models = [model for _, model in denoisers(target)]
    if len(models) != 1 or not isinstance(models[0], LatteTransformer3DModel):
        raise UserError(
            f"split_frames cannot share the frames of {type(target).__name__}: give it a LattePipeline or a "
            "LatteTransformer3DModel, the denoiser with blocks of their own for attention over time"
        )
    return models[0]


def _over_frames(model: Any, split: FrameSplit) -> Callable[..., Any]:
    """The denoiser's call on this process's frames, with all frames in its output."""

    def call(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = arguments(model, args, kwargs)
        hidden, layout = given["hidden_states"], _checked(model, given)
        inputs = {name: None if given[name] is None else _tensor(given[name], hidden) for name in _COMPARED}
        mine = split.begin(hidden.shape[0], layout, inputs)
        for module, axis in _modules(model):
            set_layout(module, split.part(axis), axis if layout.frames > 1 else "all")
        with _positioned(model, layout.frames, mine):
            output = inner(**{**given, **_cut(given, layout.frames, mine)})
        split.end(len(model.temporal_transformer_blocks) if given["enable_temporal_attentions"] else 0)
        return repacked(output, split.gather(output[0]))

    return call


def _tensor(value: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(value, device=like.device)


def _checked(model: Any, given: dict[str, Any]) -> Layout:
    """How the tokens of all frames lie."""
    hidden, layout = given["hidden_states"], layout_of(model, given)
    if layout is None or hidden.ndim != 5:
        raise UserError("split_frames: the denoiser takes latents [batch, channels, frames, height, width]")
    known = model.temp_pos_embed.shape[1]
    if layout.frames not in (1, known):
        raise UserError(f"the denoiser has positions in time for {known} frames, not {layout.frames}; give {known}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, *model.parameters())):
        raise UserError("split_frames passes no gradients on: call the denoiser under torch.no_grad()")
    return layout


def _modules(model: Any) -> Iterator[tuple[nn.Module, Axis]]:
    """The denoiser's attention modules, and the axis along which each attends."""
    for block in model.transformer_blocks:
        yield block.attn1, "space"
        if block.attn2 is not None:
            yield block.attn2, "all"
    for block in model.temporal_transformer_blocks:
        yield block.attn1, "time"


@contextmanager
def _positioned(model: Any, frames: int, mine: slice) -> Iterator[None]:
    """Give the denoiser the positions in time of this process's frames; to a single frame it would add none."""
    whole, handle = model.temp_pos_embed, None
    positions = whole[:, mine]

    def add(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] + positions.to(args[0].dtype), *args[1:])

    if mine.stop - mine.start == 1 < frames:
        handle = model.temporal_transformer_blocks[0].register_forward_pre_hook(add)
    model.temp_pos_embed = positions
    try:
        yield
    finally:
        model.temp_pos_embed = whole
        if handle is not None:
            handle.remove()


def _cut(given: dict[str, Any], frames: int, mine: slice) -> dict[str, Any]:
    """The arguments of the denoiser that have frames in them, cut; a mask may have a row for each frame."""
    hidden, mask = given["hidden_states"], given["encoder_attention_mask"]
    cut = {"hidden_states": hidden[:, :, mine]}
    if mask is not None and mask.shape[0] % (hidden.shape[0] * frames) == 0:
        cut["encoder_attention_mask"] = mask.unflatten(0, (hidden.shape[0], frames, -1))[:, mine].flatten(0, 2)
    return cut
