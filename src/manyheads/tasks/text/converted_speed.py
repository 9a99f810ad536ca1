# SPDX-License-Identifier: Apache-2.0
"""Seconds of a prompt, milliseconds of a token after it and bytes of a converted model, all arms in turn.

Whatever else runs slows all arms alike: a round times each of them once, in another order every round. What is cut
does not depend on the text as far as time goes, so that conversions are calibrated on little of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch

from ...conversion import SurgeryPlan
from ...converter import Material, convert_model
from ...errors import UserError
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, Task, WorkUnit
from ...integrations.cache import cache_arguments
from ...integrations.surgery import converted
from ._text_task import model_of

__all__ = ["ConvertedSpeed", "held_bytes"]

_WARM = 2  # tokens written before the clock counts
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class ConvertedSpeed(Task):
    """A value for each round, and for each token of a round.

    Attributes:
        text: a corpus of :mod:`manyheads.data.texts`.
        prompt: tokens that are read.
        written: tokens after them that are timed.
        rounds: repetitions.
        timed: keys of the arms that are timed; all of them when empty.
    """

    subject: ClassVar[str] = "causal_lm"
    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("prefill", "prompt, s", "s", kind="time", what="time to read the text"),
        Metric("decode", "token, ms", "ms", kind="time", what="time for each token that is written afterwards"),
        Metric("weights", "weights, MiB", "MiB", what="bytes of the parameters"),
        Metric("cache", "cache, MiB", "MiB", what="bytes of keys and values, or of states, after the prompt"),
    )

    text: str = "prose"
    prompt: int = 512
    written: int = 16
    rounds: int = 4
    timed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.prompt, self.written, self.rounds) < 1:
            raise UserError("prompt, written and rounds count, 1 or more")

    def unsupported_reason(self, run: RunContext) -> str | None:
        lm = cast(CausalLM, run.subject)
        return None if lm.tokenizer is not None else f"{lm.name} has no tokenizer, so that it reads no text"

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = len(self._arms(run)) * (0.01 * self.prompt + self.written)
        return [WorkUnit(self.key, f"{i}", cost, "speed of converted models", {"round": i}) for i in range(self.rounds)]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        from transformers import DynamicCache

        arms, turn = self._arms(run), unit.params["round"]
        text = run.kept("text of the speed", lambda: self._material(run)).train
        ids = text[: self.prompt + _WARM + self.written][None].to(run.device)
        first = turn * 5 % len(arms)
        for arm in arms[first:] + arms[:first]:
            plan = run.kept(("plan", arm.key), partial(self._plan, run, arm))
            model = converted(model_of(run), plan)
            _timed(run, model, DynamicCache(config=model.config), ids[:, :16])
            cache: Any = DynamicCache(config=model.config)
            seconds = [_timed(run, model, cache, ids[:, : self.prompt])]
            held = held_bytes(cache)
            seconds += [_timed(run, model, cache, token) for token in ids[:, self.prompt :].split(1, 1)]
            yield self.row("prefill", arm, seconds[0], f"{turn}")
            for i, value in enumerate(seconds[1 + _WARM :]):
                yield self.row("decode", arm, 1000 * value, f"{turn}.{i}", context=f"{turn}")
            if turn == 0:
                yield self.row("weights", arm, sum(p.nbytes for p in model.parameters()) / _MIB, "model")
                yield self.row("cache", arm, held / _MIB, "model")
            run.advance(unit.cost / len(arms))

    def _arms(self, run: RunContext) -> tuple[Arm, ...]:
        return tuple(arm for arm in run.arms if not self.timed or arm.key in self.timed)

    def _plan(self, run: RunContext, arm: Arm) -> SurgeryPlan:
        if not arm.spec:
            return SurgeryPlan(())
        material = run.kept("text of the speed", lambda: self._material(run))
        strategy: Any = arm.strategy
        return convert_model(model_of(run), strategy, material, sequences=2, stages=False).plan

    def _material(self, run: RunContext) -> Material:
        from ...data.texts import corpus

        return Material.of(corpus(self.text), cast(CausalLM, run.subject).tokenizer, 64, 1)


def held_bytes(cache: Any) -> int:
    """Bytes of keys and values in a cache of transformers, or of the states of linear attention."""
    states = [layer.state for layer in cache.layers if getattr(layer, "state", None) is not None]
    kept = [x for layer in cache.layers if layer.is_initialized for x in (layer.keys, layer.values) if x is not None]
    return sum(x.nbytes for x in (*states, *kept))


@torch.inference_mode()
def _timed(run: RunContext, model: Any, cache: Any, ids: torch.Tensor) -> float:
    run.synchronise()
    start = time.perf_counter()
    model(input_ids=ids, logits_to_keep=1, **cache_arguments(model, cache))
    run.synchronise()
    return time.perf_counter() - start
