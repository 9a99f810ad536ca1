# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism of a video denoiser: every device holds some of the frames, and attention over time meets all.

Attention within a frame, cross-attention and feed-forward layers work on the frames at hand. Before attention over time
an all-to-all gives each device all frames of some places of the picture, and another one afterwards gives the frames
back. A strategy that uses the output of an earlier step again (``pab``) replaces module and exchanges alike, so with
broadcast steps both all-to-alls are skipped: broadcast sequence parallelism.

Real-Time Video Generation with Pyramid Attention Broadcast (arXiv 2408.12588).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from diffusers import LatteTransformer3DModel
from torch import Tensor, nn

from ..call import Axis, Layout
from ..errors import UserError
from .diffusers import _STATE, denoisers, find_sites, repacked, replace_forward
from .layouts import arguments, layout_of

__all__ = ["Traffic", "frame_parallel"]

_OPEN = "_manyheads_frames"
_COMPARED = ("hidden_states", "timestep", "encoder_hidden_states")


@dataclass(slots=True)
class Traffic:
    """What this device has sent to the others; what it keeps for itself is not counted.

    Attributes:
        exchanges: all-to-alls done, two for each attention over time that was computed.
        skipped: all-to-alls that were not needed, as the attention was not computed.
        all_to_all: bytes sent by those done.
        gather: bytes sent to give every device all frames of the predictions.
        check: bytes sent to compare the inputs, 24 for each other device and call of the denoiser.
    """

    exchanges: int = 0
    skipped: int = 0
    all_to_all: int = 0
    gather: int = 0
    check: int = 0


@contextmanager
def frame_parallel(target: Any, group: dist.ProcessGroup | None = None) -> Iterator[Traffic]:
    """Share the frames of a video among the processes of a group, for as long as a ``with`` block lasts.

        with frame_parallel(pipe) as traffic, manyheads.use(pipe, "pab"):
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
        group: of processes, one device each; all processes when not given. Tested with gloo; NCCL has the
            same collectives.

    Yields:
        What this process sends, counted on while the block lasts.

    Raises:
        UserError: another class of denoiser, without attention over time in modules of its own; no process group, or
            one without this process; opened inside of ``manyheads.use`` or of itself. While it is open: a number of
            frames that does not divide or for which the denoiser has no positions, more processes than places in a
            frame, inputs that differ between the processes, a call that records gradients.
    """
    model = _latte(target)
    if not dist.is_available() or not dist.is_initialized():
        raise UserError("frame_parallel needs processes to share with: call torch.distributed.init_process_group first")
    if dist.get_rank(group) < 0:
        raise UserError("this process is not in the group given to frame_parallel; call it in the group's processes")
    if _OPEN in model.__dict__:
        raise UserError("frame_parallel is open on this denoiser already; close it first")
    if any(_STATE in module.__dict__ for _, module in find_sites(model)):
        raise UserError("open frame_parallel first and manyheads.use inside of it, so that strategies wrap exchanges")
    share = _Share(model, group)
    restorers = [replace_forward(block.attn1, share.over_time) for block in model.temporal_transformer_blocks]
    restorers.append(replace_forward(model, share.over_frames))
    model.__dict__[_OPEN] = share
    try:
        yield share.traffic
    finally:
        del model.__dict__[_OPEN]
        for back in reversed(restorers):
            back()


def _latte(target: Any) -> Any:
    """The one denoiser of a target, of the class that is supported."""
    models = [model for _, model in denoisers(target)]
    if len(models) != 1 or not isinstance(models[0], LatteTransformer3DModel):
        raise UserError(
            f"frame_parallel cannot share the frames of {type(target).__name__}: give it a LattePipeline or a "
            "LatteTransformer3DModel, the denoiser with blocks of their own for attention over time"
        )
    return models[0]


