# SPDX-License-Identifier: Apache-2.0
"""A small model that films a video again from other cameras: diffusers' Wan over pixels, shown the source.

A rectified flow over the frames themselves, in -1 to 1, without text. ``recipes/postcam.py`` trains one.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn

from ..data.filmed_scenes import Shots
from ..errors import UserError
from ..integrations.source_condition import conditioned
from .rectified import Flow, euler, noised, small_wan

__all__ = ["Filmed", "Refilmer", "RefilmerConfig", "noisy"]

_TEXT = 32


@dataclass(frozen=True, slots=True)
class RefilmerConfig:
    """Size of a model that films again.

    Attributes:
        side: pixels along an axis of a frame.
        frames: of a video.
        times: the rendering is smaller by that.
        patch: side of a token in pixels; a token is of one frame.
        dim, heads, layers: of the blocks.
        hidden: width of their feed-forward part; 0 for four times ``dim``.
        strategy: spec of the condition, one that is told cameras.
    """

    side: int = 8
    frames: int = 3
    times: int = 2
    patch: int = 2
    dim: int = 48
    heads: int = 2
    layers: int = 2
    hidden: int = 0
    strategy: str = "postcam"


class Filmed(NamedTuple):
    """Shots as a model is trained on them.

    Attributes:
        latents: of targets with noise, ``[N, 3, F, S, S]``.
        source: clean.
        time: of 1,000, ``[N]``.
        cameras: ``[N, F, 3, 4]``.
        render: ``[N, 3, F, s, s]``; None where none is given.
        velocity: what is to be predicted.
    """

    latents: Tensor
    source: Tensor
    time: Tensor
    cameras: Tensor
    render: Tensor | None
    velocity: Tensor


class Refilmer(Flow):
    """A conditioned denoiser of videos.

    Attributes:
        config: its size.
        denoiser: see :func:`manyheads.integrations.source_condition.conditioned`.
        text: what it is told in place of a prompt.
    """

    named: ClassVar[str] = "refilmer"
    recipe: ClassVar[str] = "postcam"
    config_type: ClassVar[type] = RefilmerConfig

    def __init__(self, config: RefilmerConfig) -> None:
        super().__init__()
        if config.side % (config.patch * config.times):
            raise UserError("patches part a rendering: give another side, patch or times")
        self.config, tokens = config, config.side // config.patch
        self.text = nn.Parameter(torch.randn(1, 1, _TEXT))
        transformer = small_wan(config, (1, config.patch, config.patch), (3, 3), _TEXT, max(2 * config.frames, tokens))
        self.denoiser = conditioned(transformer, config.strategy)  # last: others' first weights are the same

    def forward(
        self, latents: Tensor, source: Tensor, time: Tensor, cameras: Tensor, render: Tensor | None
    ) -> Tensor:  # fmt: skip
        """Velocity of ``latents [N, 3, F, S, S]``, as :class:`Filmed` has what is given."""
        text = self.text.expand(len(latents), -1, -1)
        out: Tensor = self.denoiser(latents, source, time, cameras, render, encoder_hidden_states=text)
        return out

    @torch.no_grad()
    def film(
        self, source: Tensor, cameras: Tensor, render: Tensor | None = None, *, noise: Tensor | None = None,
        steps: int = 10, seed: int = 0,
    ) -> Tensor:  # fmt: skip
        """Videos ``[N, 3, F, S, S]`` in -1 to 1 from other cameras, by Euler steps of the flow.

        Args:
            source: videos of that size.
            cameras: ``[N, F, 3, 4]``, see :mod:`manyheads.data.cameras`.
            render: the source rendered from there, down-sampled ``times`` times; None for none.
            noise: to start from; drawn with ``seed`` where none is given.
            steps: as many evaluations of the denoiser.

        Raises:
            UserError: videos of another size.
        """
        config, device = self.config, self.text.device
        if source.shape[1:] != (3, config.frames, config.side, config.side):
            raise UserError(f"videos are 3 x {config.frames} x {config.side} x {config.side}, not {list(source.shape)}")
        if noise is None:
            noise = torch.randn(source.shape, generator=Generator().manual_seed(seed))
        source, cameras, noise = (x.to(device) for x in (source, cameras, noise))
        shown = None if render is None else render.to(device)
        return euler(lambda x, time: self(x, source, time, cameras, shown), noise, steps).clamp(-1, 1)


def noisy(shots: Shots, generator: Generator, rendered: bool = True) -> Filmed:
    """Targets with noise, drawn on the device of the shots; without the rendering as a first stage of training has."""
    mixed, time, velocity = noised(shots.target, generator)
    return Filmed(mixed, shots.source, time, shots.cameras, shots.proxy if rendered else None, velocity)
