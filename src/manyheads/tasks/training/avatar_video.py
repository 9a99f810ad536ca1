# SPDX-License-Identifier: Apache-2.0
"""Videos of avatars that follow a signal, by denoisers of each arm trained from scratch, beside the one exact video."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...conditioning import InsertedBlocks
from ...data.avatars import Clip, draw
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit, seeding
from ...models.avatars import AvatarConfig, AvatarModel, Noisy, noisy, shown
from ...models.rectified import fitted
from ...recipes.cyberhost import PRIORS
from ._avatar_scores import Candidates, candidates, judge
from ._flows import TRAINING_LOSS, FlowTask

__all__ = ["AvatarVideo"]

_ASIDE = 64  # clips by which a rate is chosen


@dataclass(frozen=True, kw_only=True)
class AvatarVideo(FlowTask):
    """Train a denoiser of every arm on the same clips, and have it animate avatars that no training saw.

    The signal, the reference and the range of the body's movement leave one right video, which is known exactly. Arms
    of a seed start from the same noise. ``options`` of an arm, beside the base's: ``fitted``, the spec of the blocks
    with which a model has as many parameters, to which its feed-forward width brings it; ``without``, priors that it
    is trained without (movement, clarity, pose, local); ``copies``, ``truth`` or ``reference``: no model, but the
    video itself, which says how exact keypoints are, or the reference as every frame, which says what is lost by not
    moving.

    Attributes:
        side, patch, dim, heads, layers: see :class:`manyheads.models.avatars.AvatarConfig`.
        frames: of a clip.
        samples: clips that are judged.
        denoising: steps of a video.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("hand_rmse", "error of pixels in boxes of the hands", "of 1"),
        Metric("hand_keypoints", "distance of the hands' keypoints", "pixels of 16"),
        Metric("face_rmse", "error of pixels in boxes of the face", "of 1"),
        Metric("rest_rmse", "error of pixels elsewhere", "of 1"),
        Metric("mask_iou", "IoU of the hands' predicted region", higher=True, kind="share"),
        TRAINING_LOSS,
        Metric("parameters", "parameters of a model"),
    )

    side: int = 16
    patch: int = 2
    dim: int = 48
    heads: int = 2
    layers: int = 2
    frames: int = 3
    batch: int = 4
    samples: int = 64
    denoising: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.samples < 1:
            raise UserError("samples count from 1")

    def guard(self, run: RunContext) -> None:
        for arm in run.arms:
            if wrong := [s.spec for s in arm.strategies if not isinstance(s, InsertedBlocks)]:
                raise UserError(f"{self.name} trains denoisers, on which {wrong[0]} does not act; give cyberhost")
            if wrong := sorted(set(arm.options.get("without", ())) - set(PRIORS)):
                raise UserError(f"{self.name} knows the priors {', '.join(PRIORS)}, not {wrong[0]}")

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, clips = run.arm_of(unit), self.judged(run)
        known: Candidates = run.kept(("candidates", self.side, self.frames, self.samples), lambda: candidates(clips))
        for seed, model, told in self.flows(run, arm):
            yield from told
            video = clips.video if arm.options.get("copies") == "truth" else clips.reference[:, None]
            video, mask = video.expand_as(clips.video), None
            if isinstance(model, AvatarModel):
                yield self.row("parameters", arm, model.parameters_held, "training", seed=seed)
                video, mask = self._animated(run, model, clips, seed)
            for i, values in enumerate(judge(video, mask, clips, known)):
                for name, value in values.items():
                    yield self.row(name, arm, value, f"{i}", seed=seed)

    def config(self, arm: Arm) -> AvatarConfig:
        """Of an arm's model."""
        without = dict.fromkeys(arm.options.get("without", ()), False)
        sizes = (self.side, self.patch, self.dim, self.heads, self.layers)
        own = AvatarConfig(*sizes, strategy=arm.full_spec, **without)
        if not (spec := arm.options.get("fitted")):
            return own
        with torch.random.fork_rng(devices=[]):
            return fitted(AvatarModel, own, AvatarModel(AvatarConfig(*sizes, strategy=spec)).parameters_held)

    def fresh(self, run: RunContext, arm: Arm, seed: int) -> AvatarModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.number(run.seed, weights=seed))
            return AvatarModel(self.config(arm)).to(run.device)

    def given(self, run: RunContext, arm: Arm, stage: str, seed: int, step: int) -> Noisy:
        return self._batch(run, self.batch, training=seed, step=step)

    def aside(self, run: RunContext, arm: Arm) -> Noisy:
        return self._batch(run, _ASIDE, aside=1)

    def judged(self, run: RunContext) -> Clip:
        """Clips with sharp hands."""

        def make() -> Clip:
            rng = run.torch_rng(part="test")
            return draw(self.samples, self.frames, self.side, rng, sharp=True, device=run.device)

        found: Clip = run.kept(("avatars", self.side, self.frames, self.samples), make)
        return found

    def _animated(self, run: RunContext, model: AvatarModel, clips: Clip, seed: int) -> tuple[Tensor, Tensor | None]:
        noise = torch.randn(clips.video.transpose(1, 2).shape, generator=run.torch_rng(part="noise", seed=seed))
        return model.animated(shown(clips), noise.to(run.device), self.denoising)

    def _batch(self, run: RunContext, count: int, **axes: int) -> Noisy:
        rng = run.torch_rng(clips=1, **axes)
        clips = draw(count, self.frames, self.side, rng, device=run.device)
        return noisy(clips, self.patch, torch.Generator(run.device).manual_seed(rng.initial_seed()))
