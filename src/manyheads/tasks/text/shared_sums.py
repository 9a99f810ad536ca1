# SPDX-License-Identifier: Apache-2.0
"""Lists of sums that writers work out side by side: how many are right after so many tokens, one after the other.

An arm is a ``DecodingLoop`` that leaves its texts in ``notes["texts"]``, or none: the likeliest tokens of one writer.
What an arm says of a sum is what its texts say most often, of equals the first; so texts that know nothing of each
other vote. The option ``times`` of an arm is so many times the tokens: what one writer does alone in as many as several
have together.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch

from ...experiment import Arm, CausalLM, Metric, Row, RunContext, Task, WorkUnit
from ...integrations import use
from ...integrations.decoding import end_tokens, write
from ...integrations.transformers import new_cache, prefill
from ...models.chat import rendered
from ...spec import parse
from ...writing import Decoding, Request
from ._text_task import model_of

__all__ = ["SharedSums", "said"]

_SUM = re.compile(r"(\d+)\s*\+\s*(\d+)\s*=\s*(\d+)")
Pair = tuple[int, int]


def said(texts: Sequence[str], asked: Sequence[Pair]) -> tuple[dict[Pair, int], float]:
    """What texts say each sum is, those that they name, and the share of what they say that was said before."""
    every = [(int(a), int(b), int(c)) for text in texts for a, b, c in _SUM.findall(text)]
    stated = [(pair, c) for a, b, c in every if (pair := (a, b)) in asked]
    found = {pair: Counter(c for other, c in stated if other == pair).most_common(1)[0][0] for pair in dict(stated)}
    return found, 1 - len(found) / len(stated) if stated else 0.0


@dataclass(frozen=True, kw_only=True)
class SharedSums(Task):
    """A value for each list; for ``solved`` and ``stated`` the share of its sums.

    Attributes:
        lists: how many.
        sums: in a list, of two numbers each; a list that is worked out stands before, as an earlier exchange.
        largest: of the numbers, from 2.
        tokens: that each writer writes, at most.
    """

    subject: ClassVar[str] = "causal_lm"
    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("solved", "sums that are right", higher=True, kind="share"),
        Metric("stated", "sums that anyone works out, rightly or not", higher=True, kind="share"),
        Metric("repeated", "of what is worked out, what was worked out before", kind="share"),
        Metric("step", "a token of every writer, ms", "ms", kind="time"),
        Metric("seconds", "writing, s", "s", kind="time"),
    )

    lists: int = 24
    sums: int = 6
    largest: int = 9
    tokens: int = 32

    def unsupported_reason(self, run: RunContext) -> str | None:
        subject = cast(CausalLM, run.subject)
        return None if subject.tokenizer is not None else f"{subject.name} has no tokenizer, so that it reads no text"

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, f"{i}", len(run.arms), f"list {i + 1}", {"list": i}) for i in range(self.lists)]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        number = unit.params["list"]
        rng = run.rng(sums=number)
        shown, asked = ([(int(a), int(b)) for a, b in rng.integers(2, self.largest + 1, (self.sums, 2))] for _ in "ab")
        if not number:
            self._texts(run, run.baseline, shown, asked, 4)  # what is done once is no arm's
        order = number * 5 % len(run.arms)
        for arm in (*run.arms[order:], *run.arms[:order]):
            texts, steps, seconds = self._texts(run, arm, shown, asked, self.tokens * int(arm.options.get("times", 1)))
            found, repeated = said(texts, asked)
            right = sum(found.get((a, b)) == a + b for a, b in asked) / self.sums
            about = {"texts": texts} if number < 2 else {}
            yield self.row("solved", arm, right, f"{number}", about=about)
            yield self.row("stated", arm, len(found) / self.sums, f"{number}")
            yield self.row("repeated", arm, repeated, f"{number}")
            yield self.row("step", arm, 1000 * seconds / steps, f"{number}")
            yield self.row("seconds", arm, seconds, f"{number}")
            run.advance(1)

    def _texts(
        self, run: RunContext, arm: Arm, shown: Sequence[Pair], asked: Sequence[Pair], tokens: int
    ) -> tuple[list[str], int, float]:
        """What each writer wrote, forwards one after the other, and seconds."""
        tokenizer: Any = cast(CausalLM, run.subject).tokenizer
        first, second = ("\n".join(["Work out each sum.", *(f"{a} + {b}" for a, b in x)]) for x in (shown, asked))
        worked = "\n".join(f"{a} + {b} = {a + b}" for a, b in shown)
        turns = (("user", first), ("assistant", worked), ("user", second))
        text = rendered(tokenizer, [{"role": role, "content": said} for role, said in turns])
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)], device=run.device)
        choosing = next((s for s in arm.strategies if isinstance(s, Decoding)), cast(Decoding, parse(_PLAIN)))
        model, finish = model_of(run), getattr(choosing, "finish", 0) if getattr(choosing, "workers", 1) > 1 else 0
        with torch.inference_mode(), use(model):
            cache = new_cache(model, parse("full"))
            prefill(model, ids, cache)
            run.synchronise()
            start = time.perf_counter()
            ends = end_tokens(model, tokenizer)
            made = write(choosing, Request(model, tokenizer, ids, tokens + finish, ends, run.seed, cache))
            run.synchronise()
        seconds = time.perf_counter() - start
        texts = made.notes.get("texts") or {"": str(tokenizer.decode(made.tokens, skip_special_tokens=True))}
        return list(texts.values()), made.forwards, seconds


_PLAIN = "sampling:top_k=1"
