# SPDX-License-Identifier: Apache-2.0
"""What a language model reads from its prompt, and what it knows without, when channels of its attention are damaged.

Contextual: a constant planted in code is asked for. Parametric: the next token of code, where that token did not stand
in the window before (what stood there can be copied).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...integrations.cache import cache_arguments
from ..text._text_task import model_of
from ._windows import WindowTask

__all__ = ["ChannelDamage"]

_BATCH = 8  # windows at once
CONTEXTUAL, PARAMETRIC = "planted constant", "new token"


@dataclass(frozen=True, kw_only=True)
class ChannelDamage(WindowTask):
    """A value for each window. ``kept`` is an arm's share of right answers over the baseline's in all windows.

    Where the baseline finds no constants, nothing can be told of an arm.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("constant_found", "planted constants found", higher=True, kind="share", floor=0.5),
        Metric("new_token", "next tokens foreseen, new to the window", higher=True, kind="share"),
        Metric("known_token", "next tokens foreseen, known from the window", higher=True, kind="share"),
        Metric("code_nll", "loss of code, nats/token", "nats/token"),
        Metric("kept", "right answers over those of the baseline", higher=True),
    )

    text: str = "code"

    def unsupported_reason(self, run: RunContext) -> str | None:
        return super().unsupported_reason(run) or self.contexts(run, self.windows_of).unsupported_reason(1, self.tokens)

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [WorkUnit(self.key, arm.key, 1.0, arm.key, {"arm": arm.key}) for arm in run.arms]

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = run.arm_of(unit)
        base = cast(dict[str, Any], run.kept("undamaged", lambda: self._read(run, run.baseline)))
        found = base if arm == run.baseline else self._read(run, arm)
        for name, values in found.items():
            yield from self.each(name, arm, values)
        for kind, name in ((CONTEXTUAL, "constant_found"), (PARAMETRIC, "new_token")):
            whole = max(float(base[name].mean()), 1 / len(base[name]))
            yield from self.each("kept", arm, found[name] / whole, at={"knowledge": kind})
        run.advance(unit.cost)

    def _read(self, run: RunContext, arm: Arm) -> dict[str, Any]:
        """What an arm finds and foresees, ``[windows_of]`` by metric."""
        import manyheads

        model: Any = model_of(run)
        planted = self.contexts(run, self.windows_of).single(self.tokens)
        prompts = [np.append(context.ids, context.questions[0].question) for context in planted]
        answers = [context.questions[0].answer for context in planted]
        right, hits, losses = [], [], []
        with manyheads.use(model, *arm.strategies):
            for prompt, answer in zip(prompts, answers, strict=True):
                right.append(_answer(model, torch.from_numpy(prompt)[None].to(run.device), len(answer)) == answer)
            code = self.windows(run)
            for rows in code.split(_BATCH):
                logits = model(rows[:, :-1], use_cache=False).logits.float()
                hits.append((logits.argmax(-1) == rows[:, 1:]).cpu())
                losses.append(cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1).cpu())
        hit, known = torch.cat(hits), _known(code.cpu())
        made = {
            "constant_found": torch.tensor(right), "new_token": _share(hit, ~known), "known_token": _share(hit, known),
            "code_nll": torch.cat(losses),
        }  # fmt: skip
        return {name: values.double().numpy() for name, values in made.items()}


def _answer(model: Any, ids: Tensor, count: int) -> list[int]:
    """The ``count`` likeliest tokens after ``ids [1, T]``, one after the other from the cache of one prefill."""
    made: list[int] = []
    step, given = ids, cache_arguments(model, DynamicCache(config=model.config))
    while len(made) < count:
        step = model(step, logits_to_keep=1, **given).logits[:, -1].argmax(-1, keepdim=True)
        made.append(int(step))
    return made


def _known(ids: Tensor) -> Tensor:
    """Which next tokens of ``ids [N, T + 1]`` stood before in the window, bool ``[N, T]``."""
    length = ids.shape[1] - 1
    before = torch.ones(length, length, dtype=torch.bool).tril()
    return ((ids[:, None, :-1] == ids[:, 1:, None]) & before).any(-1)


def _share(hit: Tensor, where: Tensor) -> Tensor:
    return (hit & where).sum(1) / where.sum(1).clamp(min=1)
