# SPDX-License-Identifier: Apache-2.0
"""Labels of the words of generated forms, by page encoders of each arm trained from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ...data.forms import FIELDS, LABELS, ORDERS, WORDS, Form, form, stacked
from ...errors import UserError
from ...experiment import Arm, Metric, Row, RunContext
from ...models.decoder import TokenModel
from ...models.page import PageConfig, PageEncoder
from ...training import BatchFn
from ...training.fit import autocast
from ...training.language import with_auxiliary
from ._decoders import check_rows
from ._training_task import TrainingTask, at_once

__all__ = ["VALUE", "FormLabels", "judged_forms"]

VALUE = LABELS.index(FIELDS[0])  # and higher: words of values, by their field
_LABELLED = 17.6  # words of a form that are no running text, in the mean


@dataclass(frozen=True, kw_only=True)
class FormLabels(TrainingTask):
    """Train an encoder of every arm to name the label of each word of a form: title, key, value of a field, or other.

    Forms are those of :mod:`manyheads.data.forms`, ``length`` words each, drawn anew for every batch, in all four
    orders of words; as many of each order are judged. ``accuracy`` is of all words of a page, ``value_accuracy`` of the
    words of its values, of which only the key says which field they are of. A page is a context for intervals.

    The floor of ``value_accuracy`` is one field of four, that of ``accuracy`` the share of running text.
    """

    stored: ClassVar[str] = "forms-"
    kind: ClassVar[type[TokenModel]] = PageEncoder
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", "words labelled right", higher=True, kind="share", floor=0.6),
        Metric("value_accuracy", "words of values labelled right", higher=True, kind="share", floor=0.25),
        Metric("tuning_nll", "loss on what is set aside for tuning, nats/word", "nats/word"),
        Metric("training_nll", "loss in the last tenth of training, nats/word", "nats/word"),
    )

    length: int = 48
    samples: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 2:
            raise UserError("whether pages see each other is tried on two of a batch: give a batch of 2 or more")
        if self.samples % len(ORDERS):
            raise UserError(f"as many forms of each of {len(ORDERS)} orders are judged: give samples that they part")

    @property
    def stated(self) -> tuple[Metric, ...]:
        return self.floored(**{self.metrics[0].name: 1 - _LABELLED / self.length})

    @property
    def vocab(self) -> int:
        return len(WORDS)

    @property
    def config(self) -> PageConfig:
        return PageConfig(self.vocab, self.dim, self.layers, self.heads, length=self.length, labels=len(LABELS))

    def batches(self, run: RunContext, seed: int) -> BatchFn[tuple[Tensor, Tensor | None]]:
        def drawn(step: int) -> tuple[Tensor, Tensor]:
            rng = run.rng(training=seed, step=step)
            forms = [form(rng, self.length) for _ in range(self.batch)]
            return stacked(forms), torch.stack([each.labels for each in forms])

        # the arms of a seed follow each other, and drawing takes longer than a step on a GPU
        held: dict[int, tuple[Tensor, Tensor]] = run.kept_last("forms", (seed, self.length, self.batch), dict)

        def get_batch(step: int) -> tuple[Tensor, Tensor]:
            if step not in held:
                held[step] = drawn(step)
            return held[step]

        return get_batch

    def check(self, model: TokenModel, ids: Tensor, name: str) -> None:
        check_rows(model, ids, name)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        ids, labels = batch
        return with_auxiliary(cross_entropy(model(ids)[0].float().flatten(0, 1), labels.flatten()), model)

    def validation(self, run: RunContext, model: TokenModel) -> float:
        forms = judged_forms(run, "validation", self.samples, self.length)
        labels = torch.stack([each.labels for each in forms])
        return float(cross_entropy(_logits(run, model, forms).flatten(0, 1), labels.flatten()))

    def rows(self, run: RunContext, arm: Arm, seed: int, model: TokenModel) -> Iterator[Row]:
        forms = judged_forms(run, "test", self.samples, self.length)
        said = _logits(run, model, forms).argmax(-1)
        for i, (each, found) in enumerate(zip(forms, said, strict=True)):
            right = (found == each.labels).float()
            more: dict[str, Any] = {"seed": seed, "at": {"order": each.order}}
            yield self.row("accuracy", arm, right.mean(), f"{i}", **more)
            yield self.row("value_accuracy", arm, right[each.labels >= VALUE].mean(), f"{i}", **more)


def judged_forms(run: RunContext, part: str, count: int, length: int) -> list[Form]:
    """``count`` forms of a part of the data, ``validation`` or ``test``, as many of each order in turn."""

    def make() -> list[Form]:
        rng = run.rng(forms=part, length=length)
        return [form(rng, length, ORDERS[i % len(ORDERS)]) for i in range(count)]

    return cast(list[Form], run.kept(("forms", part, count, length), make))


def _logits(run: RunContext, model: nn.Module, forms: list[Form]) -> Tensor:
    """``[N, T, labels]`` in float32 on the CPU."""
    found = []
    for rows in stacked(forms).split(at_once(len(forms[0].words))):
        with torch.no_grad(), autocast(run.device):
            found.append(model(rows.to(run.device))[0].float().cpu())
    return torch.cat(found)
