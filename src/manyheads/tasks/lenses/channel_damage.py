# SPDX-License-Identifier: Apache-2.0
"""What a language model reads from its prompt, and what it knows without, when channels of its attention are damaged.

Every prompt is a passage of text with planted sentences and a question behind it, all of one number of tokens. The
same context is asked for what is planted in it (contextual: "Anna lives in"), and for a fact of the same set that it
does not hold (parametric: "The capital of France is"), see :mod:`manyheads.data.knowledge`. Both are scored alike, on
one token: the first token of the right answer has to be the likeliest of those of all answers of the set. Several
sentences are planted, of other names and answers: with a single one, as in the paper's passkeys, a small model has no
error to lose and only has to repeat the one answer that stands there. Each question is also swapped: the same context
is asked for the other name that is planted, or for another fact. Who says the same answer then has not listened to the
question, a guess, and what is kept is counted less that. Grammar is asked for behind the same passages,
the word that may follow against the one that may not; and the passages themselves are read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ...data.knowledge import NAMES, SETS, grammar
from ...errors import UserError
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, WorkUnit
from ..text._text_task import model_of
from ._windows import WindowTask

__all__ = ["ChannelDamage"]

_BATCH = 16  # prompts at once
_AFTER = 12  # tokens of the passage, at least, on either side of what is planted
CONTEXTUAL, PARAMETRIC = "contextual", "parametric"


@dataclass(frozen=True)
class _Prompt:
    """One prompt: its tokens, those that are compared, the place of the right one, and what its row says."""

    ids: Any
    choices: tuple[int, ...]
    right: int
    metric: str
    sample: str
    at: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ChannelDamage(WindowTask):
    """A value for each prompt. ``kept`` is whether it is answered less whether its swapped question gets that answer.

    It is over the baseline's mean of its kind and set. Of a model that has the answer with probability p and guesses
    otherwise, whoever is asked for, it is p, whether it guesses among all answers or those planted.

    ``tokens`` are those of every prompt, ``windows_of`` passages are read as they are.

    Attributes:
        questions: contexts of each set, at most 30; the two wordings of a set take turns.
        planted: sentences in each context.
        grammar: files of BLiMP, by their names; pairs of each, as many as ``questions``.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("answered", "questions answered", higher=True, kind="share", floor=0.5),
        Metric("swapped", "the same answers to a swapped question, guessed", kind="share"),
        Metric("kept", "right answers less guessed ones, over the baseline's", higher=True),
        Metric("grammatical", "words that may follow, preferred", higher=True, kind="share", floor=0.5),
        Metric("new_token", "next tokens foreseen, new to the passage", higher=True, kind="share"),
        Metric("known_token", "next tokens foreseen, known from the passage", higher=True, kind="share"),
        Metric("text_nll", "loss of the passages, nats/token", "nats/token"),
    )

    tokens: int = 96
    questions: int = 30
    planted: int = 2
    grammar: tuple[str, ...] = ()

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, arm.key, 1.0, arm.key, {"arm": arm.key}) for arm in run.arms]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = run.arm_of(unit)
        prompts = cast(list[_Prompt], run.kept(("prompts", self), lambda: self._prompts(run)))
        base = cast(list[bool], run.kept(("undamaged", self), lambda: self._answers(run, run.baseline, prompts)))
        found = base if arm == run.baseline else self._answers(run, arm, prompts)
        for prompt, right in zip(prompts, found, strict=True):
            yield self.row(prompt.metric, arm, right, prompt.sample, at=prompt.at)
        whole: dict[tuple[Any, ...], list[int]] = {}
        for prompt, value in _heard(prompts, base):
            whole.setdefault((*prompt.at.values(),), []).append(value)
        for prompt, value in _heard(prompts, found):
            share = max(float(np.mean(whole[(*prompt.at.values(),)])), 1 / self.questions)
            yield self.row("kept", arm, value / share, prompt.sample, at=prompt.at)
        for name, values in self._read(run, arm).items():
            yield from self.each(name, arm, values)
        run.advance(unit.cost)

    def _prompts(self, run: RunContext) -> list[_Prompt]:
        """All prompts, of ``tokens`` each."""
        tokenizer: Any = cast(CausalLM, run.subject).tokenizer
        made: list[_Prompt] = []

        def encoded(text: str) -> list[int]:
            return list(tokenizer.encode(text, add_special_tokens=False))

        def prompt(passage: Any, planted: list[str], asked: str, depths: Any) -> Any:
            """The passage with sentences at ``depths``, ascending, and the question; nothing beyond ``tokens``."""
            said, question = [encoded(f"\n{sentence}\n") for sentence in planted], encoded(f"\n{asked}")
            room = self.tokens - sum(map(len, said)) - len(question)
            if room < 2 * _AFTER:
                raise UserError(f"{self.tokens} tokens are too few for {self.planted} sentences; give more")
            cuts = [_AFTER + int(depth * (room - 2 * _AFTER)) for depth in depths]
            parts, last = [], 0
            for cut, sentence in zip(cuts, said, strict=True):
                parts += [passage[last:cut], sentence]
                last = cut
            return np.concatenate([*parts, passage[last:room], question]).astype(np.int64)

        passages = [ids for ids, _, _ in self.contexts(run, self.windows_of).plain("asked", self.tokens, 60, 1)]
        for set_, (name, facts) in enumerate(SETS.items()):
            choices = tuple(encoded(f" {answer}")[0] for _, answer in facts.facts)
            for i in range(min(self.questions, len(choices))):
                rng = run.rng(facts=name, question=i)
                drawn, people = rng.permutation(len(choices))[: self.planted + 2], rng.permutation(len(NAMES))
                *planted, fact, another = map(int, drawn)  # facts that are asked for are not among those planted
                says, knows = facts.says[i % 2], facts.knows[i % 2]
                sentences = [
                    f"{says.format(name=NAMES[person])} {facts.facts[answer][1]}."
                    for person, answer in zip(people, planted, strict=False)
                ]
                one, depths = int(rng.integers(self.planted)), sorted(rng.random(self.planted))
                other = people[(one + 1) % max(2, self.planted)]
                for kind, asked, right in (
                    (CONTEXTUAL, [says.format(name=NAMES[person]) for person in (people[one], other)], planted[one]),
                    (PARAMETRIC, [knows.format(key=facts.facts[key][0]) for key in (fact, another)], fact),
                ):
                    at = {"knowledge": kind, "set": name}
                    for metric, question in zip(("answered", "swapped"), asked, strict=True):
                        ids = prompt(passages[2 * i + set_], sentences, question, depths)
                        made.append(_Prompt(ids, choices, right, metric, f"{name} {i}", at))
        for name in self.grammar:
            pairs = grammar(name)
            order = run.rng(grammar=name).permutation(len(pairs))
            taken = 0
            for j in order:
                start, good, bad = pairs[j]
                words = tuple(encoded(f" {word}")[0] for word in (good, bad))
                if words[0] != words[1] and taken < self.questions:
                    ids = prompt(passages[taken], [], start, [])
                    made.append(_Prompt(ids, words, 0, "grammatical", f"{name} {taken}", {"set": name}))
                    taken += 1
        return made

    def _answers(self, run: RunContext, arm: Arm, prompts: list[_Prompt]) -> list[bool]:
        """Whether each prompt's token (the right one, of a swapped question that of its own) is the likeliest."""
        import manyheads

        model: Any = model_of(run)
        ids = torch.from_numpy(np.stack([prompt.ids for prompt in prompts])).to(run.device)
        with manyheads.use(model, *arm.strategies):
            last = [model(rows, use_cache=False, logits_to_keep=1).logits[:, -1].cpu() for rows in ids.split(_BATCH)]
        logits = torch.cat(last).float()
        return [
            prompt.choices[int(row[list(prompt.choices)].argmax())] == prompt.choices[prompt.right]
            for row, prompt in zip(logits, prompts, strict=True)
        ]  # fmt: skip

    def _read(self, run: RunContext, arm: Arm) -> dict[str, Any]:
        """What an arm foresees of the passages, ``[windows_of]`` by metric."""
        import manyheads

        model: Any = model_of(run)
        hits, losses, text = [], [], self.windows(run)
        with manyheads.use(model, *arm.strategies):
            for rows in text.split(_BATCH):
                logits = model(rows[:, :-1], use_cache=False).logits.float()
                hits.append((logits.argmax(-1) == rows[:, 1:]).cpu())
                losses.append(cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1).cpu())
        hit, known = torch.cat(hits), _known(text.cpu())
        found = {"new_token": _share(hit, ~known), "known_token": _share(hit, known), "text_nll": torch.cat(losses)}
        return {name: values.double().numpy() for name, values in found.items()}


def _heard(prompts: list[_Prompt], said: list[bool]) -> Iterator[tuple[_Prompt, int]]:
    """Each question, and whether its answer is said to it and not to the swapped question behind it: 1, 0 or -1."""
    for n, prompt in enumerate(prompts):
        if prompt.metric == "answered":
            yield prompt, int(said[n]) - int(said[n + 1])


def _known(ids: Tensor) -> Tensor:
    """Which next tokens of ``ids [N, T + 1]`` stood before in the window, bool ``[N, T]``."""
    length = ids.shape[1] - 1
    before = torch.ones(length, length, dtype=torch.bool).tril()
    return ((ids[:, None, :-1] == ids[:, 1:, None]) & before).any(-1)


def _share(hit: Tensor, where: Tensor) -> Tensor:
    return (hit & where).sum(1) / where.sum(1).clamp(min=1)
