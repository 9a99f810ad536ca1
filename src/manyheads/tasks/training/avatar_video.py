# SPDX-License-Identifier: Apache-2.0
"""Videos of avatars that follow a signal, by denoisers of each arm trained from scratch, beside the one exact video."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...conditioning import InsertedBlocks
from ...data.avatars import Clip, draw
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit, seeding
from ...models.avatars import AvatarConfig, AvatarModel, Noisy, fitted, noisy, shown
from ...recipes.cyberhost import PRIORS, train_avatars
from ...training import TrainState
from ._avatar_scores import Candidates, candidates, judge

__all__ = ["AvatarVideo"]

_AT_ONCE = 64  # clips at once


@dataclass(frozen=True, kw_only=True)
class AvatarVideo(Task):
    """Train a denoiser of every arm on the same clips, and have it animate avatars that no training saw.

    The signal, the reference and the range of the body's movement leave one right video, which is known exactly. Arms
    of a seed start from the same noise. ``options`` of an arm: ``fitted``, the spec of the blocks with which a model
    has as many parameters, to which its feed-forward width brings it; ``without``, priors that it is trained without
    (movement, clarity, pose, local); ``shown``, ``truth`` or ``reference``: no model, but the video itself, which says
    how exact keypoints are, or the reference as every frame, which says what is lost by not moving.

    Attributes:
        side, patch, dim, heads, layers: see :class:`manyheads.models.avatars.AvatarConfig`.
        frames: of a clip.
        batch: clips of a step.
        steps: of a training.
        rates: learning rates that every arm tries, on the first seed, for ``tune_steps``; the least loss on clips set
            aside decides. One alone is taken.
        tune_steps: of a trial.
        samples: clips that are judged.
        denoising: steps of a video.
    """

    subject: ClassVar[str] = "trainable"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("hand_rmse", "error of pixels in boxes of the hands", "of 1"),
        Metric("hand_keypoints", "distance of the hands' keypoints", "pixels of 16"),
        Metric("face_rmse", "error of pixels in boxes of the face", "of 1"),
        Metric("rest_rmse", "error of pixels elsewhere", "of 1"),
        Metric("mask_iou", "IoU of the hands' predicted region", higher=True, kind="share"),
        Metric("training_loss", "loss in the last tenth of training"),
        Metric("parameters", "parameters of a model"),
    )

    side: int = 16
    patch: int = 2
    dim: int = 48
    heads: int = 2
    layers: int = 2
    frames: int = 3
    batch: int = 4
    steps: int = 220
    rates: tuple[float, ...] = (4e-3,)
    tune_steps: int = 100
    samples: int = 64
    denoising: int = 6

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0 or min(self.steps, self.tune_steps, self.batch, self.samples) < 1:
            raise UserError("rates are learning rates above 0; steps, batches and samples count from 1")

    def guard(self, run: RunContext) -> None:
        for arm in run.arms:
            if wrong := [s.spec for s in arm.strategies if not isinstance(s, InsertedBlocks)]:
                raise UserError(f"{self.name} trains denoisers, on which {wrong[0]} does not act; give cyberhost")
            if wrong := sorted(set(arm.options.get("without", ())) - set(PRIORS)):
                raise UserError(f"{self.name} knows the priors {', '.join(PRIORS)}, not {wrong[0]}")

    def units(self, run: RunContext) -> list[WorkUnit]:
        found = []
        for arm in run.arms:
            trials = self.tune_steps * len(self.rates) if len(self.rates) > 1 else 0
            cost = 1.0 if arm.options.get("shown") else float((trials + self.steps * len(run.seeds)) * self.batch)
            found.append(WorkUnit(self.key, arm.key, cost, f"{arm.key}: avatars", {"arm": arm.key}))
        return found

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = run.arm_of(unit)
        rate = None if arm.options.get("shown") else self.rate(run, arm)
        clips = self.judged(run)
        known: Candidates = run.kept(("candidates", self.side, self.frames, self.samples), lambda: candidates(clips))
        for seed in run.seeds:
            truth = arm.options.get("shown") == "truth"
            found = clips.video if truth else clips.reference[:, None].expand_as(clips.video)
            mask: Tensor | None = None
            if rate is not None:
                model, state = self.trained(run, arm, seed, rate, self.steps)
                tail = state.losses[-max(1, len(state.losses) // 10) :]
                about = {"rate": rate, "seconds": state.seconds}
                yield self.row("training_loss", arm, sum(tail) / len(tail), "training", seed=seed, about=about)
                yield self.row("parameters", arm, model.parameters_held, "training", seed=seed)
                noise = torch.randn(clips.video.transpose(1, 2).shape, generator=run.torch_rng(part="noise", seed=seed))
                found, mask = model.animated(shown(clips), noise.to(run.device), self.denoising)
            for i, values in enumerate(judge(found, mask, clips, known)):
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
            return fitted(own, AvatarModel(AvatarConfig(*sizes, strategy=spec)).parameters_held)

    def fresh(self, run: RunContext, arm: Arm, seed: int) -> AvatarModel:
        """An arm's model with its first weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.number(run.seed, weights=seed))
            return AvatarModel(self.config(arm)).to(run.device)

    def rate(self, run: RunContext, arm: Arm) -> float:
        """The learning rate of an arm."""
        if len(self.rates) == 1:
            return self.rates[0]
        aside, losses = self._batch(run, _AT_ONCE, aside=1), {}
        for rate in self.rates:
            model, _ = self.trained(run, arm, run.seeds[0], rate, self.tune_steps)
            with torch.no_grad():
                losses[rate] = float(model.loss(aside))
        return min(losses, key=lambda rate: (not math.isfinite(losses[rate]), losses[rate]))

    def trained(self, run: RunContext, arm: Arm, seed: int, rate: float, steps: int) -> tuple[AvatarModel, TrainState]:
        """An arm's model after ``steps``, on clips and noise that are the same for all arms."""
        model = self.fresh(run, arm, seed)
        state = train_avatars(
            model, lambda step: self._batch(run, self.batch, training=seed, step=step), steps, rate,
            lambda _: run.advance(self.batch), warmup=max(1, steps // 20),
        )  # fmt: skip
        return model, state

    def judged(self, run: RunContext) -> Clip:
        """Clips with sharp hands."""

        def make() -> Clip:
            return draw(
                self.samples, self.frames, self.side, run.torch_rng(part="test"), sharp=True, device=run.device
            )  # fmt: skip

        found: Clip = run.kept(("avatars", self.side, self.frames, self.samples), make)
        return found

    def _batch(self, run: RunContext, count: int, **axes: int) -> Noisy:
        rng = run.torch_rng(clips=1, **axes)
        clips = draw(count, self.frames, self.side, rng, device=run.device)
        return noisy(clips, self.patch, torch.Generator(run.device).manual_seed(rng.initial_seed()))
