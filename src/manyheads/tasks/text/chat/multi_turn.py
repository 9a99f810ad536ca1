# SPDX-License-Identifier: Apache-2.0
"""Several turns: facts of earlier turns are asked for later, from a cache that was compressed after every turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from ....errors import UserError
from ....experiment.rows import Metric, Value
from ....experiment.subjects import CausalLM
from ....experiment.task import RunContext
from ....integrations import use
from ....integrations.transformers import new_cache
from ....models.chat import chat_text
from ....spec import parse
from ....strategy import Cache
from .._answered import Asked, Query
from .._prefill import cache_of, forward_chunked
from .._text_task import model_of, tensor
from ._chat import ChatTask, said
from .qa import ASKED, FACTS, names, question, values

if TYPE_CHECKING:
    from ....experiment import Arm

__all__ = ["MultiTurn"]

_REPLY = "Thank you, I will keep that in mind."
_QUESTION = "Answer by what I told you. {}"


@dataclass(frozen=True, kw_only=True)
class MultiTurn(ChatTask):
    """Every turn tells the same kind of fact of another person, among sentences of other matter, and is answered by the
    same words. After the last turn the facts of the first, the last and two turns between are asked for, each question
    going on from the same cache; none sees another. The cache goes from turn to turn: what was evicted is gone, and a
    budget that is a fraction is one of all tokens so far. A strategy that would compress the first turn only ranks anew
    at every turn (:meth:`manyheads.strategy.Cache.for_turns`), at that of the question too.

    ``chosen`` and ``remembered`` are judged as in ``chat.qa``: of the values of the four turns the right one is the
    likeliest, and the written reply names it and no other. Guessing gets a quarter of either, or less.

    Attributes:
        turns: of the user, before the question.
    """  # fmt: skip

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("chosen", "fact of an earlier turn chosen of 4", higher=True, kind="share", floor=1 / ASKED),
        Metric("remembered", "facts of earlier turns", higher=True, kind="share", floor=1 / ASKED),
    )
    lengths: tuple[int, ...] = (512,)
    turns: int = 6
    reply: int = 24

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns < ASKED:
            raise UserError(f"turns is {ASKED} or more: as many facts are asked for")
        if self.query_aware:
            raise UserError("chat.multi_turn asks after turns that are compressed already: leave query_aware away")

    def asked(self, run: RunContext, length: int, sample: int) -> list[Asked]:
        rng = self.draws(run, length, sample)
        people, kind = names(rng, self.turns), int(rng.integers(len(FACTS)))
        chosen = [round(x) for x in np.linspace(0, self.turns - 1, ASKED)]
        drawn = values(rng, kind, self.turns)
        told = dict(zip([*chosen, *(i for i in range(self.turns) if i not in chosen)], drawn, strict=True))
        sentences, text = self.passage(run, length, sample)

        def write(n: int) -> list[Asked]:
            messages = list[dict[str, str]]()
            for i in range(self.turns):
                fact = FACTS[kind][1].format(who=people[i], what=told[i])
                other = " ".join(sentences[i :: self.turns][: n + 1])
                messages += [said("user", f"{fact} {other}"), said("assistant", _REPLY)]
            queries = []
            for i in chosen:
                mine = [told[i], *(told[j] for j in chosen if j != i)]
                at: dict[str, Value] = {"turn": i + 1, "kind": FACTS[kind][0]}
                asks, judge, choice = question(kind, people[i], mine, at, ("chosen", "remembered"))
                heads, tail = self._turns(run, [*messages, said("user", _QUESTION.format(asks))])
                queries.append(Query(tail, (judge,), choices=(choice,)))
            return [Asked(heads, tuple(queries), text)]

        return self.filled(run, length, write, len(sentences) // self.turns - 1)

    def _turns(self, run: RunContext, messages: Sequence[dict[str, str]]) -> tuple[tuple[str, ...], str]:
        """The dialogue in the template's words, turn by turn, and the last message with the opening of the reply."""
        tokenizer = cast(CausalLM, run.subject).tokenizer
        upto = [chat_text(tokenizer, messages[:i], generate=False) for i in range(2, len(messages), 2)]
        upto.append(chat_text(tokenizer, messages))
        if not all(later.startswith(before) for before, later in pairwise(upto)):
            raise UserError("the chat template writes earlier turns anew when others follow, so no cache can go on")
        pieces = [later[len(before) :] for before, later in zip(["", *upto[:-1]], upto, strict=True)]
        return tuple(pieces[:-1]), pieces[-1]

    def caches(
        self, run: RunContext, heads: Sequence[list[int]], arms: Sequence[Arm], system: tuple[int, int] | None = None
    ) -> Iterator[tuple[Arm, Any]]:
        """Every arm reads the turns by itself, one after the other, through what it kept of those before."""
        model = model_of(run)
        for arm in arms:
            strategies = arm.strategies
            keeping = cache_of(strategies)
            kept = (keeping if keeping is not None else cast(Cache, parse("full"))).with_system(system).for_turns()
            with ExitStack() as stack:
                if acting := [strategy for strategy in strategies if not isinstance(strategy, Cache)]:
                    stack.enter_context(use(model, *acting))
                cache = new_cache(model, kept)
                for head in heads:
                    forward_chunked(model, cache, tensor(run, [head]), 1)
                yield arm, cache
