# SPDX-License-Identifier: Apache-2.0
"""A new object, learned by a frozen text-to-image model from a few pictures, in places where it was not shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...conditioning import AttentionAdaptor
from ...data import scenes
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...integrations.adapted import adapted
from ...models.scenes import ScenePipeline, load_scenes, predict
from ...recipes.new_object import Pictures, pictures, train

__all__ = ["NewObject"]

_LEVELS = (100, 300, 500, 700, 900)  # timesteps of 1,000 at which predictions are judged


@dataclass(frozen=True, kw_only=True)
class NewObject(Task):
    """Train the adaptor of every arm on a few pictures of an emoji; an arm without a strategy is the model as it is.

    Judged is what the model predicts of noisy pictures before photographs that were not shown: the squared error
    where the object is (``object_error``), and of pictures of the objects that the model knew (``kept_error``). Each
    seed has an emoji of its own. Every arm tries all ``rates`` and keeps the adaptor that is best on pictures set
    aside.

    Attributes:
        emoji: code points, one for each seed.
        shown: pictures of an object that are trained on.
        steps, batch: of a training.
        rates: learning rates that are tried.
        samples: pictures that are judged.
    """

    subject: ClassVar[str] = "trainable"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("object_error", "squared error of what is predicted where the new object is"),
        Metric("kept_error", "squared error of what is predicted of objects known before"),
        Metric("trained", "numbers that are trained and kept"),
    )

    emoji: tuple[str, ...] = ("1f680", "1f431", "1f344")
    shown: int = 6
    steps: int = 200
    batch: int = 8
    rates: tuple[float, ...] = (2.5e-3, 1e-2)
    samples: int = 64

    def __post_init__(self) -> None:
        if min(self.shown, self.steps, self.batch, self.samples) < 1 or not self.rates or min(self.rates) <= 0:
            raise UserError("pictures, steps and batches count from 1, and rates are above 0")

    def guard(self, run: RunContext) -> None:
        for arm in run.arms:
            if wrong := [s.spec for s in arm.strategies if not isinstance(s, AttentionAdaptor)]:
                raise UserError(f"{self.name} trains adaptors, which {wrong[0]} is not; give comcat.adaptor")

    def unsupported_reason(self, run: RunContext) -> str | None:
        return None if scenes.available() else "photographs and emoji are not on this machine (docs/compare.md, data)"

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{arm.key}/{seed}", float(self.steps * len(self.rates) if arm.spec else 1),
                     f"{arm.key}: object {seed + 1}", {"arm": arm.key, "seed": seed})
            for seed in run.seeds for arm in run.arms
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, seed = run.arm_of(unit), unit.params["seed"]
        pipe: ScenePipeline = run.kept("pipeline", lambda: load_scenes("unet", run.device))
        sprite = scenes.new_object(self.emoji[seed % len(self.emoji)])
        adaptor = self._trained(run, arm, seed, pipe, sprite) if arm.spec else None
        count = 0 if adaptor is None else sum(p.numel() for p in adaptor.parameters())
        yield self.row("trained", arm, float(count), "adaptor", seed=seed)
        for metric, own in (("object_error", sprite), ("kept_error", None)):
            judged = self._drawn(run, self.samples, own, "test", judged=seed)
            with adapted(pipe.denoiser, adaptor) if adaptor is not None else nullcontext():
                errors = _errors(pipe, judged, run.torch_rng(noise=metric, seed=seed), inside=own is not None)
            yield from self.each(metric, arm, errors.tolist(), seed=seed)

    def _trained(self, run: RunContext, arm: Arm, seed: int, pipe: ScenePipeline, sprite: Tensor) -> Any:
        shown = self._drawn(run, self.shown, sprite, "train", shown=seed)
        aside = self._drawn(run, self.samples, sprite, "train", aside=seed)
        best: tuple[float, Any] | None = None
        for rate in self.rates:
            adaptor, _ = train(pipe, arm.strategy, shown, self.steps, rate, self.batch, seed)  # type: ignore[arg-type]
            with adapted(pipe.denoiser, adaptor):
                found = float(_errors(pipe, aside, run.torch_rng(noise="aside", seed=seed), inside=True).mean())
            best = (found, adaptor) if best is None or found < best[0] else best
            run.advance(self.steps)
        assert best is not None
        return best[1]

    def _drawn(self, run: RunContext, count: int, sprite: Tensor | None, split: Any, **axes: int) -> Pictures:
        return pictures(count, run.torch_rng(part=split, known=sprite is None, **axes), sprite, split, str(run.device))


@torch.no_grad()
def _errors(pipe: ScenePipeline, given: Pictures, generator: torch.Generator, inside: bool) -> Tensor:
    """Squared error of the noise that is predicted, of each picture, over several levels: ``[N]``.

    Args:
        pipe: the model.
        given: pictures.
        generator: of the noise, on the CPU.
        inside: where the object is alone, by how much it covers; else everywhere.
    """
    clean, total = pipe._packed(given.images), []
    cover = pipe._packed(given.alpha.expand_as(given.images)) if inside else torch.ones_like(clean)
    captions = pipe.captions(given.captions)
    for level in _LEVELS:
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        time = torch.full((len(clean),), level, device=clean.device)
        out = predict(pipe.denoiser, pipe.scheduler.add_noise(clean, noise, time), time, captions)
        total.append((cover * (out - noise).square()).flatten(1).sum(1) / cover.flatten(1).sum(1))
    return torch.stack(total).mean(0)
