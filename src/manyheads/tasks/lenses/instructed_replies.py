# SPDX-License-Identifier: Apache-2.0
"""How often a reply follows its instruction as a real dialogue grows, and how much the reply attends to it.

The instruction stands in the system message, and the dialogue where an arm's layout puts it, its option ``form``: at
all numbers of turns under the baseline's (standard), at the greatest under the others. Of replies of one meaning, each
written as one of the instructions asks, the one whose log-likelihood gains most by the instruction has to be its own:
gain is that over the mean under all instructions, so that neither a likely reply nor a rare one wins by itself. The
attention of that reply to the instruction is looked at in the same forward.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from ...data.support_dialogues import INSTRUCTIONS, dialogues
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, Task, WorkUnit
from ...lenses.strategy_attention import layout, span_of, sra
from ..text._text_task import model_of
from ._chat import base_model, greedy, rendered

__all__ = ["InstructedReplies"]

Ids = list[int]


@dataclass(frozen=True)
class _Found:
    """What is found of one dialogue under one instruction."""

    place: tuple[int, int]  # of the dialogue, of the instruction
    turns: int
    values: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class InstructedReplies(Task):
    """A value for each dialogue and instruction.

    ``goes_with_accuracy`` is Pearson's correlation of the logarithm of SRA (or of the lift) with being right, as in the
    paper: a value is the product of both z-scores, whose mean it is. ``over`` all samples of the baseline's layout; and
    over those of one number of turns and one instruction, so that neither the length nor the instruction makes it.

    Attributes:
        turns: messages of the user to judge at, ascending.
        samples: dialogues.
        reply: tokens of a greedy reply that code judges, 0 for none.
        source: of :func:`manyheads.data.support_dialogues.dialogues`.
    """

    subject: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric(
            "accuracy", "replies that gain most by their instruction", higher=True, kind="share",
            floor=1 / len(INSTRUCTIONS),
        ),
        Metric("obeyed", "greedy replies that follow their instruction", higher=True, kind="share"),
        Metric("sra", "share of attention on a token of the instruction (SRA)"),
        Metric("lift", "attention on the instruction over that on as many tokens (lift)"),
        Metric("goes_with_accuracy", "correlation with being right"),
    )  # fmt: skip

    turns: tuple[int, ...] = (1, 3, 6)
    samples: int = 16
    reply: int = 0
    source: str = "esconv"

    def unsupported_reason(self, run: RunContext) -> str | None:
        subject = cast(CausalLM, run.subject)
        if subject.tokenizer is None:
            return f"{subject.name} has no tokenizer, so that it reads no text"
        if not subject.tokenizer.is_fast:
            return f"the tokenizer of {subject.name} does not tell where its tokens stand in a text"
        return base_model(subject, "no system message to follow")

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, "dialogues", float(self.samples), f"{self.samples} dialogues")]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        every = dialogues(2 * self.turns[-1] - 1, self.source)
        order = run.rng(dialogues=self.source).permutation(len(every))[: self.samples]
        standard: list[_Found] = []
        for number, at in enumerate(order):
            for arm in run.arms:
                for turns in self.turns if arm == run.baseline else self.turns[-1:]:
                    found = self._judged(run, arm, every[at][: 2 * turns - 1])
                    for i, values in enumerate(found):
                        name = f"{number}/{INSTRUCTIONS[i].name}"
                        for metric, value in values.items():
                            yield self.row(metric, arm, value, name, context=f"{number}", at={"turns": turns})
                        if arm == run.baseline:
                            standard.append(_Found((number, i), turns, values))
            run.advance(1.0)
        yield from self._together(run, standard)

    def _judged(self, run: RunContext, arm: Arm, messages: list[dict[str, str]]) -> list[dict[str, float]]:
        """For each instruction what is found of its reply."""
        model, tokenizer = model_of(run), cast(Any, cast(CausalLM, run.subject).tokenizer)
        replies = [tokenizer.encode(each.reply, add_special_tokens=False) for each in INSTRUCTIONS]
        likely, values = np.zeros((len(replies), len(replies))), []
        prompts: list[Ids] = []
        for i, each in enumerate(INSTRUCTIONS):
            text = rendered(tokenizer, layout(messages, each.text, arm.options.get("form", "standard")))
            coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            prompts.append(coded.input_ids)
            span = span_of(text, each.text, coded.offset_mapping)
            likely[i], seen = _read(model, coded.input_ids, replies, i, span)
            values.append(seen)
        gain = likely - likely.mean(0)
        for i, seen in enumerate(values):
            seen["accuracy"] = float(gain[i].argmax() == i)
        if self.reply:
            for each, seen, made in zip(
                INSTRUCTIONS, values, greedy(model, tokenizer, prompts, self.reply), strict=True
            ):
                seen["obeyed"] = float(each.followed(tokenizer.decode(made)))
        return values

    def _together(self, run: RunContext, found: list[_Found]) -> Iterator[Row]:
        right = np.array([each.values["accuracy"] for each in found])
        cells = [(each.turns, each.place[1]) for each in found]
        for of in ("sra", "lift"):
            score = np.log([max(each.values[of], 1e-12) for each in found])
            for over, groups in (("all", [0] * len(found)), ("one length and instruction", cells)):
                product = _z(score, groups) * _z(right, groups)
                for each, value in zip(found, product, strict=True):
                    name = f"{each.place[0]}/{INSTRUCTIONS[each.place[1]].name}/{each.turns}"
                    yield self.row(
                        "goes_with_accuracy", run.baseline, value, name, context=f"{each.place[0]}",
                        at={"of": of, "over": over},
                    )  # fmt: skip


@torch.no_grad()
def _read(model: Any, prompt: Ids, replies: list[Ids], own: int, span: tuple[int, int]) -> tuple[Any, dict[str, float]]:
    """Log-likelihood of each of ``replies`` after ``prompt``, nats, and what its ``own`` one attends to."""
    import manyheads

    device = model.device
    cache = DynamicCache(config=model.config)
    model(torch.tensor([prompt[:-1]], device=device), past_key_values=cache, logits_to_keep=1)
    kept, last = copy.deepcopy(cache), len(prompt) - 1
    # The rows that look are those that predict the reply: from the last token of the prompt on.
    reply = [prompt[-1], *replies[own][:-1]]
    roles = manyheads.TokenSpans({"system": [[span]], "response": [[(last, last + len(reply))]]})
    with manyheads.watch(model, "strategy_attention", roles=roles) as seen:
        model(torch.tensor([reply], device=device), past_key_values=cache, logits_to_keep=1)
    tables = seen.compute().tables
    longest = max(map(len, replies))
    rows = torch.tensor([[prompt[-1], *r, *[0] * (longest - len(r))] for r in replies], device=device)
    kept.batch_repeat_interleave(len(replies))
    logits = model(rows[:, :-1], past_key_values=kept).logits.float()
    chosen: Tensor = logits.log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    likely = [float(chosen[j, : len(r)].sum()) for j, r in enumerate(replies)]
    return likely, {name: float(sra(tables[name])[0]) for name in ("sra", "lift")}


def _z(values: Any, groups: list[Any]) -> Any:
    """Values ``[N]`` less the mean of their group over its standard deviation, 0 where that is 0."""
    made = np.zeros(len(values))
    for group in set(groups):
        inside = np.array([each == group for each in groups])
        spread = values[inside].std()
        if spread > 0:
            made[inside] = (values[inside] - values[inside].mean()) / spread
    return made
