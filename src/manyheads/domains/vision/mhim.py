# SPDX-License-Identifier: Apache-2.0
r"""MHIM-MIL: multiple instance learning with masked hard instance mining (arXiv 2307.15254).

A slide is a bag of patches with one label. Attention soon lies on the few instances that are easy to tell, and what is
hard is never learned. Here a teacher, whose weights are a moving average of the student's, reads the whole bag; the
instances that it attends to most are hidden from the student, which has to tell the bag by the others:

    s          = scores of the teacher (attention; of DSMIL the highest logit of an instance), by head
    hidden     = of the ceil(h' N / share) highest s a random ceil(h' N),   h' = h (1 + cos(pi t)) / 2, t from 0 to 1
                 + the ceil(l N) lowest s + a random ceil(r N); unions. With several heads each marks its k highest
                 (lowest), and those with the most marks are taken, by their mean score where marks are equal
    loss       = CE(student(rest), y) + weight KL(softmax(z_t / T) || softmax(z_s))
    teacher    = m teacher + (1 - m) student, after each step

z_t and z_s are the bag's vectors before the classifier, ``[B, S]``, the teacher's without gradient. The paper writes
the cross-entropy of the two, which has the same gradient; KL is 0 where both agree. Both are in training mode, with
dropout, as in the released code. First the base model is trained for ``before`` times the steps: it becomes the
teacher, and the student starts with its layer over instances (``initial``). That costs another training; an arm with
nothing hidden has the same steps. ``random=0,high=0,weight=0,before=0,initial=all`` is the base model's training.

Defaults are those of CAMELYON-16 with ABMIL, for 10^4 instances a bag and 5 10^4 steps: with few steps the teacher
moves only with a ``momentum`` below them, and ``high`` times N should stay below the number of positive instances. A
bag of which nothing would be left is not masked. The student reads the rest alone, packed, which is what makes a step
cheaper. It is what is used afterwards, or the teacher (``use``). What takes the base model's place is any model with
``read(inputs [B, N, F], mask [B, N]) -> (logits, state, scores [B, H, N])``. Left out: the second version's
(2509.11526) scores by class and its global queries that stand for hidden instances.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from ...recipe import Batch, FieldTask, Picture, Recipe

__all__ = ["Mhim", "Taught", "consistency", "kept", "packed"]

Share = Annotated[float, Field(ge=0, lt=1)]
_SHOWN = 8  # bags of the picture


class Taught(nn.Module):
    """A student beside its teacher, which learns by no gradient; ``progress`` of the training, from 0 to 1."""

    progress: Tensor

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.register_buffer("progress", torch.zeros(()))


@dataclass(frozen=True, kw_only=True)
class Mhim(Recipe):
    """Trains a bag's model on instances that a momentum teacher finds hard."""

    task: ClassVar[str] = "bag_labels"

    base: Literal["abmil", "gated_abmil", "bag_transformer", "dsmil"] = field(
        default="abmil", metadata={"help": "the model that is trained, with attention over instances"}
    )
    high: Share = field(default=0.01, metadata={"help": "share of the most attended instances that is hidden, h"})
    share: Annotated[float, Field(gt=0, le=1)] = field(
        default=0.5, metadata={"help": "of the most attended, the share that is hidden, at random"}
    )
    by: Literal["teacher", "random"] = field(
        default="teacher", metadata={"help": "what high and low go by: the teacher's scores, or none, as a control"}
    )
    decay: bool = field(default=True, metadata={"help": "high falls to 0 in the course of the training"})
    low: Share = field(default=0.0, metadata={"help": "share of the least attended instances that is hidden, l"})
    random: Share = field(default=0.5, metadata={"help": "share of instances that is hidden at random, r"})
    weight: float = field(default=0.1, metadata={"help": "of the consistency with the teacher"})
    temperature: Annotated[float, Field(gt=0)] = field(default=0.1, metadata={"help": "of the teacher's vector, T"})
    momentum: Annotated[float, Field(ge=0, le=1)] = field(default=0.9999, metadata={"help": "of the teacher, m"})
    rising: bool = field(default=False, metadata={"help": "the momentum rises to 1 in the course of the training"})
    before: Annotated[float, Field(ge=0)] = field(
        default=1.0, metadata={"help": "steps of the base model that is trained before, in those of the training"}
    )
    initial: Literal["features", "all"] = field(
        default="features", metadata={"help": "what the student takes of it: its layer over instances, or all"}
    )
    use: Literal["student", "teacher"] = field(default="student", metadata={"help": "what is used after training"})

    def build(self, task: FieldTask, width: int) -> nn.Module:
        return task.reference(width, self.base)

    def start(self, task: FieldTask, model: nn.Module, fit: Any) -> None:
        if steps := round(self.before * task.steps):  # type: ignore[attr-defined]
            samples = task.samples("train")
            fit(model, lambda rng: self.batches(task, rng, samples), task.loss, steps)

    def learner(self, task: FieldTask, model: nn.Module, width: int) -> Taught:
        teacher = copy.deepcopy(model)
        if self.initial == "features":
            held, fresh = model.state_dict(), self.build(task, width).state_dict()
            model.load_state_dict(
                {name: held[name] if name.startswith("features.") else x for name, x in fresh.items()}
            )
        return Taught(model, teacher)

    def loss(self, task: FieldTask, model: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(model, Taught)
        student: Any = model.student
        teacher: Any = model.teacher
        inputs, mask, scores, state = batch["inputs"], batch["mask"], None, None
        if self.high or self.low or self.weight:
            with torch.no_grad():
                _, state, scores = teacher.read(inputs, mask)
            if self.by == "random":
                scores = torch.rand_like(scores)
        high = self.high * (1 + (math.pi * model.progress).cos()) / 2 if self.decay else self.high
        rest = kept(scores, mask, high=high, share=self.share, low=self.low, random=self.random)
        read = student.read(*packed(inputs, rest))
        loss = cross_entropy(read.logits.float(), batch["targets"])
        if self.weight and state is not None:
            loss = loss + self.weight * consistency(state.float(), read.state.float(), self.temperature)
        return loss

    @torch.no_grad()
    def after_step(self, model: nn.Module, progress: float) -> None:
        """The teacher follows; at the end it takes the student's place where it is to be used."""
        assert isinstance(model, Taught)
        before = float(model.progress)
        rest = (1 - self.momentum) * ((1 + math.cos(math.pi * before)) / 2 if self.rising else 1.0)
        for own, other in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            own.lerp_(other, rest)
        model.progress.fill_(progress)
        if progress >= 1 and self.use == "teacher":
            model.student.load_state_dict(model.teacher.state_dict())

    def pictures(self, model: Any, batch: Batch) -> Sequence[Picture]:
        """What instances of the first bags count, each bag's largest score as 1: attention, or its odds against it."""
        scores = model.read(batch["inputs"], batch["mask"]).scores.float().mean(1)[:_SHOWN]
        if self.base == "dsmil":  # logits: as odds against the highest
            scores = scores.exp()
        longest = int(batch["mask"][: len(scores)].sum(1).max())
        values = (scores / scores.max(1, keepdim=True).values)[:, :longest].cpu()
        values = values.masked_fill(~batch["mask"][: len(values), :longest].cpu(), math.nan)
        columns = [str(i) for i in range(longest)]
        return (Picture("what instances of a bag count", batch["names"][: len(values)], columns, values.tolist(), (
            "bags", "instances, the highest of a bag is 1")),)  # fmt: skip


def consistency(taught: Tensor, said: Tensor, temperature: float) -> Tensor:
    """Mean of ``KL(softmax(taught / T) || softmax(said))`` over vectors ``[B, S]``; ``taught`` gets no gradient."""
    wanted = (taught.detach() / temperature).log_softmax(-1)
    return kl_div(said.log_softmax(-1), wanted, reduction="batchmean", log_target=True)


def kept(
    scores: Tensor | None, mask: Tensor, *, high: Tensor | float, share: float = 1.0, low: float = 0.0,
    random: float = 0.0,
) -> Tensor:  # fmt: skip
    """Instances that the student reads, bool ``[B, N]``.

    Args:
        scores: of the teacher, ``[B, H, N]``; None where nothing goes by them.
        mask: True where an instance is, ``[B, N]``; at least one of each bag.
        high, low, random: shares of instances that are hidden: of the most and of the least attended, and of all.
        share: of the candidates for ``high``, the part that is hidden; the others of them are drawn at random to stay.
    """
    count = mask.sum(1)

    def number(ratio: Tensor | float) -> Tensor:
        exact = count.double() * ratio
        return (exact - 1e-6).ceil().clamp(min=0).long()  # a product that should be whole may lie above it by rounding

    hidden = torch.zeros_like(mask)
    if scores is not None:
        wide = _highest(scores, mask, torch.minimum(number(high / share), count))
        if share < 1:
            drawn = torch.rand(mask.shape, device=mask.device).masked_fill(~wide, -1.0)
            wide = wide & (_places(drawn, mask) < number(high)[:, None])
        hidden = wide | _highest(-scores, mask, number(low))
    if random:
        drawn = torch.rand(mask.shape, device=mask.device)
        hidden = hidden | (_places(drawn, mask) < number(random)[:, None])
    rest = mask & ~hidden
    return torch.where(rest.any(1, keepdim=True), rest, mask)


def _places(values: Tensor, mask: Tensor) -> Tensor:
    """Place of each along the last axis, 0 for the highest; the first of equal ones before, and absent ones last."""
    order = values.masked_fill(~mask, -math.inf).sort(dim=-1, descending=True, stable=True).indices
    return order.argsort(-1)


def _highest(scores: Tensor, mask: Tensor, many: Tensor) -> Tensor:
    """The ``many [B]`` instances that most heads have among their ``many`` highest, bool ``[B, N]``."""
    votes = (_places(scores, mask[:, None]) < many[:, None, None]).sum(1)
    mean = _places(scores.masked_fill(~mask[:, None], 0.0).mean(1), mask)
    return mask & (_places(votes - mean / (mean.shape[1] + 1), mask) < many[:, None])


def packed(inputs: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
    """Instances where ``rest [B, N]`` is True, in their order, before padding; and the mask of that."""
    order = rest.long().sort(dim=1, descending=True, stable=True).indices[:, : int(rest.sum(1).max())]
    return inputs.gather(1, order[..., None].expand(-1, -1, inputs.shape[-1])), rest.gather(1, order)
