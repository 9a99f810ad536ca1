# SPDX-License-Identifier: Apache-2.0
"""What a decoder says of texts after it was made an encoder and trained on a task, under every arm."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...conversion import Drop, EncoderDesign, SurgeryPlan
from ...data.encoder_tasks import TASKS, EncoderTask, encoder_task
from ...errors import UserError, refusal
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit, seeding
from ...models.text_encoder import TextEncoder
from ...training.encoding import Kind, class_loss, list_loss, score_loss, tune
from ._text_task import model_of

__all__ = ["EncoderTuning", "cut", "encoder_for"]

_LOSSES = {"classes": class_loss, "scores": score_loss, "lists": list_loss}


@dataclass(frozen=True, kw_only=True)
class EncoderTuning(Task):
    """Train the encoder of every arm on one task from the same examples, and judge it on the test part.

    The strategy of an arm makes an encoder. In place of one, the option ``encoder`` names a published encoder, whose
    last states are averaged. The option ``train`` is ``all``, ``lora`` or ``head`` where it is not the task's: what is
    trained. The seed draws examples, their order, heads and dropout; what is tested is the same for all.

    Attributes:
        data: a task of :mod:`manyheads.data.encoder_tasks`.
        train: what is trained: ``all`` weights, adapters (``lora``), or pooler and ``head``.
        examples: that are trained on; 0 for all.
        samples: that are tested.
        steps, batch: of the training, and examples of a step.
        lr, head_lr: highest rates of the model and of pooler and head; ``lora_lr`` of adapters.
        layers: lowest ones of the model that are kept; 0 for all.
        length: tokens of a text at most.
        only: names of the arms that are measured; all when empty.
        label: what it is called where an experiment has it several times.
    """

    subject: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("accuracy", "accuracy on the test part", higher=True, kind="share"),
        Metric("label_nll", "loss on the test part, nats/text", "nats/text"),
        Metric("squared_error", "squared error of the score, which a constant has 1 of", floor=1.0),
        Metric("reciprocal_rank", "reciprocal rank of the relevant document", higher=True, kind="share"),
        Metric("training_loss", "loss in the last quarter of the training"),
    )

    data: str = "snips"
    train: Kind = "all"
    examples: int = 0
    samples: int = 500
    steps: int = 200
    batch: int = 16
    lr: float = 5e-5
    head_lr: float = 1e-3
    lora_lr: float = 1e-3
    layers: int = 0
    length: int = 128
    only: tuple[str, ...] = ()
    label: str = ""

    @property
    def stated(self) -> tuple[Metric, ...]:
        return self.floored(accuracy={"snips": 124 / 700, "sick_entailment": 2793 / 4927}.get(self.data, 0.0))

    def __post_init__(self) -> None:
        if self.data not in TASKS or self.train not in ("all", "lora", "head"):
            raise UserError(f"data is {', '.join(TASKS)}, and train is all, lora or head")
        if min(self.steps, self.batch, self.samples, self.length) < 1 or min(self.examples, self.layers) < 0:
            raise UserError("steps, batch, samples and length are 1 or more, examples and layers 0 or more")

    def unsupported_reason(self, run: RunContext) -> str | None:
        return refusal(lambda: self._task(run))

    def units(self, run: RunContext) -> list[WorkUnit]:
        arms = [arm for arm in run.arms if not self.only or arm.name in self.only]
        cost = float(self.steps * self.batch * (8 if self.data == "cranfield" else 1))
        return [
            WorkUnit(
                self.key, f"{arm.key}/{seed}", cost, f"{arm.key}: {self.key}, training {seed + 1}",
                {"arm": arm.key, "seed": seed},
            )
            for seed in run.seeds for arm in arms
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm, seed, task = run.arm_of(unit), unit.params["seed"], self._task(run)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeding.number(run.seed, head=seed))
            encoder = encoder_for(run, arm, self.layers, task.outputs, self.length)
            state = self._tuned(run, encoder, task, seed, arm.options.get("train", self.train))
        late = state.losses[-max(1, self.steps // 4) :]
        yield self.row("training_loss", arm, sum(late) / len(late), f"training {seed}", seed=seed)
        for i, values in zip(task.test[: self.samples], self._judged(encoder, task), strict=True):
            for metric, value in values.items():
                yield self.row(metric, arm, value, task.names[i], seed=seed)

    def _tuned(self, run: RunContext, encoder: TextEncoder, task: EncoderTask, seed: int, train: Kind) -> Any:
        drawn = run.rng(examples=seed).permutation(task.train)[: self.examples or None]

        def get_batch(step: int) -> tuple[dict[str, Tensor], Tensor]:
            some = run.rng(training=seed, step=step).choice(drawn, self.batch, replace=False).tolist()
            targets = torch.tensor([task.targets[i] for i in some], device=run.device)
            return encoder.read(_texts(task, some)), targets

        return tune(
            encoder, get_batch, _LOSSES[task.kind], self.steps, lr=self.lora_lr if train == "lora" else self.lr,
            head_lr=self.head_lr, train=train, on_step=lambda _: run.advance(float(self.batch)),
        )  # fmt: skip

    def _judged(self, encoder: TextEncoder, task: EncoderTask) -> Iterator[dict[str, float]]:
        chosen = task.test[: self.samples]
        said = encoder.predict(_texts(task, chosen))
        if task.kind == "lists":
            for scores, i in zip(said[:, 0].split([len(task.targets[i]) for i in chosen]), chosen, strict=True):
                good = torch.tensor(task.targets[i]) > 0
                yield {"reciprocal_rank": 1 / (1 + int((scores > scores[good].max()).sum()))}
            return
        wanted = torch.tensor([task.targets[i] for i in chosen])
        if task.kind == "scores":
            yield from ({"squared_error": float(x)} for x in (said[:, 0] - wanted).square())
            return
        losses = cross_entropy(said, wanted, reduction="none")
        for right, loss in zip((said.argmax(1) == wanted).tolist(), losses.tolist(), strict=True):
            yield {"accuracy": float(right), "label_nll": loss}

    def _task(self, run: RunContext) -> EncoderTask:
        key = ("encoder task", self.data)
        return cast(EncoderTask, run.kept(key, lambda: encoder_task(self.data, run.rng(task=self.data))))


def encoder_for(run: RunContext, arm: Arm, layers: int, outputs: int, length: int) -> TextEncoder:
    """The encoder of an arm with weights of its own, in float32; a published one where the arm's options name it."""
    from ...converter import encoder_of
    from ...models import load_reader

    if (name := arm.options.get("encoder")) is not None:
        model, tokenizer = run.kept(("reader", name), lambda: load_reader(name, run.device, torch.float32))
        design = EncoderDesign(
            pooler="manyheads.convert._poolers:Mean", hidden=int(model.config.hidden_size), dropout=0.1
        )
        return TextEncoder(copy.deepcopy(model), tokenizer, design, outputs, length)
    lm: Any = run.subject
    found = encoder_of(
        cut(model_of(run), layers), lm.tokenizer, cast(Any, arm.strategy), outputs=outputs, length=length
    )
    found.model = copy.deepcopy(found.model)
    return found


def cut(model: Any, layers: int) -> Any:
    """A model's lowest ``layers``, weights shared; all of them for 0."""
    from ...integrations.surgery import converted

    above = tuple(range(layers, int(model.config.num_hidden_layers)))
    return converted(model, SurgeryPlan((Drop(part="block", layers=above),))) if layers and above else model


def _texts(task: EncoderTask, some: Sequence[int]) -> list[Any]:
    return [text for i in some for text in (task.texts[i] if task.kind == "lists" else [task.texts[i]])]
