# SPDX-License-Identifier: Apache-2.0
"""How often a reply follows its instruction as a real dialogue grows, and how much the reply attends to it.

The instruction stands in the system message, and the dialogue where an arm's layout puts it, its option ``form``: at
all numbers of turns under the baseline's (standard), at the greatest under the others. Of replies of one meaning, each
written as one of the instructions asks, the one whose log-likelihood gains most by the instruction has to be its own:
gain is that over the mean under all instructions, so that neither a likely reply nor a rare one wins by itself. The
attention of that reply to the instruction is looked at in the same forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from transformers import DynamicCache

from ...data.support_dialogues import INSTRUCTIONS, dialogues
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, Task, WorkUnit
from ...lenses.strategy_attention import layout, span_of, sra
from ..text._text_task import model_of
from ._chat import base_model, greedy, rendered

__all__ = ["InstructedReplies"]

Ids = list[int]
_TOKENS = 16_384  # that are read at once, each prompt as often as there are replies


@dataclass(frozen=True)
class _Asked:
    """One dialogue, laid out by an arm under one instruction."""

    arm: Arm
    turns: int
    place: tuple[int, int]  # of the dialogue, of the instruction
    ids: Ids
    span: tuple[int, int]  # of the instruction


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
        asked = self._asked(run)
        found = self._judged(run, asked, unit.cost)
        for each, values in zip(asked, found, strict=True):
            number, i = each.place
            for metric, value in values.items():
                yield self.row(
                    metric, each.arm, value, f"{number}/{INSTRUCTIONS[i].name}", context=f"{number}",
                    at={"turns": each.turns},
                )  # fmt: skip
        standard = [pair for pair in zip(asked, found, strict=True) if pair[0].arm == run.baseline]
        yield from self._together(run, standard)

    def _asked(self, run: RunContext) -> list[_Asked]:
        """All prompts, those of a dialogue under the instructions one after another."""
        tokenizer = cast(Any, cast(CausalLM, run.subject).tokenizer)
        every = dialogues(2 * self.turns[-1] - 1, self.source)
        order = run.rng(dialogues=self.source).permutation(len(every))[: self.samples]
        made = []
        for number, at in enumerate(order):
            for arm in run.arms:
                for turns in self.turns if arm == run.baseline else self.turns[-1:]:
                    messages, form = every[at][: 2 * turns - 1], arm.options.get("form", "standard")
                    for i, each in enumerate(INSTRUCTIONS):
                        text = rendered(tokenizer, layout(messages, each.text, form))
                        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                        span = span_of(text, each.text, coded.offset_mapping)
                        made.append(_Asked(arm, turns, (number, i), list(coded.input_ids), span))
        return made

    def _judged(self, run: RunContext, asked: list[_Asked], cost: float = 0.0) -> list[dict[str, float]]:
        """What is found of each prompt's own reply; prompts of about one length are read together."""
        model, tokenizer = model_of(run), cast(Any, cast(CausalLM, run.subject).tokenizer)
        replies = [tokenizer.encode(each.reply, add_special_tokens=False) for each in INSTRUCTIONS]
        likely, found = np.zeros((len(asked), len(replies))), [dict[str, float]() for _ in asked]
        for part in _alike([len(each.ids) for each in asked], _TOKENS // len(replies)):
            those = [asked[n] for n in part]
            prompts, own = [each.ids for each in those], [each.place[1] for each in those]
            likely[part], seen = _read(model, prompts, replies, own, [each.span for each in those])
            made = greedy(model, tokenizer, prompts, self.reply) if self.reply else [[]] * len(part)
            for n, values, reply in zip(part, seen, made, strict=True):
                found[n] = values
                if self.reply:
                    followed = INSTRUCTIONS[asked[n].place[1]].followed(tokenizer.decode(reply))
                    found[n] = {**values, "obeyed": float(followed)}
            run.advance(cost * len(part) / len(asked))
        gain = likely.reshape(-1, len(replies), len(replies))  # of each dialogue as it is laid out
        right = (gain - gain.mean(1, keepdims=True)).argmax(2) == np.arange(len(replies))
        return [{**values, "accuracy": float(good)} for values, good in zip(found, right.flatten(), strict=True)]

    def _together(self, run: RunContext, found: list[tuple[_Asked, dict[str, float]]]) -> Iterator[Row]:
        right = np.array([values["accuracy"] for _, values in found])
        cells = [(each.turns, each.place[1]) for each, _ in found]
        for of in ("sra", "lift"):
            score = np.log([max(values[of], 1e-12) for _, values in found])
            for over, groups in (("all", [0] * len(found)), ("one length and instruction", cells)):
                product = _z(score, groups) * _z(right, groups)
                for (each, _), value in zip(found, product, strict=True):
                    name = f"{each.place[0]}/{INSTRUCTIONS[each.place[1]].name}/{each.turns}"
                    yield self.row(
                        "goes_with_accuracy", run.baseline, value, name, context=f"{each.place[0]}",
                        at={"of": of, "over": over},
                    )  # fmt: skip


def _alike(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Places of ``lengths`` in groups of about one length, of at most ``most`` tokens together, padding counted."""
    groups: list[list[int]] = []
    for n in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        if not groups or (len(groups[-1]) + 1) * lengths[groups[-1][0]] > most:
            groups.append([])
        groups[-1].append(n)
    return groups


@torch.no_grad()
def _read(
    model: Any, prompts: Sequence[Ids], replies: Sequence[Ids], own: Sequence[int], spans: Sequence[tuple[int, int]]
) -> tuple[Any, list[dict[str, float]]]:
    """Log-likelihood of each of ``replies`` after each prompt, nats ``[N, R]``, and what its own reply attends to.

    Args:
        model: of transformers.
        prompts: N of any lengths.
        replies: R of them.
        own: place of each prompt's own one.
        spans: of each prompt's instruction.
    """
    import manyheads

    count, most, longest = len(replies), max(map(len, prompts)), max(map(len, replies))
    pads = [most - len(prompt) for prompt in prompts]
    rows = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
    mask = torch.arange(most) >= torch.tensor(pads)[:, None]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    rows, mask, places = (made.to(model.device) for made in (rows, mask.long(), places))
    cache = DynamicCache(config=model.config)
    model(
        rows[:, :-1], attention_mask=mask[:, :-1], position_ids=places[:, :-1], past_key_values=cache, logits_to_keep=1
    )
    cache.batch_repeat_interleave(count)
    # The rows that look are those that predict a prompt's own reply: from the last token of the prompt on.
    looks = [
        [(most - 1, most - 1 + len(reply))] if j == mine else [] for mine in own for j, reply in enumerate(replies)
    ]
    seen_by = [[(a + pad, b + pad)] for pad, (a, b) in zip(pads, spans, strict=True) for _ in replies]
    said = torch.tensor([[*reply, *[0] * (longest - len(reply))] for reply in replies], device=model.device)
    said = torch.cat([rows[:, -1:].repeat_interleave(count, 0), said.repeat(len(prompts), 1)], 1)
    steps = torch.arange(longest, device=model.device)
    with manyheads.watch(model, "strategy_attention", roles=manyheads.TokenSpans({
        "system": seen_by, "response": looks,
    })) as seen:  # fmt: skip
        logits = model(
            said[:, :-1], attention_mask=torch.cat([mask, mask.new_ones(len(prompts), longest - 1)], 1)
            .repeat_interleave(count, 0), position_ids=(places[:, -1:] + steps).repeat_interleave(count, 0),
            past_key_values=cache,
        ).logits.float()  # fmt: skip
    chosen = logits.log_softmax(-1).gather(2, said[:, 1:, None])[..., 0].reshape(len(prompts), count, longest)
    likely = np.stack([chosen[:, j, : len(reply)].sum(1).cpu().numpy() for j, reply in enumerate(replies)], 1)
    tables, mine = seen.compute().tables, [count * n + i for n, i in enumerate(own)]
    found = {name: sra(tables[name])[mine] for name in ("sra", "lift")}
    return likely, [{name: float(values[n]) for name, values in found.items()} for n in range(len(prompts))]


def _z(values: Any, groups: list[Any]) -> Any:
    """Values ``[N]`` less the mean of their group over its standard deviation, 0 where that is 0."""
    made = np.zeros(len(values))
    for group in set(groups):
        inside = np.array([each == group for each in groups])
        spread = values[inside].std()
        if spread > 0:
            made[inside] = (values[inside] - values[inside].mean()) / spread
    return made
