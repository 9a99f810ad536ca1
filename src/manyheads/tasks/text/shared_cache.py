# SPDX-License-Identifier: Apache-2.0
"""Writers over one cache of blocks beside a batch of rows: what they predict, what they hold, the time of a token.

Options of an arm: ``blocks`` (``joint``: each writer sees the others; ``apart``: none; ``swapped``: one that reads the
same text cut in two, second half first, which is wrong). The baseline has none: rows of a batch, each with its own
cache of the prompt. Condition ``writers``.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ...attention.shared_block import Block
from ...experiment import Arm, Metric, Row, RunContext, WorkUnit
from ...integrations.cache import cache_arguments
from ...integrations.shared_blocks import SharedBlocks
from ...integrations.transformers import new_cache, prefill
from ...spec import parse
from ._text_task import TextTask, model_of, tensor

__all__ = ["SharedCache"]

_WARM = 2  # tokens before the clock


@dataclass(frozen=True, kw_only=True)
class SharedCache(TextTask):
    """Writers are fed the text that follows, each from another place of it.

    ``error`` is of logits, over their spread: of blocks that see no others against the rows of the batch; of joint
    blocks, for one writer, of the prompt cut at a random place into two blocks against the prompt as it is.

    Attributes:
        writers: how many.
        steps: tokens of each that are timed.
    """

    alone: ClassVar[bool] = True
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("error", "difference of logits, in their spread"),
        Metric("cache", "cache, bytes", "bytes"),
        Metric("step", "a token of every writer, ms", "ms", kind="time"),
    )

    writers: tuple[int, ...] = (1, 2, 4)
    steps: int = 12

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, f"{length}/{i}", length * len(run.arms), f"{length} tokens", {"length": length, "i": i})
            for length in self.lengths for i in range(self.samples)
        ]  # fmt: skip

    def rows(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        length, i = unit.params["length"], unit.params["i"]
        most, count = max(self.writers), self.steps + _WARM
        whole = self.contexts(run).plain("shared cache", length, self.samples, most + count)[i][0]
        ids, after = tensor(run, [whole[:length]]), whole[length:]
        model = model_of(run)
        cache = new_cache(model, parse("full"))
        prefill(model, ids, cache)
        prefill(model, tensor(run, [whole[: length + 1]]), cache)  # and its last token
        cut = int(run.rng(cut=i, length=length).integers(length // 4, 3 * length // 4))
        for writers in self.writers:
            fed = tensor(run, [after[w : w + count] for w in range(writers)])
            want, held, ms = self._batch(run, cache, fed)
            at, name = {"writers": writers, "length": length}, f"{length}.{i}"
            yield from self._told(run.baseline, at, name, held, ms)
            for arm in run.arms[1:]:
                kind = str(arm.options["blocks"])
                found, held, ms = self._blocks(run, cache, ids, fed, kind, cut)
                yield from self._told(arm, at, name, held, ms)
                if kind == "apart" or writers == 1:
                    error = (found - want).norm(dim=-1) / (want.std(-1) * want.shape[-1] ** 0.5)
                    yield self.row("error", arm, float(error.mean()), name, at=at)
            run.advance(unit.cost / len(self.writers))

    def _told(self, arm: Arm, at: dict[str, Any], name: str, held: int, ms: list[float]) -> Iterator[Row]:
        yield self.row("cache", arm, held, name, at=at)
        for k, value in enumerate(ms):
            yield self.row("step", arm, value, f"{name}.{k}", context=name, at=at)

    def _batch(self, run: RunContext, cache: Any, fed: Tensor) -> tuple[Tensor, int, list[float]]:
        model, own = model_of(run), copy.deepcopy(cache)
        own.batch_repeat_interleave(len(fed))
        given = cache_arguments(model, own)
        logits, ms = _timed(run, fed, lambda token: model(input_ids=token, **given).logits[:, -1])
        return logits, own.bytes(), ms

    def _blocks(
        self, run: RunContext, cache: Any, ids: Tensor, fed: Tensor, kind: str, cut: int
    ) -> tuple[Tensor, int, list[float]]:
        with SharedBlocks(model_of(run)) as blocks:
            whole = blocks.of(cache, ids.shape[1])
            head = [Block(), Block()] if whole is None or kind == "swapped" or len(fed) == 1 else [whole]
            if len(head) == 2:
                blocks.read_long(head[:1], ids[0, :cut].tolist())
                blocks.read_long(head, ids[0, cut:].tolist())
            if kind == "swapped":
                head.reverse()
            own = [Block() for _ in fed]
            views = [
                [*head, *(b for b in own if kind != "apart" and b is not block), block] for block in own
            ]  # fmt: skip
            logits, ms = _timed(
                run, fed, lambda token: blocks.read(list(zip(views, token.tolist(), strict=True)))
            )  # fmt: skip
            return logits, blocks.nbytes(*head, *own), ms


def _timed(run: RunContext, fed: Tensor, step: Any) -> tuple[Tensor, list[float]]:
    """Logits ``[W, V]`` after the last of ``fed [W, T]``, and milliseconds of each token but the first few."""
    ms = []
    for token in fed.split(1, 1):
        run.synchronise()
        start = time.perf_counter()
        logits = step(token)
        run.synchronise()
        ms.append(1000 * (time.perf_counter() - start))
    return logits.float(), ms[_WARM:]
