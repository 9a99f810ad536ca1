# SPDX-License-Identifier: Apache-2.0
"""How likely the judge holds what a caption asks for, and how far generated scenes are from real ones.

FD-small is the Fréchet distance of the judge's features to real scenes before photographs that no model was trained on.
It is a figure of a set; what an image adds to it is its jackknife pseudo-value, ``n FD - (n - 1) FD without it``, whose
mean is the distance with its bias from few images taken off, and which can be paired between arms like any other value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...diffusion._styles import STYLES, style
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit, seeding
from ...models.judge import Seen, frechet
from ...spec import parse
from ._image_task import ImageTask, drawn, judge_of, pipe_of

__all__ = ["SceneQuality", "likelihood", "pseudo_values"]

_REAL = 2000  # scenes that generated ones are compared with


@dataclass(frozen=True, kw_only=True)
class SceneQuality(ImageTask):
    """Unit ``seed`` makes all images of a seed under every arm.

    An arm may say in its options what is chosen for it, on captions and noise of their own (``searched`` images):

    - ``tune={"scale": (0.1, 0.3)}``: the value of a field with the least FD-small; with ``tuned_for="NAME"`` the value
      that is the best for the arm of that name, so that both act at the same; the metric ``tuned`` tells it;
    - ``heads="searched", count=6``: the heads that raise the likelihood most, each perturbed alone (a search of
      ``candidates`` of them), or with ``style="edges"`` a measure of how images look; ``heads="layer"``: those of the
      best whole layer; ``heads="random", count=6``: as many drawn anew in each of ``draws`` sets, of which every image
      gets one in turn.

    Attributes:
        searched: images to choose by.
        candidates: heads that a search tries; 0 for all.
        draws: random sets of heads.
        styles: measures of how images look that are figures too.
    """

    known_contents: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("likelihood", "log-likelihood of the words, nats", "nats", higher=True),
        Metric("fd_small", "FD-small to real scenes"),
        Metric("object", "object as the caption says", higher=True, kind="share"),
        Metric("tuned", "value chosen on other noise"),
        *(Metric(name, name, higher=True) for name in STYLES),
    )

    searched: int = 48
    candidates: int = 0
    draws: int = 4
    styles: tuple[str, ...] = ()

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{seed}", self.samples * len(run.arms), f"{self.name}, seed {seed}", {"seed": seed})
            for seed in run.seeds
        ]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed = unit.params["seed"]
        labels = drawn(run, self.samples, seed)
        for arm in run.arms:
            acting = self.chosen(run, arm, seed)
            made = self._made(run, arm, seed, self.samples, "judged", acting)
            seen = judge_of(run).see(made)
            found = {"fd_small": pseudo_values(seen.features.cpu(), self.truth(run))}
            if self.conditioned:
                found |= {"likelihood": likelihood(seen, labels), "object": seen.right(labels, "object")}
            found |= {name: style(name)(made) for name in self.styles}
            yield from self.judged(arm, seed, found)
            for field in arm.options.get("tune", ()):
                yield self.row("tuned", arm, getattr(acting[0][0], field), "all", seed=seed)
            run.advance(unit.cost / len(run.arms))

    def chosen(self, run: RunContext, arm: Arm, seed: int) -> list[Sequence[Any]]:
        """Strategies of the arm, as chosen for it; several sets are taken in turn, an image each."""
        options = arm.options
        if "tune" in options:
            (name, values), *rest = options["tune"].items()
            if rest:
                raise UserError(f"{arm.key}: one field can be tuned, not {len(rest) + 1}")
            named = {other.name: other for other in run.arms} | {arm.name: arm}
            judged = named.get(options.get("tuned_for", arm.name))
            if judged is None:
                raise UserError(f"{arm.key} is tuned for {options['tuned_for']!r}, which is no arm of this run")

            def distance(value: Any) -> float:
                return self._distance(run, judged, replace(judged.strategy, **{name: value}))

            key = (judged.key, "tuned")  # the same for all seeds
            best = values[0] if len(values) == 1 else run.kept(key, lambda: min(values, key=distance))
            return [[replace(arm.strategy, **{name: best})]]
        if "heads" in options:
            return [[each] for each in self._heads(run, arm, seed)]
        return [arm.strategies]

    def _distance(self, run: RunContext, arm: Arm, strategy: Any) -> float:
        made = self._made(run, arm, 0, self.searched, "searched", [[strategy]])
        return frechet(judge_of(run).see(made).features.cpu(), self.truth(run))

    def _scores(self, run: RunContext, arm: Arm, seed: int, strategy: Any) -> dict[str, float]:
        """What heads can be chosen by: means over the searched images; the same for all arms that ask."""

        def make() -> dict[str, float]:
            made = self._made(run, arm, seed, self.searched, "searched", [[strategy]])
            labels = drawn(run, self.searched, seed, "searched")
            found = {"": likelihood(judge_of(run).see(made), labels)} | {n: style(n)(made) for n in self.styles}
            return {name: float(values.mean()) for name, values in found.items()}

        scores: dict[str, float] = run.kept(("searched", seed, strategy.spec), make)
        return scores

    def _heads(self, run: RunContext, arm: Arm, seed: int) -> list[Any]:
        from ...diffusion.headhunter import hunt

        config = pipe_of(run).transformer.config
        layers, heads = range(config.num_layers), range(config.num_attention_heads)
        every = [f"{layer}.{head}" for layer in layers for head in heads]
        base: Any = parse(arm.full_spec)
        objective = str(arm.options.get("style", ""))
        if objective not in ("", *self.styles):
            raise UserError(f"{arm.key}: heads are chosen for {objective!r}, which is not among the styles of the task")

        def score(strategy: Any) -> float:
            return self._scores(run, arm, seed, strategy)[objective]

        rng = run.rng(heads=seed)
        count, how = int(arm.options.get("count", len(heads))), arm.options["heads"]
        if how == "random":
            return [
                replace(base, heads=tuple(sorted(rng.choice(every, count, replace=False)))) for _ in range(self.draws)
            ]
        if how == "layer":
            whole = [replace(base, heads=tuple(f"{layer}.{head}" for head in heads)) for layer in layers]
            return [run.kept(("best layer", seed), lambda: max(whole, key=score))]
        tried = sorted(rng.choice(every, self.candidates, replace=False)) if self.candidates else every
        key = ("order of heads", seed, objective, base.strength if objective else "as in the first arm")
        found = run.kept(key, lambda: hunt(base, tried, score, rounds=1, top=len(every))[0].heads)
        return [replace(base, heads=tuple(found[:count]))]

    def _made(
        self, run: RunContext, arm: Arm, seed: int, count: int, draw: str, sets: Sequence[Sequence[Any]]
    ) -> Tensor:  # fmt: skip
        """``count`` images ``[N, 3, H, W]``; where strategies come in several sets, images take turns."""
        size = self.batch * (8 if run.device.type == "cuda" else 1)
        labels = drawn(run, count, seed, draw)
        made: dict[int, Tensor] = {}
        for turn, acting in enumerate(sets):
            mine = list(range(turn, count, len(sets)))
            for at in range(0, len(mine), size):
                part = mine[at : at + size]
                torch.manual_seed(seeding.number(run.seed, masks=draw, seed=seed, image=part[0]))  # of random masks
                images = self._of(run, arm, seed, part, labels[part], acting, draw)
                made |= dict(zip(part, images, strict=True))
        return torch.stack([made[i] for i in range(count)])

    def _of(
        self, run: RunContext, arm: Arm, seed: int, part: list[int], labels: Tensor, acting: Sequence[Any], draw: str
    ) -> Tensor:  # fmt: skip
        def noise(_: Tensor) -> Tensor:
            return torch.cat([
                pipe_of(run).noise(1, run.torch_rng(noise=draw, seed=seed, image=i)) for i in part
            ])  # fmt: skip

        return self.images(
            run, arm, seed, part[0], part[-1] + 1, acting=acting, labels=labels, prepare=noise, draw=draw
        )  # fmt: skip

    def truth(self, run: RunContext) -> Tensor:
        """The judge's features of real scenes ``[N, d]``."""

        def make() -> Tensor:
            from ...data import scenes

            sample = scenes.draw("scenes", _REAL, torch.Generator().manual_seed(2**30), "test")
            return judge_of(run).see(sample.images / 2 + 0.5).features.cpu()

        found: Tensor = run.kept("real scenes", make)
        return found


def likelihood(seen: Seen, labels: Tensor) -> Tensor:
    """Mean log-probability, over the words of ``labels [N, 3]``, of each image ``[N]``."""
    chances = seen.chances.values()
    each = [c.cpu().gather(1, labels[:, i : i + 1]).clamp(min=1e-6).log() for i, c in enumerate(chances)]
    return torch.cat(each, 1).mean(1)


def pseudo_values(features: Tensor, truth: Tensor) -> Tensor:
    """Jackknife pseudo-values ``[N]`` of the Fréchet distance of ``features [N, d]`` to ``truth [M, d]``."""
    n = len(features)
    whole = frechet(features, truth)
    without = [frechet(torch.cat([features[:i], features[i + 1 :]]), truth) for i in range(n)]
    return n * whole - (n - 1) * torch.tensor(without, dtype=torch.float64)
