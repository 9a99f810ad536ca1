# SPDX-License-Identifier: Apache-2.0
"""Search of functions by what they do, when the search's model reads less of each function."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ...data.functions import Function, documented_functions
from ...data.texts import standard_library
from ...errors import UserError, refusal
from ...experiment import Arm, Metric, Row, RunContext, Task, WorkUnit
from ...shortening import learn
from ...text_reducing import TextReducer
from ._reader import reader

__all__ = ["CodeSearch", "reciprocal_ranks"]


@dataclass(frozen=True)
class _Drawn:
    """Functions to find, in the order of their length, and those that weights and means are learned from."""

    sought: list[Function]
    others: list[Function]


@dataclass(frozen=True, kw_only=True)
class CodeSearch(Task):
    """Docstrings seek their functions among all, by the cosine of embeddings; each arm shortens the functions first.

    Embeddings are means of the last hidden states, less the mean of their side (docstrings or whole functions) over
    functions of other files, on which reducers that learn from attention learn. Docstrings are never shortened.
    ``seconds`` are of a function: shortening it and embedding it, a batch under every arm in turn; learning and opening
    are no part of them. An arm with the option ``shuffled`` has weights that are dealt anew among words, and among
    categories.

    Attributes:
        label: its name in an experiment that has it twice.
        model: an encoder or a causal language model, see :func:`manyheads.models.load_reader`.
        samples: functions that are sought.
        learned: functions of other files.
        shortest, longest: tokens of a function.
        per_file: functions of a file at most: those of one file are no independent samples.
        batch: functions at once.
        only: keys of the arms that are measured; all when empty.
    """

    subject: ClassVar[str] = "trainable"
    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("reciprocal_rank", "reciprocal rank", higher=True, kind="share", floor=0.2,
               what="1 over the place of the function among all, for its own docstring"),
        Metric("kept", "tokens that are left", kind="share", what="of those of the function"),
        Metric("seconds", "seconds a function", "s", kind="time"),
    )  # fmt: skip

    label: str = ""
    model: str = "all-minilm-l6-v2"
    samples: int = 500
    learned: int = 200
    shortest: int = 64
    longest: int = 250
    per_file: int = 6
    batch: int = 10
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.samples < 2 or self.learned < 2:
            raise UserError("a search needs 2 functions or more, and 2 others to learn from")

    def unsupported_reason(self, run: RunContext) -> str | None:
        for arm in self._arms(run):
            if wrong := [one.slug for one in arm.strategies if not isinstance(one, TextReducer)]:
                return f"{wrong[0]} shortens no texts"
        return refusal(lambda: reader(run, self.model), lambda: self._drawn(run))

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, "all", float(self.samples), f"{self.key}: search by {self.model}")]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        model, tokenizer = reader(run, self.model)
        drawn, arms = self._drawn(run), self._arms(run)
        queries, programs = ([getattr(one, name) for one in drawn.others] for name in ("query", "program"))
        middle = [_embedded(model, tokenizer, texts, self.batch).mean(0) for texts in (queries, programs)]
        asked = _embedded(model, tokenizer, [one.query for one in drawn.sought], self.batch) - middle[0]
        weights = {arm.key: self._weights(run, arm, drawn) for arm in arms}
        found: dict[str, list[Tensor]] = {arm.key: [] for arm in arms}
        for start in range(0, self.samples, self.batch):
            part = drawn.sought[start : start + self.batch]
            turn = start // self.batch % len(arms)
            for arm in arms[turn:] + arms[:turn]:
                run.synchronise()
                begun = time.perf_counter()
                texts = _shortened(arm, [one.program for one in part], tokenizer, weights[arm.key])
                found[arm.key].append(_embedded(model, tokenizer, texts, self.batch))
                run.synchronise()
                yield self.row("seconds", arm, (time.perf_counter() - begun) / len(part), f"{start}")
                for i, (one, text) in enumerate(zip(part, texts, strict=True), start):
                    sizes = [_size(tokenizer, x) for x in (text, one.program)]
                    yield self.row("kept", arm, sizes[0] / sizes[1], f"{i}", context=one.module)
            run.advance(len(part))
        for arm in arms:
            ranks = reciprocal_ranks(asked, torch.cat(found[arm.key]) - middle[1])
            for i, (one, value) in enumerate(zip(drawn.sought, ranks.tolist(), strict=True)):
                yield self.row("reciprocal_rank", arm, value, f"{i}", context=one.module)

    def _arms(self, run: RunContext) -> tuple[Arm, ...]:
        return tuple(arm for arm in run.arms if not self.only or arm.key in self.only)

    def _drawn(self, run: RunContext) -> _Drawn:
        """Functions of different files on the two sides."""

        def make() -> _Drawn:
            tokenizer = reader(run, self.model)[1]
            known = run.kept("functions", lambda: documented_functions(run.data.get("texts") or standard_library()))
            by_file: dict[str, list[Function]] = {}
            for one in known:
                if self.shortest <= _size(tokenizer, one.program) <= self.longest:
                    by_file.setdefault(one.module, []).append(one)
            rng, files, fit = run.rng(files=self.key), sorted(by_file), []
            for i in rng.permutation(len(files)):
                mine = by_file[files[int(i)]]
                fit += [mine[int(n)] for n in rng.permutation(len(mine))[: self.per_file]]
            sought, others = fit[: self.samples], fit[self.samples :]
            others = [one for one in others if one.module != sought[-1].module][: self.learned]
            if len(sought) < self.samples or len(others) < self.learned:
                raise UserError(
                    f"{len(fit)} functions with docstrings have {self.shortest} to {self.longest} tokens, fewer than "
                    f"{self.samples} to seek and {self.learned} of other files: lower samples or learned"
                )
            return _Drawn(sorted(sought, key=lambda one: len(one.program)), others)

        key = "drawn", self.model, self.samples, self.learned, self.shortest, self.longest, self.per_file
        return cast(_Drawn, run.kept(key, make))

    def _weights(self, run: RunContext, arm: Arm, drawn: _Drawn) -> Any:
        strategy = arm.strategy if arm.strategies else None
        if not isinstance(strategy, TextReducer) or not strategy.learns:
            return None
        model, tokenizer = reader(run, self.model)
        weights: Any = run.kept(
            ("weights", self.key), lambda: learn(strategy, model, tokenizer, [one.program for one in drawn.others])
        )
        return _dealt(weights, run, self.key) if arm.options.get("shuffled") else weights


def _dealt(weights: Any, run: RunContext, key: str) -> Any:
    """The same weights of other words and categories."""
    rng = run.rng(dealt=key)
    return type(weights)(*(
        dict(zip(table, [list(table.values())[int(i)] for i in rng.permutation(len(table))], strict=True))
        for table in (weights.statements, weights.words)
    ))  # fmt: skip


def _size(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _shortened(arm: Arm, programs: Sequence[str], tokenizer: Any, weights: Any) -> list[str]:
    if not arm.strategies:
        return list(programs)
    strategy = cast(TextReducer, arm.strategy)
    return [strategy.shorten(program, tokenizer, weights).text for program in programs]


@torch.no_grad()
def _embedded(model: Any, tokenizer: Any, texts: Sequence[str], batch: int) -> Tensor:
    """Means of the last hidden states of texts ``[N, dim]`` of length 1, float32."""
    base, means = model.base_model, []
    for start in range(0, len(texts), batch):
        rows = [tokenizer(text, verbose=False)["input_ids"] for text in texts[start : start + batch]]
        longest = max(map(len, rows))
        ids = torch.tensor([[*row, *[tokenizer.pad_token_id or 0] * (longest - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        ids, mask = ids.to(model.device), mask.to(model.device)
        hidden = base(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        means.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
    return torch.nn.functional.normalize(torch.cat(means), dim=-1)


def reciprocal_ranks(queries: Tensor, documents: Tensor) -> Tensor:
    """1 over the place of document i for query i, ``[N]``, by the cosine; of equal ones the last. Both ``[N, dim]``."""
    scores = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(documents, dim=1).T
    return 1 / (scores >= scores.diagonal()[:, None]).sum(1)
