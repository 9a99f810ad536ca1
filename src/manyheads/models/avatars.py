# SPDX-License-Identifier: Apache-2.0
"""An audio-driven denoiser of small videos of avatars: diffusers' Wan transformer, a reference image, and a signal.

A rectified flow over pixels. What the paper has by its own networks is here in its smallest form: the reference is a
clean frame in front of the video, at time 0, in place of a second network (ReferenceNet); the signal is two further
channels of its frame, which is what attention of a frame to one token of audio comes to, in place of wav2vec features;
two more say where a pixel is; there are no motion frames. ``recipes/cyberhost.py`` trains one.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.utils._pytree import tree_map

from ..calls.human_priors import (
    ClarityEmbedding,
    PoseEncoder,
    clarity_score,
    heat_maps,
    local_loss,
    movement_map,
)  # fmt: skip
from ..data.avatars import Clip, chest, covered, cut, keypoints, regions, skeleton
from ..errors import UserError
from ..integrations.stage_blocks import Denoised, adapted
from .rectified import Flow, euler, noised, small_wan

__all__ = ["AvatarConfig", "AvatarModel", "Given", "Noisy", "hand_clarity", "noisy", "shown"]

_CROP, _TEXT = 8, 16  # pixels of a crop's side; channels of the text that is not there
_SIGNAL, _PLACE = 2, 2  # values of the signal, and of a place
_FACTOR = (1.0, 1.5)  # the movement map's box, in training; in inference the middle
_SHARP = 0.25  # score that is asked for in inference: of ten sharp clips nine have less


@dataclass(frozen=True, slots=True)
class AvatarConfig:
    """Size of a denoiser of avatars.

    Attributes:
        side: pixels of a frame.
        patch: pixels of a token's side.
        dim, heads, layers: of the blocks.
        hidden: width of their feed-forward part; 0 for four times ``dim``.
        strategy: spec of the blocks that are inserted; empty for none.
        movement, clarity, pose, local: which of the paper's priors it has.
    """

    side: int = 16
    patch: int = 2
    dim: int = 48
    heads: int = 2
    layers: int = 2
    hidden: int = 0
    strategy: str = "cyberhost:spatial=32,temporal=16"
    movement: bool = True
    clarity: bool = True
    pose: bool = True
    local: bool = True


class Given(NamedTuple):
    """What a denoiser is told.

    Attributes:
        signal: ``[N, T, 2]`` in 0..1.
        reference: ``[N, 3, S, S]``.
        skeleton: a drawing of the reference's, ``[N, 1, S, S]``.
        movement: map of the body's movement, ``[N, 1, S, S]``.
        clarity: of the hands, ``[N]``.
        crops: of face and hands of the reference, ``[N, K, 3, C, C]`` each.
    """

    signal: Tensor
    reference: Tensor
    skeleton: Tensor
    movement: Tensor
    clarity: Tensor
    crops: tuple[Tensor, Tensor]


class Noisy(NamedTuple):
    """Clips as a denoiser is trained on them.

    Attributes:
        latents: with noise, ``[N, 3, T, S, S]``.
        time: of 1,000, ``[N]``.
        given: what it is told.
        velocity: what is to be predicted.
        within: 1 in the regions, ``[N, T, S, S]``.
        face, hand: tokens of the regions, 0 or 1, ``[N, T, s, s]``.
        heat: maps of the hands' keypoints, ``[N, T, K, s, s]``.
        counted: 1 where these count, ``[N]``.
    """

    latents: Tensor
    time: Tensor
    given: Given
    velocity: Tensor
    within: Tensor
    face: Tensor
    hand: Tensor
    heat: Tensor
    counted: Tensor


class AvatarModel(Flow):
    """A denoiser with inserted blocks, and the encoders of the priors.

    Attributes:
        config: its size.
        denoiser: see :func:`manyheads.integrations.stage_blocks.adapted`.
    """

    named: ClassVar[str] = "avatars"
    recipe: ClassVar[str] = "cyberhost"
    config_type: ClassVar[type] = AvatarConfig

    def __init__(self, config: AvatarConfig) -> None:
        super().__init__()
        if config.side % config.patch:
            raise UserError("a patch parts the side: give another side or patch")
        self.config = config
        self.text = nn.Parameter(torch.zeros(1, 1, _TEXT))
        self.movement = PoseEncoder(3) if config.movement else None
        self.pose = PoseEncoder(3) if config.pose else None
        self.clarity = ClarityEmbedding(config.dim) if config.clarity else None
        transformer = small_wan(config, (1, config.patch, config.patch), (3 + _SIGNAL + _PLACE, 3), _TEXT, 64)
        self.denoiser = adapted(transformer, config.strategy or None)  # last: others' first weights are the same

    def forward(self, latents: Tensor, time: Tensor, given: Given) -> Denoised:
        """Velocity of ``latents [N, 3, T, S, S]``, as :class:`Noisy` has what is given."""
        reference = given.reference
        if self.pose is not None:
            reference = reference + self.pose(given.skeleton)
        if self.movement is not None:
            latents = latents + self.movement(given.movement)[:, :, None]
        sound = (2 * given.signal - 1).transpose(1, 2)[..., None, None].expand(-1, -1, -1, *latents.shape[3:])
        frames = torch.cat([reference[:, :, None], latents], 2)
        line = torch.linspace(-1, 1, self.config.side, device=frames.device, dtype=frames.dtype)
        place = torch.stack(torch.meshgrid(line, line, indexing="ij"))[None, :, None]
        told = torch.cat([torch.zeros_like(sound[:, :, :1]), sound], 2)
        frames = torch.cat([frames, told, place.expand(*told.shape[:1], -1, told.shape[2], -1, -1)], 1)
        count = (self.config.side // self.config.patch) ** 2
        own = time[:, None].expand(-1, latents.shape[2] * count)
        times = torch.cat([torch.zeros_like(own[:, :count]), own], 1)
        added = None if self.clarity is None else self.clarity(given.clarity)
        text = self.text.expand(len(latents), -1, -1)
        out, seen = self.denoiser(frames, times, given.crops, lead=1, time_added=added, encoder_hidden_states=text)
        return Denoised(out[:, :, 1:], seen)

    def loss(self, given: Any) -> Tensor:
        """What training makes small, see :func:`manyheads.calls.human_priors.local_loss`."""
        out, seen = self(given.latents, given.time, given.given)
        error = (out.float() - given.velocity).square()
        return local_loss(
            error, given.within, seen, {"face": given.face, "hand": given.hand}, {"hand": given.heat}, given.counted,
            local=self.config.local,
        )  # fmt: skip

    @torch.no_grad()
    def animated(self, given: Given, noise: Tensor, steps: int = 8) -> tuple[Tensor, Tensor | None]:
        """Videos ``[N, T, 3, S, S]`` by Euler steps of the flow, and the share of the hands' masks at the last.

        Args:
            given: what they are told.
            noise: to start from, ``[N, 3, T, S, S]``.
            steps: as many evaluations of the denoiser.
        """
        masks: list[Tensor] = []

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            made: Denoised = self(x, time, given)
            masks[:] = [logits for stage in made.seen if (logits := stage["hand"].mask) is not None]
            return made.sample

        video = euler(velocity, noise, steps).transpose(1, 2)
        return video, torch.stack(masks).float().sigmoid().mean(0) if masks else None

    def animate(self, reference: Clip, signal: Tensor, steps: int = 8, seed: int = 0) -> Tensor:
        """Have the avatars of a clip's references follow another signal ``[N, T, 2]``: ``[N, T, 3, S, S]`` in -1..1.

        How far bodies sway is that of the clip.

        Raises:
            UserError: a signal that is none, or frames of another size.
        """
        if signal.ndim != 3 or signal.shape[2] != _SIGNAL or len(signal) != len(reference.reference):
            raise UserError(f"a signal is [N, T, {_SIGNAL}], of as many clips as avatars, not {list(signal.shape)}")
        if reference.reference.shape[-1] != self.config.side:
            raise UserError(f"frames have {self.config.side} pixels a side, not {reference.reference.shape[-1]}")
        device = self.text.device
        given: Given = tree_map(lambda x: x.to(device), shown(reference)._replace(signal=signal))
        shape = (len(signal), 3, signal.shape[1], self.config.side, self.config.side)
        noise = torch.randn(shape, generator=Generator().manual_seed(seed))
        return self.animated(given, noise.to(device), steps)[0].cpu()


def shown(clip: Clip, factor: Tensor | None = None, clarity: Tensor | None = None) -> Given:
    """What a denoiser is told of clips; in inference neither ``factor`` of the movement map nor the score is known."""
    side, count = clip.video.shape[-1], len(clip.video)
    if factor is None:
        factor = torch.full((count,), sum(_FACTOR) / 2, device=clip.video.device)
    if clarity is None:
        clarity = torch.full((count,), _SHARP, device=clip.video.device)
    own = regions(clip.reference_pose, clip.avatar.finger, side)
    crops = [_crops(clip.reference, own[name]) for name in ("face", "hand")]
    return Given(
        clip.signal, clip.reference, skeleton(clip.reference_pose, clip.avatar.finger, side),
        movement_map(chest(clip.pose, side), factor, side), clarity, (crops[0], crops[1]),
    )  # fmt: skip


def _crops(images: Tensor, box: Tensor) -> Tensor:
    """Crops ``[N, K, 3, C, C]`` of ``images [N, 3, S, S]`` by boxes ``[N, K, 4]``."""
    many = images[:, None].expand(-1, box.shape[1], -1, -1, -1)
    made: Tensor = cut(many.flatten(0, 1), box.flatten(0, 1), _CROP).unflatten(0, box.shape[:2])
    return made


def hand_clarity(clip: Clip) -> Tensor:
    """The score of each clip, the mean over its frames and hands, ``[N]``."""
    side, finger = clip.video.shape[-1], clip.avatar.finger[:, None].expand(clip.video.shape[:2])
    box = regions(clip.pose, finger, side)["hand"]
    crops = _crops(clip.video.flatten(0, 1), box.flatten(0, 1)).unflatten(0, clip.video.shape[:2])
    return clarity_score(crops, _CROP).flatten(1).mean(1)


def noisy(clip: Clip, patch: int, generator: Generator) -> Noisy:
    """Clips with noise at levels of a logit-normal (arXiv 2403.03206), drawn on the device of the clips."""
    device, side = clip.video.device, clip.video.shape[-1]
    clean = clip.video.transpose(1, 2)
    latents, time, velocity = noised(clean, generator)
    drawn = torch.rand(2, len(clean), generator=generator, device=device)
    finger = clip.avatar.finger[:, None].expand(clip.video.shape[:2])
    box = regions(clip.pose, finger, side)
    within = {name: covered(each, side, side) for name, each in box.items()}
    tokens = {name: covered(each, side, side // patch).float() for name, each in box.items()}
    heat = heat_maps(keypoints(clip.pose, finger, side), side, side // patch, side / 16)
    factor = _FACTOR[0] + (_FACTOR[1] - _FACTOR[0]) * drawn[0]
    return Noisy(
        latents, time, shown(clip, factor, hand_clarity(clip)),
        velocity, (within["face"] | within["hand"]).float(), tokens["face"], tokens["hand"], heat,
        ((time < 500) & (drawn[1] < 0.5)).float(),
    )  # fmt: skip
