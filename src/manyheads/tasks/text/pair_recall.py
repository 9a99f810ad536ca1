# SPDX-License-Identifier: Apache-2.0
"""Recall of key-value pairs, each needed once: whatever a cache forgets is a wrong answer, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from ...errors import UserError
from ...experiment import seeding
from ...experiment.rows import Metric, Row, WorkUnit
from ...experiment.task import RunContext, Task
from ...integrations import use
from ._prefill import Prefix, forward_chunked

__all__ = ["PairRecall"]

PAIRS = 100  # that the fixture was trained to recall
_KEYS, _VALUES = (8, 128), (128, 256)  # its tokens
_BATCH = 64  # sequences of a unit


@dataclass(frozen=True, kw_only=True)
class PairRecall(Task):
    """Share of the values that are the likeliest token after their key, of each sequence.

    The model is RECALL, the fixture that ships: the subject itself if it is that, and beside any other subject, for
    bare token ids are no language of other models. A figure of it is the fixture's, never the subject's.

    Attributes:
        asked: pairs that are asked for, in another order than they were given.
        others: pairs between them that are not.
        distinct: so many of the others, over and over; 0 if they all differ.
        known: tokens of the questions that are read before compression.
        start: tokens read at once; the others stream in behind them. 0 reads all pairs, and compresses then.
        piece: tokens fed at once.
        sequences: how many.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("recalled", "pairs recalled", higher=True, kind="share", floor=0.5),
    )

    asked: int = PAIRS
    others: int = 0
    distinct: int = 0
    known: int = 0
    start: int = 0
    piece: int = 20
    sequences: int = 64
    label: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.asked <= self.asked + self.others <= PAIRS:
            raise UserError(f"the fixture recalls up to {PAIRS} pairs, asked and others, at least one of them asked")
        if self.known % 2 or not 0 <= self.known < 2 * self.asked or self.piece < 2 or self.piece % 2:
            raise UserError("known and piece count tokens of whole pairs, known fewer than are asked, piece at least 2")
        if not 0 <= self.start <= 2 * (self.asked + self.others) or not 0 <= self.distinct <= max(self.others, 0):
            raise UserError("start lies within the pairs, and distinct within the others")

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = 4.0 * (self.asked + self.others) * len(run.arms) / 50  # a fiftieth of the default model's
        return [
            WorkUnit(self.key, f"{first}", cost * (last - first), self.name, {"first": first, "last": last})
            for first in range(0, self.sequences, _BATCH)
            if (last := min(self.sequences, first + _BATCH))
        ]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        first, last = unit.params["first"], unit.params["last"]
        model = _fixture(run)
        with torch.inference_mode(), use(model):
            context, asked = (x.to(run.device) for x in self._drawn(run, first, last))
            whole = torch.cat([context, asked], 1)
            read = self.start or context.shape[1] + self.known
            judged = asked[:, self.known + 1 :: 2]
            prefix = Prefix(model, whole[:, :read], run.arms)
            for arm in run.arms:
                with prefix.open(arm) as cache:
                    fed = whole[:, read:-1]
                    logits = forward_chunked(model, cache, fed, asked.shape[1] - self.known - 1, self.piece)
                    held = cache.bytes() / (last - first)
                right = logits[:, ::2].argmax(-1) == judged  # a key stands here, its value comes next
                for i, value in enumerate(right.float().mean(1).tolist(), first):
                    yield self.row("recalled", arm, value, f"{i}", bytes=held)
                run.advance(unit.cost / len(run.arms))

    def _drawn(self, run: RunContext, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The pairs in random order, and the asked ones in another: ``[B, 2 (asked + others)]``, ``[B, 2 asked]``."""
        generator = seeding.torch_generator(run.seed, sequences="pairs", first=first)
        count = self.asked + self.others
        keys = torch.rand(last - first, _KEYS[1] - _KEYS[0], generator=generator).argsort(1)[:, :count] + _KEYS[0]
        drawn = torch.stack([keys, torch.randint(*_VALUES, keys.shape, generator=generator)], -1)
        asked, others = drawn[:, : self.asked], drawn[:, self.asked :]
        if self.distinct:
            others = others[:, torch.arange(self.others) % self.distinct]
        return _mixed(torch.cat([asked, others], 1), generator), _mixed(asked, generator)


def _mixed(x: Tensor, generator: Generator) -> Tensor:
    order = torch.rand(x.shape[:2], generator=generator).argsort(1)
    return x.gather(1, order[..., None].expand_as(x)).flatten(1)


def _fixture(run: RunContext) -> Any:
    from ...experiment.subjects import CausalLM
    from ...models import load_recall

    if isinstance(run.subject, CausalLM) and run.subject.name == "recall":
        return run.subject.model
    return run.kept("RECALL", lambda: load_recall(run.device, torch.float32))