class _Share:
    """The part of a video that this process has: ``L`` of ``F`` frames, or ``n`` of ``N`` places in all frames."""

    def __init__(self, model: Any, group: dist.ProcessGroup | None) -> None:
        self.model, self.group, self.traffic = model, group, Traffic()
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.batch, self.places = 0, [0]  # rows of the call at hand, and places of a frame that each process has

    def over_frames(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        """The denoiser's forward on this process's frames, with all frames in its output."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = arguments(self.model, args, kwargs)
            mine, layout = self._cut(given)
            self._compare(given)
            self._tell(layout)
            before = self.traffic.exchanges
            with self._positioned(layout.frames, mine):
                output = inner(**{**given, **self._given(given, layout.frames, mine)})
            if given["enable_temporal_attentions"]:
                attentions = len(self.model.temporal_transformer_blocks)
                self.traffic.skipped += 2 * attentions - (self.traffic.exchanges - before)
            return repacked(output, self._gather(output[0]))

        return forward

    def over_time(self, inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The forward of an attention over time between two exchanges, ``[B * N, L, C]`` outside of them."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self._to_frames(inner(self._to_places(hidden_states), *args, **kwargs))

        return forward

    def _cut(self, given: dict[str, Any]) -> tuple[slice, Layout]:
        """Which frames are this process's, and how the tokens of all lie."""
        hidden, layout, ranks = given["hidden_states"], layout_of(self.model, given), self.ranks
        if layout is None or hidden.ndim != 5:
            raise UserError("frame_parallel: the denoiser takes latents [batch, channels, frames, height, width]")
        if layout.frames % ranks:
            raise UserError(f"{layout.frames} frames cannot be shared evenly by {ranks} processes; use a divisor")
        places = layout.height * layout.width
        if places < ranks:
            raise UserError(f"a frame of {places} tokens cannot be shared by {ranks} processes; use fewer")
        known = self.model.temp_pos_embed.shape[1]
        if layout.frames not in (1, known):
            raise UserError(f"the denoiser has positions in time for {known} frames, not {layout.frames}; give {known}")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (hidden, *self.model.parameters())):
            raise UserError("frame_parallel passes no gradients on: call the denoiser under torch.no_grad()")
        self.batch = hidden.shape[0]
        self.places = [places // ranks + (rank < places % ranks) for rank in range(ranks)]
        length = layout.frames // ranks
        return slice(self.rank * length, (self.rank + 1) * length), layout

    def _compare(self, given: dict[str, Any]) -> None:
        """Raise where the inputs of the processes differ, told by the sums of their magnitudes."""
        device = given["hidden_states"].device
        sums = torch.zeros(len(_COMPARED), dtype=torch.float64, device=device)
        for at, name in enumerate(_COMPARED):
            if given[name] is not None:
                sums[at] = torch.as_tensor(given[name]).double().abs().sum()
        every = [torch.empty_like(sums) for _ in range(self.ranks)]
        dist.all_gather(every, sums, group=self.group)
        self.traffic.check += sums.nbytes * (self.ranks - 1)
        same = torch.isclose(torch.stack(every), every[0], rtol=1e-6, atol=0, equal_nan=True).all(0).tolist()
        if not all(same):
            raise UserError(
                f"the processes have different {_COMPARED[same.index(False)]}: call the pipeline in each with the same "
                "arguments, and with a generator of the same seed"
            )

    def _tell(self, layout: Layout) -> None:
        """Tell open ports which part of the tokens a module works on; the inputs that they saw say the whole."""
        frames = replace(layout, frames=layout.frames // self.ranks)
        places = Layout(layout.frames, 1, self.places[self.rank])
        parts: list[tuple[nn.Module, Layout, Axis]] = []
        for block in self.model.transformer_blocks:
            parts.append((block.attn1, frames, "space"))
            if block.attn2 is not None:
                parts.append((block.attn2, frames, "all"))
        parts += [(block.attn1, places, "time") for block in self.model.temporal_transformer_blocks]
        for module, part, axis in parts:
            state = module.__dict__.get(_STATE)
            if state is not None and state.step is not None:
                state.step = replace(state.step, layout=part, axis=axis if layout.frames > 1 else "all")

    @contextmanager
    def _positioned(self, frames: int, mine: slice) -> Iterator[None]:
        """Give the denoiser the positions in time of this process's frames; to a single frame it would add none."""
        whole, handle = self.model.temp_pos_embed, None
        positions = whole[:, mine]

        def add(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0] + positions.to(args[0].dtype), *args[1:])

        if mine.stop - mine.start == 1 < frames:
            handle = self.model.temporal_transformer_blocks[0].register_forward_pre_hook(add)
        self.model.temp_pos_embed = positions
        try:
            yield
        finally:
            self.model.temp_pos_embed = whole
            if handle is not None:
                handle.remove()

    def _given(self, given: dict[str, Any], frames: int, mine: slice) -> dict[str, Any]:
        """The arguments of the denoiser that have frames in them, cut; a mask may have a row for each frame."""
        cut = {"hidden_states": given["hidden_states"][:, :, mine]}
        mask = given["encoder_attention_mask"]
        if mask is not None and mask.shape[0] % (self.batch * frames) == 0:
            cut["encoder_attention_mask"] = mask.unflatten(0, (self.batch, frames, -1))[:, mine].flatten(0, 2)
        return cut

    def _to_places(self, x: Tensor) -> Tensor:
        """``[B * N, L, C]``, these frames of all places -> ``[B * n, F, C]``, all frames of these places."""
        parts = x.unflatten(0, (self.batch, -1)).split(self.places, 1)
        sizes = [part.numel() for part in parts]
        got = self._exchange(torch.cat([part.flatten() for part in parts]), sizes, self.ranks * [sizes[self.rank]])
        got = got.view(self.ranks, -1, *x.shape[1:])  # [R, B * n, L, C]
        return got.transpose(0, 1).flatten(1, 2)

    def _to_frames(self, x: Tensor) -> Tensor:
        """The way back: ``[B * n, F, C]`` -> ``[B * N, L, C]``."""
        parts = x.unflatten(1, (self.ranks, -1)).transpose(0, 1)  # [R, B * n, L, C]
        size, (length, channels) = parts[0].numel(), parts.shape[2:]
        sizes = [self.batch * places * length * channels for places in self.places]
        got = self._exchange(parts.flatten(), self.ranks * [size], sizes).split(sizes)
        return torch.cat([part.view(self.batch, -1, length, channels) for part in got], 1).flatten(0, 1)

    def _exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """An all-to-all of flat parts, of the sizes given for each process."""
        out = x.new_empty(sum(received))
        dist.all_to_all_single(out, x, received, sent, group=self.group)
        self.traffic.exchanges += 1
        self.traffic.all_to_all += (x.numel() - sent[self.rank]) * x.element_size()
        return out

    def _gather(self, sample: Tensor) -> Tensor:
        """Predictions ``[B, C, L, H, W]`` of all processes as one ``[B, C, F, H, W]``."""
        sample = sample.contiguous()
        every = [torch.empty_like(sample) for _ in range(self.ranks)]
        dist.all_gather(every, sample, group=self.group)
        self.traffic.gather += sample.nbytes * (self.ranks - 1)
        return torch.cat(every, 2)
