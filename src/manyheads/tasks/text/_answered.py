# SPDX-License-Identifier: Apache-2.0
"""Tasks whose reply is written, token by token, and scored as text by code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from ...data import files
from ...errors import UserError
from ...experiment.rows import Row, Value, WorkUnit
from ...experiment.subjects import CausalLM
from ...experiment.task import RunContext
from ...integrations.decoding import end_tokens, greedy_rows, takes_padding
from ...models.chat import chat_text, chats
from ...strategy import Cache
from ._choices import Choice, continued
from ._corpus import encode
from ._haystack import Haystack, TooShort
from ._prefill import Prefix, chunk_size, sequences_at_once
from ._text_task import TextTask, model_of, tensor

if TYPE_CHECKING:
    from numpy.random import Generator

    from ...experiment import Arm

__all__ = ["AnsweredTask", "Asked", "Judge", "Query", "haystack", "size", "tokens", "users_folder", "written"]

_SHOWN = 600  # characters of a reply that a row keeps
_UNPACKED = 4  # times the bytes of a packed cache that it takes while rows are put together


def users_folder(task: str, given: str, home: str, what: str) -> Path:
    """The folder ``given``, or ``home`` below the folder of the data; raises UserError, which says what to do."""
    place = Path(given).expanduser() if given else files.folder(home)
    if place is None or not place.is_dir():
        raise UserError(
            f"{task} needs {what}: put it into {home} of a folder that MANYHEADS_DATA names, or write "
            f"--tasks {task}:folder=DIR"
        )
    return place


@dataclass(frozen=True)
class Judge:
    """A row of a reply: the value of a metric, under conditions."""

    metric: str
    value: Callable[[str], float]
    at: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """What is read behind a context, to where the reply begins, and what the reply is worth.

    Attributes:
        tail: the text, template included.
        judges: of the written reply, a row each; without any none is written.
        settled: a reply that all judges gave 1 cannot lose it by going on, so that its writing may stop.
        most: tokens of the reply, where that is less than the task's.
        choices: among replies that are given, a row each.
    """

    tail: str
    judges: tuple[Judge, ...]
    settled: bool = False
    most: int = 2**31
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Asked:
    """A context and what is asked of it; each query starts from the context alone and sees none of the others.

    Attributes:
        heads: texts that are read one after the other before any question, template included; mostly one.
        queries: what is asked then.
        text: name of the text that the context is made of.
        plain: asked of the baseline only: what a reply is worth that could not know.
        system: tokens of the system message, ``(start, stop)``, None where there is none.
    """

    heads: tuple[str, ...]
    queries: tuple[Query, ...]
    text: str = ""
    plain: bool = False
    system: tuple[int, int] | None = None


_Read = tuple[list[int], Query]  # a query with the tokens of its tail


@dataclass(frozen=True)
class _At:
    """What rows are about: an arm, a length and a sample, the number of its first query, bytes held, and the text."""

    arm: Arm
    length: int
    sample: int
    first: int
    held: int
    text: str

    @property
    def piece(self) -> int | None:
        """Most tokens to read at once."""
        return chunk_size(self.arm, self.length)


@dataclass(frozen=True, kw_only=True)
class AnsweredTask(TextTask):
    """Base of the tasks with a written reply: greedy, from a cache that was compressed when the context was read.

    Attributes:
        lengths: most tokens of a context, with its template and the longest question; contexts end with a sentence.
        query_aware: the question is read before compression, all but its last token; one at a time, each with the
            context anew. By default it comes after.
        reply: most tokens of a reply.
    """

    least_reply: ClassVar[int] = 1

    text: str = "prose"
    query_aware: bool = False
    reply: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reply < self.least_reply:
            raise UserError(f"reply counts tokens: give {self.least_reply} or more")
        if self.repeat:
            raise UserError("repeat goes with the tasks on plain text: perplexity, niah_single, ...")

    def sized(self, size: Mapping[str, Any]) -> Any:
        """As for all tasks, but these are in prose whatever a model reads by default."""
        return super().sized({name: value for name, value in size.items() if name != "text"})

    def asked(self, run: RunContext, length: int, sample: int) -> list[Asked]:
        """Contexts of one sample and their queries; the same in every process."""
        raise NotImplementedError

    def unsupported_reason(self, run: RunContext) -> str | None:
        if reason := super().unsupported_reason(run):
            return reason
        most = cast(CausalLM, run.subject).max_context
        if self.lengths[-1] + self.reply > most:
            return f"{run.subject.name} reads {most} tokens, not {self.lengths[-1]} and a reply of {self.reply}"
        try:
            self.asked(run, self.lengths[0], 0)
        except TooShort as error:
            return f"{error}; give longer --lengths"
        except UserError as error:
            return str(error)
        return None

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            self.unit(run, length, sample, cost=self.reply) for length in self.lengths for sample in range(self.samples)
        ]

    def unit(self, run: RunContext, length: int, sample: int, cost: int) -> WorkUnit:
        """One sample under all arms; a reply has ``cost`` tokens, each of which costs as much as several read."""
        return WorkUnit(
            self.key, f"{length}/{sample}", length + 10 * len(run.arms) * cost, f"{self.name}, {length} tokens",
            {"length": length, "sample": sample},
        )  # fmt: skip

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        length, sample = unit.params["length"], unit.params["sample"]
        priors: dict[str, list[float]] = {}
        for asked in self.asked(run, length, sample):
            if not any(query.choices or (query.judges and self.reply) for query in asked.queries):
                continue
            arms = run.arms[:1] if asked.plain else run.arms
            number = 0
            for heads, queries in _read(run, asked, self.query_aware):
                for arm, cache in self.caches(run, heads, arms, asked.system):
                    at = _At(arm, length, sample, number, cache.bytes(), asked.text)
                    yield from self._choose(run, cache, queries, priors, at)
                    yield from self._replies(run, cache, queries, at)
                number += len(queries)
        run.advance(unit.cost)

    def caches(
        self, run: RunContext, heads: Sequence[list[int]], arms: Sequence[Arm], system: tuple[int, int] | None = None
    ) -> Iterator[tuple[Arm, Any]]:
        """The cache of each arm when all ``heads`` are read: here at once, compressed then."""
        prefix = Prefix(model_of(run), tensor(run, [[token for head in heads for token in head]]), arms, system)
        for arm in arms:
            with prefix.open(arm) as cache:
                yield arm, cache

    def _choose(
        self, run: RunContext, cache: Any, queries: Sequence[_Read], priors: dict[str, list[float]], at: _At
    ) -> Iterator[Row]:  # fmt: skip
        """Rows of all choices; ``cache`` stays as it is, and ``priors`` take those that have no metric."""
        for i, (tail, query) in enumerate(queries):
            if not query.choices:
                continue
            texts = [
                [tail + tokens(run, choice.opening + text) for text in choice.candidates] for choice in query.choices
            ]
            found = continued(model_of(run), copy.deepcopy(cache), texts, at.piece)
            for k, (choice, nats) in enumerate(zip(query.choices, found, strict=True)):
                if not choice.metric:
                    priors[choice.prior] = nats
                    continue
                value, lead = choice.value(nats, priors[choice.prior] if choice.prior else None)
                yield self._row(choice.metric, value, at, f"{at.first + i}.choice{k}", choice.at, lead=lead)

    def _replies(self, run: RunContext, cache: Any, queries: Sequence[_Read], at: _At) -> Iterator[Row]:
        """Rows of all written replies; ``cache`` is used up."""
        asked = [i for i, (_, query) in enumerate(queries) if query.judges and self.reply]
        replies: dict[int, str] = {}
        for group in _groups(run, cache, {i: len(queries[i][0]) for i in asked}, at):
            last = len(replies) + len(group) == len(asked)
            own = cache if last else copy.deepcopy(cache)  # no question sees another
            if len(group) > 1:
                own.batch_repeat_interleave(len(group))
            written = _written(run, own, [queries[i] for i in group], self.reply, at.piece)
            replies |= zip(group, written, strict=True)
        for i in asked:
            for k, judge in enumerate(queries[i][1].judges):
                shown, value = replies[i][:_SHOWN], judge.value(replies[i])
                yield self._row(judge.metric, value, at, f"{at.first + i}.{k}", judge.at, reply=shown)

    def _row(
        self, metric: str, value: float, at: _At, part: str, where: Mapping[str, Value], **about: Any
    ) -> Row:  # fmt: skip
        name = f"{at.length}-{at.sample}"
        return self.row(
            metric, at.arm, value, f"{name}.{part}", context=name, at={"length": at.length, **where}, bytes=at.held,
            about={**about, "text": at.text},
        )  # fmt: skip

    def draws(self, run: RunContext, length: int, sample: int) -> Generator:
        """Draws of one sample; those of another length or task are others."""
        return run.rng(task=self.name, length=length, sample=sample)


def _written(
    run: RunContext, cache: Any, group: Sequence[_Read], most: int, piece: int | None
) -> list[str]:  # fmt: skip
    """Replies to questions of which each has a row of ``cache``."""
    subject = cast(CausalLM, run.subject)

    def text(made: list[int]) -> str:
        return str(subject.tokenizer.decode(made, skip_special_tokens=True))

    def settled(query: Query) -> Callable[[list[int]], bool] | None:
        return (lambda made: all(judge.value(text(made)) == 1 for judge in query.judges)) if query.settled else None

    ends = run.kept("ends", lambda: end_tokens(subject.model, subject.tokenizer))
    made = greedy_rows(
        subject.model, cache, [tail for tail, _ in group], [min(most, query.most) for _, query in group],
        ends=ends, piece=piece, settled=[settled(query) for _, query in group],
    )  # fmt: skip
    return [text(one) for one in made]


def _groups(run: RunContext, cache: Any, lengths: Mapping[int, int], at: _At) -> list[list[int]]:
    """Questions, by their number, that are answered together, of which the ``lengths`` in tokens are given.

    As many as fit; of one length where padding would change a row; one by one beside strategies that act on attention.
    """
    alone = not all(isinstance(strategy, Cache) for strategy in at.arm.strategies)
    most = 1 if alone else sequences_at_once(run.device, _UNPACKED, at.held)
    padded = takes_padding(model_of(run), cache)
    alike: dict[int, list[int]] = {}
    for i, length in lengths.items():
        alike.setdefault(0 if padded else length, []).append(i)
    return [those[i : i + most] for those in alike.values() for i in range(0, len(those), most)]


def _read(
    run: RunContext, asked: Asked, query_aware: bool
) -> Iterator[tuple[list[list[int]], list[_Read]]]:  # fmt: skip
    """What is read before compression and after it, in tokens; if ``query_aware`` each query by itself."""
    heads = [tokens(run, head, first=not i) for i, head in enumerate(asked.heads)]
    tails = [(tokens(run, query.tail), query) for query in asked.queries]
    if not query_aware:
        yield heads, tails
        return
    for tail, query in tails:
        yield [*heads[:-1], heads[-1] + tail[:-1]], [(tail[-1:], query)]


def haystack(run: RunContext, name: str) -> Haystack:
    """Sentences of the user's texts, or of the texts called ``name``."""

    def make() -> Haystack:
        from ...data.texts import corpus

        return Haystack.of(run.data.get("texts") or corpus(name))

    return cast(Haystack, run.kept(("haystack", name), make))


