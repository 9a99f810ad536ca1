# SPDX-License-Identifier: Apache-2.0
"""What tasks share that train a vision-language model under every arm to answer questions whose answers are known.

Arms differ in the strategy alone under which they are trained and judged: the same first weights, the same batches in
the same order, the same steps at one learning rate.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from ... import use
from ...data.visual_questions import Questions
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...models.image_pool import ImagePool, orders
from ...models.joined_vlm import JoinedVLM
from ...strategy import ImagePositions
from ...training import TrainState
from ...training.answers import answer_logits, train_answers
from ._models import VLMTask

__all__ = ["ANSWER_METRICS", "AnswerTask", "Split"]

Split = Literal["train", "test"]

ANSWER_METRICS = (
    Metric("right", "questions answered rightly", higher=True, kind="share", floor=0.5),
    Metric("said_yes", "questions answered with yes", kind="share"),
    Metric("f1", "F1 of yes", higher=True),
    Metric("training_nll", "loss in the last tenth of training, nats/answer", "nats/answer"),
)
_DRAWN = 128  # texts of a pool that are drawn at once
_SAME = 1e-4  # of the largest logit: what an arm that changes nothing may differ by in float32


@dataclass(frozen=True, kw_only=True)
class AnswerTask(VLMTask):
    """Base of tasks that train a model that reads images.

    Attributes:
        grid: cells of an image's side.
        cell: patches of a cell's side.
        asked: questions of a text.
        filler: words between images and questions in training.
        batch: texts of a step.
        steps: of a training.
        lr: highest learning rate, of the projector.
        slower: factor of that of all else.
        times: multiples of ``filler`` at which models are judged.
        samples: texts that are judged.
        at_once: texts judged at once.
    """

    grid: int = 6
    cell: int = 1
    asked: int = 6
    filler: int = 32
    batch: int = 16
    steps: int = 800
    lr: float = 5e-3
    slower: float = 1.0
    times: tuple[int, ...] = (1,)
    samples: int = 256
    at_once: int = 64

    @abstractmethod
    def questions(self, vlm: JoinedVLM, count: int, generator: Generator, filler: int, split: Split) -> Questions:
        """Draw texts."""

    @abstractmethod
    def judged(self, arm: Arm, seed: int, times: int, asked: Questions, yes: Tensor) -> Iterator[Row]:
        """Rows of this task's own, given which questions were answered with yes, bool ``[N, Q]``."""

    @property
    def patches(self) -> int:
        """Tokens of an image's side."""
        return self.grid * self.cell

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float(self.steps * self.batch)
        return [
            WorkUnit(
                self.key, f"{arm.key}/{seed}", cost, f"{arm.key}: training {seed + 1}", {"arm": arm.key, "seed": seed}
            )
            for seed in run.seeds
            for arm in run.arms
        ]

    def guard(self, run: RunContext) -> None:
        """Refuse a baseline that is not the model as it is, and arms that do not place images."""
        for arm in run.arms:
            if wrong := [s.spec for s in arm.strategies if not isinstance(s, ImagePositions)]:
                raise UserError(f"{self.name} trains models that read images, on which {wrong[0]} does not act")
        vlm = self.fresh(run, run.seeds[0])
        batch = vlm.batch(self._drawn(run, vlm, 2, 1, "train", part="guard"))
        with torch.no_grad():
            plain = answer_logits(vlm.model, batch)
            with self._under(run.baseline, vlm):
                changed = (answer_logits(vlm.model, batch) - plain).abs().max()
        if not bool(changed <= _SAME * plain.abs().max()):
            raise UserError(
                f"the baseline {run.baseline.key} changes the model; every arm is compared with it as it is"
            )

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, seed = run.arm_of(unit), unit.params["seed"]
        vlm = self.fresh(run, seed)

        state = self._trained(run, arm, vlm, seed)
        with self._under(arm, vlm):
            found = [(times, *self._said(run, vlm, times)) for times in self.times]
        tail = state.losses[-max(1, len(state.losses) // 10) :]
        about = {"seconds": state.seconds, "losses": [round(x, 3) for x in state.losses[:: max(1, self.steps // 16)]]}
        yield self.row("training_nll", arm, sum(tail) / len(tail), "training", seed=seed, about=about)
        for times, asked, yes in found:
            at = {"times": times}
            for i, (said, truth) in enumerate(zip(yes.tolist(), asked.truth.tolist(), strict=True)):
                for j, (answer, there) in enumerate(zip(said, truth, strict=True)):
                    yield self.row("right", arm, answer == there, f"{i}.{j}", context=f"{i}", seed=seed, at=at)
                    yield self.row("said_yes", arm, answer, f"{i}.{j}", context=f"{i}", seed=seed, at=at)
            hits = float((yes & asked.truth).sum())
            f1 = 2 * hits / max(1.0, float(yes.sum() + asked.truth.sum()))
            yield self.row("f1", arm, f1, "all", seed=seed, at=at)
            yield from self.judged(arm, seed, times, asked, yes)

    def _trained(self, run: RunContext, arm: Arm, vlm: JoinedVLM, seed: int) -> TrainState:
        """Train under an arm; all arms of a seed read the same texts in the same order."""

        def train(get_batch: Callable[[int], dict[str, Tensor]], replayed: bool = False) -> TrainState:
            return train_answers(
                vlm.model, get_batch, self.steps, lr=self.lr, slower=self.slower, replayed=replayed,
                on_step=lambda _: run.advance(self.batch),
            )  # fmt: skip

        if not self.pool:
            with self._under(arm, vlm):
                return train(
                    lambda step: vlm.batch(self._drawn(run, vlm, self.batch, 1, "train", training=seed, step=step))
                )
        pool: ImagePool = run.kept_last("pool", (self, seed), lambda: ImagePool.of(vlm, self._parts(run, vlm, seed)))
        order = run.torch_rng(task=self.key, training=seed, part="order")
        rows = orders(len(pool), self.steps, self.batch, order, run.device)
        return train(lambda step: pool.batch(rows[step], arm.strategies), run.device.type == "cuda")

    def _parts(self, run: RunContext, vlm: JoinedVLM, seed: int) -> Iterator[dict[str, Tensor]]:
        """The texts of a pool."""
        for start in range(0, self.pool, _DRAWN):
            count = min(_DRAWN, self.pool - start)
            yield vlm.batch(self._drawn(run, vlm, count, 1, "train", training=seed, pool=start))

    def _said(self, run: RunContext, vlm: JoinedVLM, times: int) -> tuple[Questions, Tensor]:
        """The test's texts, and which questions are answered with yes."""
        parts: list[Questions] = run.kept(("judged", self, times), lambda: [
            self._drawn(run, vlm, min(self.at_once, self.samples - start), times, "test", part="test", behind=times,
                        start=start)
            for start in range(0, self.samples, self.at_once)
        ])  # fmt: skip
        no, yes = vlm.language.answers
        with torch.no_grad():
            logits = [answer_logits(vlm.model, vlm.batch(part)) for part in parts]
        said = torch.cat([x[..., yes] > x[..., no] for x in logits]).cpu()
        truth, cells = (torch.cat([getattr(part, name) for part in parts]) for name in ("truth", "cells"))
        first = parts[0]
        return Questions(first.ids, first.real, first.images, first.at, truth, cells), said

    def _drawn(self, run: RunContext, vlm: JoinedVLM, count: int, times: int, split: Split, **axes: Any) -> Questions:
        return self.questions(vlm, count, run.torch_rng(task=self.key, **axes), times * self.filler, split)

    def _under(self, arm: Arm, vlm: JoinedVLM) -> AbstractContextManager[Any]:
        return use(vlm.model, *arm.strategies) if arm.strategies else nullcontext()
