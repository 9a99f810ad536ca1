# SPDX-License-Identifier: Apache-2.0
"""What the chat tasks share: models without a chat template are refused, and rewritten templates too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, cast

from ....experiment.subjects import CausalLM
from ....experiment.task import RunContext
from ....models.chat import chats
from .._answered import AnsweredTask, Asked, haystack, size
from .._haystack import fitted

__all__ = ["ChatTask", "said"]


def said(role: str, content: str) -> dict[str, str]:
    """A message."""
    return {"role": role, "content": content}


@dataclass(frozen=True, kw_only=True)
class ChatTask(AnsweredTask):
    """Base of the tasks in a model's chat template. ``reply=0`` writes no replies and judges by likelihood alone."""

    least_reply: ClassVar[int] = 0

    def unsupported_reason(self, run: RunContext) -> str | None:
        subject = cast(CausalLM, run.subject)
        if subject.tokenizer is not None and not chats(subject.tokenizer):
            return f"{subject.name} has no chat template, which {self.name} is asked in; give a chat model"
        return super().unsupported_reason(run)

    def filled(
        self, run: RunContext, length: int, write: Callable[[int], list[Asked]], most: int
    ) -> list[Asked]:  # fmt: skip
        """What ``write(n)`` asks with the largest ``n <= most`` with which all of it fits."""
        return fitted(write, lambda made: max(map(partial(size, run), made)), length, most)

    def passage(self, run: RunContext, length: int, sample: int) -> tuple[list[str], str]:
        """Sentences that a context is filled up with, more than fit, and the name of their text."""
        return haystack(run, self.text).drawn(run.rng(passage=self.name, length=length, sample=sample), length)
