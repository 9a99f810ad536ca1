# SPDX-License-Identifier: Apache-2.0
"""Instruction following: rules that stand before a text, and whether the reply about the text keeps each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ....errors import UserError
from ....experiment.rows import Metric
from ....experiment.task import RunContext
from .._answered import Asked, Judge, Query, written
from .._choices import Choice
from ._chat import ChatTask, said
from ._rules import draw

__all__ = ["Instructions"]

_RULES = "I will show you a text and ask you for something. Keep these rules in your reply:\n{}\n\n"
_TEXT = "The text:\n{}\n\n"
_QUESTION = "Tell me in two sentences what the text is about."


@dataclass(frozen=True, kw_only=True)
class Instructions(ChatTask):
    """The rules are read and compressed with the text; the request comes after. A rule is a row, so that one can see
    which of them eviction loses (arXiv 2510.00231).

    ``preferred`` needs no reply: of two that differ only in what a rule is about, the one that keeps it has gained more
    likelihood by the rules than the other, against what the baseline says without them; guessing gets half.
    ``followed`` is of the written reply. Without the rules one kind of eight is mostly kept, the mark that is not to be
    used; ``unasked`` is what the baseline's reply to the same text without rules keeps of them.

    Attributes:
        rules: in each context, of different kinds.
    """  # fmt: skip

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("preferred", "rules preferred kept", higher=True, kind="share", floor=0.5),
        Metric("followed", "rules kept", higher=True, kind="share", floor=0.2),
        Metric("unasked", "rules kept unasked", higher=True, kind="share"),
    )
    lengths: tuple[int, ...] = (384,)
    rules: int = 2
    reply: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.rules <= 3:
            raise UserError("rules is 1, 2 or 3: more can contradict each other")

    def asked(self, run: RunContext, length: int, sample: int) -> list[Asked]:
        rules = draw(self.draws(run, length, sample), self.rules)
        sentences, text = self.passage(run, length, sample)
        listed = _RULES.format("\n".join(f"{i}. {rule.text}" for i, rule in enumerate(rules, 1)))

        def write(n: int) -> list[Asked]:
            body = _TEXT.format(" ".join(sentences[: n + 1]))
            made = []
            for before, judged, chosen in (("", "unasked", ""), (listed, "followed", "preferred")):
                head, tail = written(run, [said("user", before + body + _QUESTION)], _QUESTION)
                judges = tuple(Judge(judged, rule.kept, {"rule": rule.kind}) for rule in rules)
                choices = tuple(Choice(chosen, rule.replies, prior=rule.kind, at={"rule": rule.kind}) for rule in rules)
                made.append(Asked((head,), (Query(tail, judges, choices=choices),), text, plain=not before))
            return made

        return self.filled(run, length, write, len(sentences) - 1)
