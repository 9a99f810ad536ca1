# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism of a video denoiser: each process holds some of the frames, all meet in attention over time.

Attention within a frame, cross-attention and feed-forward layers work on the frames at hand. Before attention over time
an all-to-all gives each process all frames of some places of the image, and another one afterwards gives the frames
back. A strategy that wraps a module (``around_module``) wraps its exchanges too, so where it returns an earlier output
both all-to-alls are skipped: broadcast sequence parallelism.

Real-Time Video Generation with Pyramid Attention Broadcast (arXiv 2408.12588).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from ..call import Axis, Layout
from ..errors import UserError

__all__ = ["FrameParallel", "Traffic"]


@dataclass(slots=True)
class Traffic:
    """What this process has sent to the others; what it keeps for itself is not counted.

    Attributes:
        exchanges: all-to-alls done, two for each attention over time that was computed.
        skipped: all-to-alls that were not needed, as the attention was not computed.
        all_to_all: bytes sent by those done.
        gather: bytes sent to give every process all frames of the predictions.
        check: bytes sent to compare the inputs, 8 for each input, other process and call of the denoiser.
    """

    exchanges: int = 0
    skipped: int = 0
    all_to_all: int = 0
    gather: int = 0
    check: int = 0


class FrameParallel:
    """The part of a video that this process has: ``L`` of ``F`` frames, or ``n`` of ``N`` places in all frames.

        with split_frames(pipe, FrameParallel()) as frames, manyheads.use(pipe, "pab"):
            video = pipe(prompt, generator=torch.Generator().manual_seed(0)).frames

    where ``split_frames`` is :func:`manyheads.integrations.frames.split_frames`.

    Attributes:
        traffic: what this process sends, counted on.
        rank, ranks: of this process, and how many there are.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """The share of this process in a group.

        Args:
            group: of processes, one device each; all processes when not given. Tested with gloo; NCCL has the same
                collectives.

        Raises:
            UserError: there is no process group, or this process is not in it.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise UserError(
                "FrameParallel needs processes to share with: call torch.distributed.init_process_group first"
            )
        if dist.get_rank(group) < 0:
            raise UserError(
                "this process is not in the group given to FrameParallel; make it in the group's processes only"
            )
        self.group, self.traffic = group, Traffic()
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self._batch, self._places = 0, [0]  # rows of the call at hand, and places of a frame that each process has
        self._layout = Layout(1, 1, 1)
        self._before = 0  # exchanges before the call at hand

    def begin(self, batch: int, layout: Layout, inputs: Mapping[str, Tensor | None]) -> slice:
        """Begin a call of the denoiser.

        Args:
            batch: rows of the call.
            layout: of all tokens of the video.
            inputs: by name, which have to be the same in every process.

        Returns:
            The frames of tokens that this process computes.

        Raises:
            UserError: the frames do not divide by the processes, there are more processes than places in a frame, or
                the inputs of the processes differ.
        """
        if layout.frames % self.ranks:
            raise UserError(f"{layout.frames} frames cannot be shared evenly by {self.ranks} processes; use a divisor")
        places = layout.height * layout.width
        if places < self.ranks:
            raise UserError(f"a frame of {places} tokens cannot be shared by {self.ranks} processes; use fewer")
        self._compare(inputs)
        self._batch, self._layout, self._before = batch, layout, self.traffic.exchanges
        self._places = [places // self.ranks + (rank < places % self.ranks) for rank in range(self.ranks)]
        length = layout.frames // self.ranks
        return slice(self.rank * length, (self.rank + 1) * length)

    def part(self, axis: Axis) -> Layout:
        """Layout of the tokens that a module attending along ``axis`` works on in this process."""
        if axis == "time":
            return Layout(self._layout.frames, 1, self._places[self.rank])
        return replace(self._layout, frames=self._layout.frames // self.ranks)

    def over_time(self, attention: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Attention over time ``[B * n, F, C] -> [B * n, F, C]`` between two exchanges, ``[B * N, L, C]`` outside."""
        return self._to_frames(attention(self._to_places(x)))

    def gather(self, sample: Tensor) -> Tensor:
        """Predictions ``[B, C, L, H, W]`` of all processes as one ``[B, C, F, H, W]``."""
        sample = sample.contiguous()
        every = [torch.empty_like(sample) for _ in range(self.ranks)]
        dist.all_gather(every, sample, group=self.group)
        self.traffic.gather += sample.nbytes * (self.ranks - 1)
        return torch.cat(every, 2)

    def end(self, attentions: int) -> None:
        """End a call in which ``attentions`` modules attend over time, computed or not."""
        self.traffic.skipped += 2 * attentions - (self.traffic.exchanges - self._before)

    def _compare(self, inputs: Mapping[str, Tensor | None]) -> None:
        """Raise where the inputs of the processes differ, by the sums of their magnitudes."""
        names = list(inputs)
        device = next(x.device for x in inputs.values() if x is not None)
        sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        for at, value in enumerate(inputs.values()):
            if value is not None:
                sums[at] = value.double().abs().sum()
        every = [torch.empty_like(sums) for _ in range(self.ranks)]
        dist.all_gather(every, sums, group=self.group)
        self.traffic.check += sums.nbytes * (self.ranks - 1)
        same = torch.isclose(torch.stack(every), every[0], rtol=1e-6, atol=0, equal_nan=True).all(0).tolist()
        if not all(same):
            raise UserError(
                f"the processes have different {names[same.index(False)]}: call the pipeline in each with the same "
                "arguments, and with a generator of the same seed"
            )

    def _to_places(self, x: Tensor) -> Tensor:
        """``[B * N, L, C]``, these frames of all places -> ``[B * n, F, C]``, all frames of these places."""
        parts = x.unflatten(0, (self._batch, -1)).split(self._places, 1)
        sizes = [part.numel() for part in parts]
        got = self._exchange(torch.cat([part.flatten() for part in parts]), sizes, self.ranks * [sizes[self.rank]])
        got = got.view(self.ranks, -1, *x.shape[1:])  # [R, B * n, L, C]
        return got.transpose(0, 1).flatten(1, 2)

    def _to_frames(self, x: Tensor) -> Tensor:
        """The way back: ``[B * n, F, C]`` -> ``[B * N, L, C]``."""
        parts = x.unflatten(1, (self.ranks, -1)).transpose(0, 1)  # [R, B * n, L, C]
        size, (length, channels) = parts[0].numel(), parts.shape[2:]
        sizes = [self._batch * places * length * channels for places in self._places]
        got = self._exchange(parts.flatten(), self.ranks * [size], sizes).split(sizes)
        return torch.cat([part.view(self._batch, -1, length, channels) for part in got], 1).flatten(0, 1)

    def _exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """An all-to-all of flat parts, of the sizes given for each process."""
        out = x.new_empty(sum(received))
        dist.all_to_all_single(out, x, received, sent, group=self.group)
        self.traffic.exchanges += 1
        self.traffic.all_to_all += (x.numel() - sent[self.rank]) * x.element_size()
        return out
