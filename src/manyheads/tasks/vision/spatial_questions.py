# SPDX-License-Identifier: Apache-2.0
"""Where objects are in scenes in depth, asked of a vision-language model that drops tokens of them while it reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from ...call import AttentionCall, Site
from ...costs.clock import Clock
from ...data.object_scenes import draw_depths
from ...data.scenes import OBJECTS
from ...data.visual_questions import SIDES, WORDS, Questions, sides
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...integrations import use
from ...models import joined_vlm
from ...models.image_pool import ImagePool, orders
from ...models.joined_vlm import JoinedVLM
from ...recipes.spatial_gating import flows
from ...strategy import AttentionWatch
from ...tokens.spatial_gating import SpatialGating, idle, schedule_of
from ...training.answers import answer_logits, train_answers
from ._models import VLMTask

__all__ = ["SpatialQuestions"]

_CALIBRATED, _PART = 16, 64  # scenes for a schedule, and of a forward
_THERE = len(SIDES) - 1


@dataclass(frozen=True, kw_only=True)
class _Counts(AttentionWatch):
    """How many tokens each block reads."""

    def selects(self, site: Site) -> bool:
        return site.causal

    def watch(self, call: AttentionCall, out: Tensor) -> None:
        call.state.setdefault("tokens", []).append(call.q.shape[2])


@dataclass(frozen=True, kw_only=True)
class SpatialQuestions(VLMTask):
    """A unit for each seed: one training without any strategy, and every arm on the same weights, scenes and questions.

    An arm with the option ``calibrated`` is given the schedule that scenes of the training say, one with ``keep`` drops
    all but that part at its first block, by whom its option ``by`` says. Arms without a schedule read text by text.

    A text of the training asks all questions of a scene, one that is judged (or calibrates) a single one: with several,
    the last token would know of the last alone.

    Seconds are of a decoder of new weights that is larger and reads larger images, of which arms with a schedule drop
    the same parts; on a CPU they are the processor's, of this thread.

    Attributes:
        planes, grid: distances of a scene, and cells of a side of each; a cell is a patch.
        objects: in a scene.
        batch, steps, lr, slower: of the training, as :func:`manyheads.training.answers.train_answers` has them.
        samples: scenes that are judged, with eight questions each.
        wider, longer: channels of the decoder that is timed, and patches of a side of its images.
        rounds: repetitions of its forward.
    """

    words: ClassVar[tuple[str, ...]] = tuple(dict.fromkeys((*WORDS, *SIDES)))
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("right", "questions where an object is, answered rightly", higher=True, kind="share", floor=0.5),
        Metric("seen", "questions whether an object is there, answered rightly", higher=True, kind="share"),
        Metric("idle", "share of a scene's tokens that have 5 % of the attention to it", higher=True),
        Metric("kept", "tokens of a scene that blocks read, as a share of all"),
        Metric("flops", "products of the decoder, as a share of those with every token"),
        Metric("seconds", "seconds of reading a prompt", "s", kind="time"),
        Metric("training_nll", "loss in the last tenth of training, nats/answer", "nats/answer"),
    )  # fmt: skip

    layers: int = 4
    align: int = 200
    planes: int = 2
    grid: int = 4
    objects: int = 5
    batch: int = 16
    steps: int = 1200
    lr: float = 1.5e-3
    slower: float = 1.0
    samples: int = 160
    wider: int = 256
    longer: int = 12
    rounds: int = 5

    @property
    def patches(self) -> int:
        return self.grid

    def pictures(self, vlm: JoinedVLM, count: int, generator: Generator) -> tuple[Tensor, Tensor, int, int]:
        scene = draw_depths(
            count // self.planes, generator, planes=self.planes, grid=self.grid, size=vlm.patch, objects=self.objects
        )
        cells = torch.full((len(scene.objects), self.planes, len(OBJECTS)), -1)
        rows, (plane, row, column) = torch.arange(len(cells))[:, None], scene.places.unbind(2)
        cells[rows, plane, scene.objects] = row * self.grid + column
        return scene.images.flatten(0, 1), cells.flatten(0, 1), self.grid, 1

    def fresh(self, run: RunContext, seed: int) -> JoinedVLM:
        vlm = super().fresh(run, seed)
        if self.model == "small" and self.align:
            vlm.model.model.vision_tower.requires_grad_(False)
            self._aligned(run, vlm, seed)
            vlm.model.model.vision_tower.requires_grad_(True)
        return vlm

    def guard(self, run: RunContext) -> None:
        """Refuse a baseline that drops something, and arms that do not drop tokens of prompts."""
        if run.baseline.strategies:
            raise UserError(f"the baseline of {self.name} is the model as it is, not {run.baseline.spec}")
        for arm in run.arms[1:]:
            if len(arm.strategies) != 1 or not isinstance(arm.strategies[0], SpatialGating):
                raise UserError(f"{self.name} compares ways to drop tokens of a prompt, and {arm.spec} is none")

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, f"{s}", 1.0, f"training and answers, seed {s}", {"seed": s}) for s in run.seeds]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed = int(unit.params["seed"])
        vlm = self.fresh(run, seed)
        losses = self._trained(run, vlm, seed)
        tail = losses[-max(1, len(losses) // 10) :]
        yield self.row("training_nll", run.baseline, mean(tail), "training", seed=seed)
        calibrating = vlm.batch(self._drawn(run, vlm, _CALIBRATED, "train", apart=True, part="calibration", seed=seed))
        found = flows(vlm.model.model, [_inputs(calibrating)])
        for block, flow in enumerate(found):
            at, values = {"block": block}, idle(flow).tolist()
            for i, value in enumerate(values):
                context = f"{i // len(OBJECTS)}"
                yield self.row("idle", run.baseline, value, f"{i}", context=context, seed=seed, at=at)
        strategies = {arm.name: self._strategy(arm, found) for arm in run.arms}
        for arm in run.arms:
            yield from self._judged(run, arm, strategies[arm.name], vlm, seed)
        yield from self._timed(run, strategies, len(found), seed)

    def _strategy(self, arm: Arm, found: list[Tensor]) -> SpatialGating | None:
        """What an arm does in the model at hand."""
        if not arm.strategies:
            return None
        given: Any = arm.strategies[0]
        schedule = given.schedule
        if "calibrated" in arm.options:
            schedule = schedule_of(found, given.eta, given.start)
        elif "keep" in arm.options:
            schedule = (1.0,) * given.start + (float(arm.options["keep"]),) * (len(found) - given.start)
        strategy: SpatialGating = replace(given, schedule=schedule, by=arm.options.get("by", given.by))
        return strategy

    def _judged(
        self, run: RunContext, arm: Arm, strategy: SpatialGating | None, vlm: JoinedVLM, seed: int
    ) -> Iterator[Row]:
        """Answers, and what was read for them."""
        asked = self._drawn(run, vlm, self.samples, "test", apart=True, part="test")
        part = 1 if strategy is not None and not strategy.schedule else _PART
        no, yes = vlm.language.answers
        counts, said = _Counts(), []
        with torch.no_grad(), _under(vlm, strategy, counts) as port:
            for start in range(0, len(asked.ids), part):
                logits = answer_logits(vlm.model, vlm.batch(_part(asked, start, part, self.planes)))
                said.append((logits[..., yes] > logits[..., no]).cpu())
        tokens = torch.tensor([state["tokens"] for _, state in port.kept(counts)], dtype=torch.float64)  # blocks, parts
        whole, scene = asked.ids.shape[1], self.planes * self.patches**2
        decoder = vlm.model.model.language_model
        linear = sum(p.numel() for p in decoder.layers[0].parameters() if p.ndim == 2)
        cost = tokens * linear + tokens**2 * decoder.config.hidden_size
        full = whole * linear + whole**2 * decoder.config.hidden_size
        for i, (kept, flops) in enumerate(
            zip((1 - (whole - tokens) / scene).mean(0), (cost / full).mean(0), strict=True)
        ):
            yield self.row("kept", arm, float(kept), f"{i}", seed=seed)
            yield self.row("flops", arm, float(flops), f"{i}", seed=seed)
        right = (torch.cat(said) == asked.truth)[:, 0].tolist()
        for i, (answer, axis) in enumerate(zip(right, asked.cells[:, 0].tolist(), strict=True)):
            name, context = "seen" if axis == _THERE else "right", f"{i // len(OBJECTS)}"
            yield self.row(name, arm, answer, f"{i}", context=context, seed=seed, at={"asked": SIDES[axis]})

    def _timed(
        self, run: RunContext, strategies: dict[str, SpatialGating | None], blocks: int, seed: int
    ) -> Iterator[Row]:
        """Seconds of the larger decoder, all arms in turn."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vlm = joined_vlm.small(
                patches=self.longer, size=self.patch, dim=self.wider, layers=blocks, heads=self.heads,
                words=self.words, device=run.device,
            )  # fmt: skip
        vlm.model.eval()
        drawn = sides(
            vlm.language, 1, run.torch_rng(part="timed"), planes=self.planes, grid=self.longer, size=vlm.patch,
            patches=self.longer, objects=self.objects, apart=True,
        )  # fmt: skip
        batch, clock = vlm.batch(_part(drawn, 0, 1, self.planes)), Clock(run.device, own=True)
        arms = [arm for arm in run.arms if (made := strategies[arm.name]) is None or made.schedule]
        for turn in range(self.rounds):
            for arm in arms[turn % len(arms) :] + arms[: turn % len(arms)]:
                strategy = strategies[arm.name]
                with torch.no_grad(), use(vlm.model, strategy) if strategy is not None else nullcontext():
                    answer_logits(vlm.model, batch)
                    seconds = clock.seconds(lambda: answer_logits(vlm.model, batch))
                yield self.row("seconds", arm, seconds, f"{turn}", seed=seed)

    def _trained(self, run: RunContext, vlm: JoinedVLM, seed: int) -> list[float]:
        def drawn(count: int, step: int) -> dict[str, Tensor]:
            return vlm.batch(self._drawn(run, vlm, count, "train", training=seed, step=step))

        def get_batch(step: int) -> dict[str, Tensor]:
            return drawn(self.batch, step) if pool is None else pool.batch(rows[step])

        pool, rows = None, torch.empty(0)
        if self.pool:
            pool = ImagePool.of(vlm, (drawn(_PART, part) for part in range(-(-self.pool // _PART))))
            order = run.torch_rng(task=self.key, training=seed, part="order")
            rows = orders(len(pool), self.steps, self.batch, order, run.device)
        return train_answers(
            vlm.model, get_batch, self.steps, lr=self.lr, slower=self.slower,
            replayed=pool is not None and run.device.type == "cuda",
            on_step=lambda _: run.advance(1 / self.steps),
        ).losses  # fmt: skip

    def _drawn(
        self, run: RunContext, vlm: JoinedVLM, count: int, split: Any, apart: bool = False, **axes: Any
    ) -> Questions:
        return sides(
            vlm.language, count, run.torch_rng(task=self.key, **axes), planes=self.planes, grid=self.grid,
            size=vlm.patch, patches=self.patches, objects=self.objects, split=split, apart=apart,
        )  # fmt: skip


def _under(vlm: JoinedVLM, strategy: SpatialGating | None, counts: _Counts) -> AbstractContextManager[Any]:
    return use(vlm.model, *([] if strategy is None else [strategy]), counts)


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model itself takes of a batch."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def _part(asked: Questions, start: int, count: int, images: int) -> Questions:
    """Some of the texts, with their images."""
    rows = slice(start, start + count)
    shown = asked.images[start * images : (start + count) * images]
    return Questions(asked.ids[rows], asked.real[rows], shown, asked.at[rows], asked.truth[rows], asked.cells[rows])
