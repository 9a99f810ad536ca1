# SPDX-License-Identifier: Apache-2.0
"""Several turns: facts of earlier turns are asked for later, from a cache that was compressed after every turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np

from ....errors import UserError
from ....experiment.rows import Metric
from ....experiment.subjects import CausalLM
from ....experiment.task import RunContext
from ....integrations import use
from ....integrations.transformers import new_cache
from ....models.chat import chat_text
from ....spec import parse
from ....strategy import Cache
from .._answered import Asked, Judge, Query
from .._prefill import cache_of, forward_chunked
from .._scores import names_only
from .._text_task import model_of, tensor
from ._chat import ChatTask, said
from .qa import FACTS, names, person

if TYPE_CHECKING:
    from ....experiment import Arm

__all__ = ["MultiTurn", "between_turns"]

_REPLY = "Thank you, I will keep that in mind."
_QUESTION = "Answer by what I told you. {}"
_ASKED = 4  # facts of a dialogue, one of each kind


def between_turns(strategy: Cache) -> Cache:
    """``strategy`` evicting after every turn where it would only after the first; a schedule of its own stays."""
    fields = {f.name for f in dataclasses.fields(cast(Any, strategy))}
    if "schedule" in fields and strategy.schedule == "prefill":
        return dataclasses.replace(cast(Any, strategy), schedule="chunk")  # type: ignore[no-any-return]
    return strategy


@dataclass(frozen=True, kw_only=True)
class MultiTurn(ChatTask):
    """Every turn tells a fact among sentences of other matter, and is answered by the same words. After the last turn
    facts of the first, the last and two turns between are asked for, each question going on from the same cache; none
    sees another. The cache goes from turn to turn: what was evicted is gone, and a budget that is a fraction is one of
    all tokens so far. A strategy that would compress the first turn only evicts after every turn (``schedule=chunk``),
    after that of the question too. Guessing gets 1 in 10 to 12.

    Attributes:
        turns: of the user, before the question.
    """  # fmt: skip

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("remembered", "facts of earlier turns", higher=True, kind="share", floor=0.5),
    )
    lengths: tuple[int, ...] = (768,)
    turns: int = 6
    reply: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns < _ASKED:
            raise UserError(f"turns is {_ASKED} or more: as many facts are asked for")
        if self.query_aware:
            raise UserError("chat.multi_turn asks after turns that are compressed already: leave query_aware away")

    def asked(self, run: RunContext, length: int, sample: int) -> list[Asked]:
        rng = self.draws(run, length, sample)
        people = names(rng, self.turns)
        facts = [person(rng) for _ in people]
        kinds = [int(k) for k in rng.permutation(len(FACTS))]
        sentences, text = self.passage(run, length, sample)
        chosen = [round(x) for x in np.linspace(0, self.turns - 1, _ASKED)]

        def write(n: int) -> list[Asked]:
            messages = list[dict[str, str]]()
            for i in range(self.turns):
                kind = kinds[chosen.index(i)] if i in chosen else kinds[i % len(kinds)]
                fact = FACTS[kind][1].format(who=people[i], what=facts[i][kind])
                other = " ".join(sentences[i :: self.turns][: n + 1])
                messages += [said("user", f"{fact} {other}"), said("assistant", _REPLY)]
            queries = []
            for i, kind in zip(chosen, kinds, strict=True):
                name, _, question, values = FACTS[kind]
                asked = [*messages, said("user", _QUESTION.format(question.format(who=people[i])))]
                right = facts[i][kind]
                judge = partial(names_only, right, [value for value in values if value != right])
                heads, tail = self._turns(run, asked)
                queries.append(Query(tail, (Judge("remembered", judge, {"turn": i + 1, "kind": name}),)))
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

    def caches(self, run: RunContext, heads: Sequence[list[int]], arms: Sequence[Arm]) -> Iterator[tuple[Arm, Any]]:
        """Every arm reads the turns by itself, one after the other, through what it kept of those before."""
        model = model_of(run)
        for arm in arms:
            strategies = arm.strategies
            keeping = cache_of(strategies)
            kept = between_turns(keeping) if keeping is not None else cast(Cache, parse("full"))
            with ExitStack() as stack:
                if acting := [strategy for strategy in strategies if not isinstance(strategy, Cache)]:
                    stack.enter_context(use(model, *acting))
                cache = new_cache(model, kept)
                for head in heads:
                    forward_chunked(model, cache, tensor(run, [head]), 1)
                yield arm, cache
