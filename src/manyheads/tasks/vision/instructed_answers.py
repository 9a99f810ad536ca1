# SPDX-License-Identifier: Apache-2.0
"""A model that reads images is told in which words to answer, sees an image, and is asked what is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from ... import use
from ...data.object_scenes import draw_pictures
from ...data.visual_questions import FORMATS, INSTRUCTED_WORDS, Instructed, instructed
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...models.image_pool import ImagePool, fit_projector, orders
from ...models.joined_vlm import JoinedVLM
from ...reducing import ImageHiding, ImageReducer
from ...training.answers import answer_logits, train_answers
from ._models import VLMTask

__all__ = ["InstructedAnswers"]

_DRAWN = 128  # texts of a pool that are drawn at once


@dataclass(frozen=True, kw_only=True)
class InstructedAnswers(VLMTask):
    """One training for each seed, without any strategy; every arm then answers the same questions about new pictures.

    An answer is the likeliest of all words. It is in the right words if it is one of the two that the instruction
    before the image names, right in content if it means what is true in the words of any format, and right if both.

    Attributes:
        grid: cells of an image's side.
        cell: patches of a cell's side.
        asked: questions of a text.
        filler: words between image and questions in training.
        batch: texts of a step.
        steps: of a training.
        lr: highest learning rate.
        times: multiples of ``filler`` at which arms are judged.
        near: arms that are judged at the first multiple alone.
        samples: texts that are judged.
        at_once: texts judged at once.
    """

    words = INSTRUCTED_WORDS
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("followed", "answers in the words asked for", higher=True, kind="share", floor=1 / len(FORMATS)),
        Metric("content", "answers that are true, in any words", higher=True, kind="share", floor=0.5),
        Metric("right", "answers that are true, in the words asked for", higher=True, kind="share",
               floor=0.5 / len(FORMATS)),
        Metric("read", "tokens of an image that the decoder is given", "tokens"),
        Metric("training_nll", "loss in the last tenth of training", "nats/answer"),
    )  # fmt: skip

    grid: int = 6
    cell: int = 1
    asked: int = 8
    filler: int = 8
    batch: int = 16
    steps: int = 800
    lr: float = 5e-3
    times: tuple[int, ...] = (1,)
    near: tuple[str, ...] = ()
    samples: int = 256
    at_once: int = 32

    @property
    def patches(self) -> int:
        return self.grid * self.cell

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float(self.steps + len(run.arms) * len(self.times))
        return [
            WorkUnit(self.key, f"{seed}", cost, f"{self.key}: training {seed + 1}", {"seed": seed})
            for seed in run.seeds
        ]

    def guard(self, run: RunContext) -> None:
        """Refuse arms that do not act on images of a model that is trained already."""
        for arm in run.arms:
            if wrong := [s.spec for s in arm.strategies if not isinstance(s, ImageReducer | ImageHiding)]:
                raise UserError(f"{self.name} compares strategies on the tokens of images, which {wrong[0]} is not")

    def pictures(self, vlm: JoinedVLM, count: int, generator: Generator) -> tuple[Tensor, Tensor, int, int]:
        drawn = draw_pictures(count, generator, grid=self.grid, size=self.cell * vlm.patch)
        return drawn.images, drawn.cells, self.grid, self.cell

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        seed = int(unit.params["seed"])
        vlm = self.fresh(run, seed)
        losses = self._train(run, vlm, seed)
        vlm.model.eval()
        tail = losses[-max(1, len(losses) // 10) :]
        yield self.row("training_nll", run.baseline, sum(tail) / len(tail), "training", seed=seed)
        for times in self.times:
            texts = [
                self._drawn(run, vlm, min(self.at_once, self.samples - start), "test", times, part="test", start=start)
                for start in range(0, self.samples, self.at_once)
            ]
            for arm in run.arms:
                if times == self.times[0] or arm.key not in self.near:
                    yield from self._judged(arm, vlm, texts, seed, times)
                run.advance(1.0)

    def _train(self, run: RunContext, vlm: JoinedVLM, seed: int) -> list[float]:
        def train(get_batch: Callable[[int], dict[str, Tensor]], replayed: bool = False) -> list[float]:
            return train_answers(
                vlm.model, get_batch, self.steps, lr=self.lr, slower=0.25 if self.model == "joined" else 1.0,
                replayed=replayed, on_step=lambda _: run.advance(1.0),
            ).losses  # fmt: skip

        def read(count: int, **axes: int) -> dict[str, Tensor]:
            text = self._drawn(run, vlm, count, "train", training=seed, **axes)
            return vlm.read(text, text.at, text.answers)

        if not self.pool:
            return train(lambda step: read(self.batch, step=step))
        parts = [min(_DRAWN, self.pool - start) for start in range(0, self.pool, _DRAWN)]
        pool = ImagePool.of(vlm, (read(count, pool=i) for i, count in enumerate(parts)))
        if not self.align and self.model != "small":
            fit_projector(vlm, pool.features)
        order = run.torch_rng(task=self.key, training=seed, part="order")
        rows = orders(len(pool), self.steps, self.batch, order, run.device)
        return train(lambda step: pool.batch(rows[step]), run.device.type == "cuda")

    @torch.no_grad()
    def _judged(self, arm: Arm, vlm: JoinedVLM, texts: list[Instructed], seed: int, times: int = 1) -> Iterator[Row]:
        counts: list[int] = []

        def count(decoder: Any, args: Any, kwargs: dict[str, Any]) -> None:
            counts.append(kwargs["inputs_embeds"].shape[1])

        number = 0
        for text in texts:
            batch = vlm.read(text, text.at, text.answers)
            with use(vlm.model, *arm.strategies) if arm.strategies else nullcontext():
                handle = vlm.model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
                said = answer_logits(vlm.model, batch).argmax(-1).cpu()
                handle.remove()
            left = self.patches**2 - (text.ids.shape[1] - counts[-1])
            means = (said[..., None, None] == text.tokens).any(2)  # [N, Q, no or yes], in any format
            mine = (said[..., None] == text.tokens[text.formats][:, None]).any(-1)
            true = means.gather(-1, text.truth.long()[..., None])[..., 0]
            for i in range(len(said)):
                about: dict[str, Any] = {"context": f"{number}", "seed": seed, "at": {"times": times}}
                yield self.row("read", arm, left, f"{number}", **about)
                for j in range(said.shape[1]):
                    values = {"followed": mine[i, j], "content": true[i, j], "right": mine[i, j] & true[i, j]}
                    for name, value in values.items():
                        yield self.row(name, arm, float(value), f"{number}.{j}", **about)
                number += 1

    def _drawn(
        self, run: RunContext, vlm: JoinedVLM, count: int, split: Any, times: int = 1, **axes: Any
    ) -> Instructed:  # fmt: skip
        return instructed(
            vlm.language, count, run.torch_rng(task=self.key, **axes), grid=self.grid, size=self.cell * vlm.patch,
            patches=self.patches, asked=self.asked, filler=times * self.filler, split=split,
        )  # fmt: skip
