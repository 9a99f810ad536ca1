# SPDX-License-Identifier: Apache-2.0
"""How sure a language model is at the peaks of a score in worked answers, what they follow, and what hangs on them.

The model answers word problems greedily, in its chat template where it has one; that answer and the one given with the
problem are then read again in one forward each. An arm is a score, its option ``score``: ``waad``, ``fai``,
``entropy``, or blind draws.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch

from ...data.word_problems import word_problems
from ...experiment import CausalLM, Metric, Row, RunContext, Task, WorkUnit
from ..text._text_task import model_of
from ._chat import greedy, rendered
from ._rhythm import peaks_of, score_of, scores

__all__ = ["WorkedAnswers"]

_SHORTEST = 40  # tokens of an answer: a tenth of fewer is no rhythm
_AFTER = 3  # tokens that a peak may follow one of WAAD by
_BESIDE = 8  # tokens around the greatest FAI that the control is taken from
_WIDEST = 16  # answers made at once
Ids = list[int]


@dataclass(frozen=True, kw_only=True)
class WorkedAnswers(Task):
    """A value for each problem whose answer has 40 tokens or more.

    ``same_words`` is the perturbation of the paper, on the model's own answers: at the token of the greatest FAI in the
    first two thirds the second likeliest token is put in place of the greedy one, and the answer goes on greedily; the
    words of the new answer and of the old one are compared (Jaccard, of whole answers). Its control stands beside: the
    token of the least FAI of the eight on either side, so that both break off at nearly one place.

    Attributes:
        problems: how many.
        tokens: of an own answer, at most.
        source: of :func:`manyheads.data.word_problems.word_problems`.
    """

    subject: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("peak_entropy", "entropy of predictions at peaks", "nats"),
        Metric("follows_waad", "peaks at one of WAAD or up to three tokens after", kind="share"),
        Metric("precedes_waad", "peaks one to three tokens before one of WAAD", kind="share"),
        Metric("same_words", "words shared with the answer as it was, after another token was forced", kind="share"),
    )

    problems: int = 32
    tokens: int = 96
    source: str = "gsm8k"

    def unsupported_reason(self, run: RunContext) -> str | None:
        subject = cast(CausalLM, run.subject)
        return None if subject.tokenizer is not None else f"{subject.name} has no tokenizer, so that it reads no text"

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, kind, cost * self.problems, f"{kind} answers", {"answer": kind})
            for kind, cost in (("given", 1.0), ("own", 3.0))
        ]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        kind = unit.params["answer"]
        pairs = self._own(run) if kind == "own" else self._given(run)
        reading = unit.cost / 2 if kind == "own" else unit.cost  # the other half of the own answers was their writing
        run.advance(unit.cost - reading)
        forced: list[tuple[int, str, Ids, Ids, Ids]] = []
        for i, (prompt, answer) in enumerate(pairs):
            run.advance(reading / len(pairs))
            if len(answer) < _SHORTEST:
                continue
            ids = torch.tensor([[*prompt, *answer]], device=run.device)
            found, logits = scores(run, model_of(run), ids, len(prompt), i)
            inside = np.arange(ids.shape[1]) >= len(prompt)
            seen = {name: np.where(inside, score, np.nan) for name, score in found[0].items()}
            tops = {name: peaks_of(score) for name, score in seen.items()}
            after, before = (
                np.any([np.roll(tops["waad"], sign * j) for j in shifts], 0)
                for sign, shifts in ((1, range(_AFTER + 1)), (-1, range(1, _AFTER + 1)))
            )
            for arm in run.arms:
                peaks = tops[score_of(arm)]
                for name, value in (
                    ("peak_entropy", found[0]["entropy"][peaks].mean()), ("follows_waad", after[peaks].mean()),
                    ("precedes_waad", before[peaks].mean()),
                ):  # fmt: skip
                    yield self.row(name, arm, value, f"{i}", at={"answer": kind})
            if kind == "own":
                second = logits[0].topk(2).indices[:, 1]
                for which, at in _places(seen["fai"], len(prompt), len(answer)).items():
                    whole = ids[0].tolist()
                    forced.append((i, which, [*whole[:at], int(second[at - 1])], prompt, answer))
        yield from self._forced(run, forced)

    def _forced(self, run: RunContext, forced: Sequence[tuple[int, str, Ids, Ids, Ids]]) -> Iterator[Row]:
        """How many words are left of answers that were made to go on differently."""
        tokenizer: Any = cast(CausalLM, run.subject).tokenizer
        fai = [arm for arm in run.arms if score_of(arm) == "fai"]
        for start in range(0, len(forced) if fai else 0, _WIDEST):
            some = forced[start : start + _WIDEST]
            made = greedy(model_of(run), tokenizer, [begun for _, _, begun, _, _ in some], self.tokens)
            for (i, which, begun, prompt, answer), more in zip(some, made, strict=True):
                new = [*begun[len(prompt) :], *more][: self.tokens]
                words = [_words(tokenizer.decode(ids)) for ids in (new, answer)]
                value = len(words[0] & words[1]) / max(1, len(words[0] | words[1]))
                yield self.row("same_words", fai[0], value, f"{i}", at={"forced": which})

    def _prompts(self, run: RunContext) -> list[tuple[Ids, str]]:
        """Tokens of each prompt, and the answer given with it; the same problems in every process."""
        tokenizer: Any = cast(CausalLM, run.subject).tokenizer
        every = word_problems(self.source)
        order = run.rng(problems=self.source).permutation(len(every))[: self.problems]
        return [
            (
                tokenizer.encode(
                    rendered(tokenizer, [{"role": "user", "content": every[i][0]}]), add_special_tokens=False
                ),
                every[i][1],
            )
            for i in order
        ]

    def _given(self, run: RunContext) -> list[tuple[Ids, Ids]]:
        tokenizer: Any = cast(CausalLM, run.subject).tokenizer
        between = "" if getattr(tokenizer, "chat_template", None) else " "
        return [
            (prompt, tokenizer.encode(between + answer, add_special_tokens=False))
            for prompt, answer in self._prompts(run)
        ]

    def _own(self, run: RunContext) -> list[tuple[Ids, Ids]]:
        prompts = [prompt for prompt, _ in self._prompts(run)]
        made: list[Ids] = []
        for start in range(0, len(prompts), _WIDEST):
            some = prompts[start : start + _WIDEST]
            made += greedy(model_of(run), cast(CausalLM, run.subject).tokenizer, some, self.tokens)
        return list(zip(prompts, made, strict=True))


def _places(fai: Any, start: int, length: int) -> dict[str, int]:
    """Where another token is forced: at the greatest of ``fai [T]``, and at the least near it."""
    early = np.arange(len(fai))
    early = (early > start) & (early < start + 2 * length // 3) & np.isfinite(fai)
    if not early.any():
        return {}
    peak = int(np.where(early, fai, -np.inf).argmax())
    near = early & (np.abs(np.arange(len(fai)) - peak) <= _BESIDE)
    return {"greatest FAI": peak, "beside": int(np.where(near, fai, np.inf).argmin())}


def _words(text: str) -> set[str]:
    """Words and numbers of a text, of three letters or more or of digits."""
    return set(re.findall(r"[a-z]{3,}|\d+", text.lower()))
