# SPDX-License-Identifier: Apache-2.0
"""Windows of text that a language model reads whole, each from a text of its own, and its loss on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from ...errors import UserError
from ...experiment import CausalLM, Row, RunContext, Task, WorkUnit
from ...training import token_nll
from ..text._contexts import Contexts
from ..text._corpus import Corpus

__all__ = ["WindowTask", "nll"]

_BATCH = 8  # windows at once


@dataclass(frozen=True, kw_only=True)
class WindowTask(Task):
    """Base of the tasks on a language model that reads windows of text.

    Attributes:
        tokens: of a window.
        windows_of: how many windows.
        text: corpus of :mod:`manyheads.data.texts` where the user gives nothing.
    """

    subject: ClassVar[str] = "causal_lm"

    tokens: int = 256
    windows_of: int = 24
    text: str = "prose"

    def __post_init__(self) -> None:
        if self.windows_of < 2 or self.tokens < 32:
            raise UserError("give 2 windows or more, of 32 tokens or more")

    def unsupported_reason(self, run: RunContext) -> str | None:
        subject = cast(CausalLM, run.subject)
        if subject.tokenizer is None:
            return f"{subject.name} has no tokenizer, so that it reads no text"
        if self.tokens > subject.max_context:
            return f"{subject.name} reads {subject.max_context} tokens, not {self.tokens}"
        return None

    def contexts(self, run: RunContext, samples: int) -> Contexts:
        """Draws contexts from the text, the same ones in every process."""

        def make() -> Contexts:
            from ...data.texts import corpus

            tokenizer = cast(CausalLM, run.subject).tokenizer
            texts = run.data.get("texts") or corpus(self.text)
            return Contexts(Corpus(texts, tokenizer), tokenizer, samples, run.seed)

        return cast(Contexts, run.kept(("windows", self.text, samples), make))

    def windows(self, run: RunContext, use: str = "test") -> Tensor:
        """``[windows_of, tokens + 1]`` on the run's device; windows for two uses are drawn together and share none."""
        count = 2 * self.windows_of
        drawn = self.contexts(run, count).plain("windows", self.tokens, count, 1)
        chosen = drawn[: self.windows_of] if use == "test" else drawn[self.windows_of :]
        return torch.from_numpy(np.stack([ids for ids, _, _ in chosen])).to(run.device)

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        with torch.no_grad():
            yield from self.rows(run, unit)

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        """Rows of a unit, without gradients."""
        raise NotImplementedError


def nll(model: Any, ids: Tensor) -> Tensor:
    """Negative log-likelihood of each next token of ``ids [N, T + 1]``, nats, in the model's own precision."""
    return token_nll(model, ids, _BATCH)