def tokens(run: RunContext, text: str, first: bool = False) -> list[int]:
    """``text`` in tokens; ``first``: nothing stands before it, so that a tokenizer without template begins it."""
    tokenizer = cast(CausalLM, run.subject).tokenizer
    if not first:
        return encode(tokenizer, text)
    return list(tokenizer.encode(text, add_special_tokens=not chats(tokenizer), verbose=False))


def size(run: RunContext, asked: Asked) -> int:
    """Tokens of all heads and the longest tail."""
    read = sum(len(tokens(run, head, first=not i)) for i, head in enumerate(asked.heads))
    return read + max(len(tokens(run, query.tail)) for query in asked.queries)


def written(
    run: RunContext, messages: Sequence[Mapping[str, str]], question: str, prefix: str = ""
) -> tuple[str, str]:  # fmt: skip
    """Messages in the model's words, parted where the last one says ``question``; ``prefix`` begins the reply.

    A model without chat template reads what the messages say, an empty line between them.

    Raises:
        UserError: the template says the question in other words.
    """
    tokenizer = cast(CausalLM, run.subject).tokenizer
    if chats(tokenizer):
        whole = chat_text(tokenizer, messages) + prefix
    else:
        whole = "\n\n".join(message["content"] for message in messages) + f"\n{prefix}"
    if (place := whole.rfind(question)) < 0:
        raise UserError("the chat template changes what messages say, so that nothing can be asked in it")
    return whole[:place], whole[place:]
