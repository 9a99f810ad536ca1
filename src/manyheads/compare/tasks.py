# SPDX-License-Identifier: Apache-2.0
"""What is measured: each task turns a unit of contexts into rows, one for every arm, context and figure.

Every figure comes after compression: what an answer is predicted from has passed through the compressed cache. So the
last token of a question that is asked *before* compression stays out of the prefill, and the first token of a
continuation is fed, not judged.

======== ======= ==========================================================================================
task     metric  value
======== ======= ==========================================================================================
loss     nats    mean negative log-likelihood of ``TARGET`` tokens of the text that follows
needle   unseen  1 if all tokens of the answer are the likeliest, 0 else; asked after compression
needle   seen    the same with the question read before compression
several  unseen  one of several constants
chained  unseen  an alias of a constant, asserted link by link: two lines have to be found
speed    prefill seconds of the dense prefill and this arm's compression of it
speed    decode  milliseconds of a token, one row each
memory   cache   bytes held after compression, per sequence
memory   peak    bytes allocated at most on the GPU while this arm prefills and decodes
======== ======= ==========================================================================================
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from ..attention.budget import keep_limit
from ..tasks.text._contexts import ALIASES, CONSTANTS, Question
from .arms import Arm, Prefix, forward_chunked
from .bench import TARGET, Bench, Row, Unit

__all__ = ["TASKS", "measure", "unsupported_reason", "plan"]

TASKS = ("loss", "needle", "several", "chained", "speed", "memory")
_OLD = {"niah_multikey": "several", "variable_tracking": "chained"}
_WARM, _TIMED = 2, 8  # tokens decoded before and under the clock


def plan(bench: Bench, tasks: tuple[str, ...], rounds: int) -> list[Unit]:
    """Units of a run in their order; the port of the model must be open."""
    per_token, arms, longest = bench.bytes_per_token(), len(bench.arms), max(bench.lengths)
    units: list[Unit] = []

    def add(task: str, length: int, sequences: int, cost: float) -> None:
        """Spread the contexts over batches whose dense caches, ``sequences`` to a context, fit."""
        size = max(1, bench.rows_at_once(length, per_token) // sequences)
        batches = ceil(bench.contexts.samples / size)
        for i in range(batches):
            first, last = i * bench.contexts.samples // batches, (i + 1) * bench.contexts.samples // batches
            units.append(Unit(task, length, first, last - first, (last - first) * cost))

    if "loss" in tasks:
        add("loss", longest, 1, longest + TARGET * arms * len(bench.lengths))
    if "needle" in tasks:
        for length in bench.lengths:
            add("needle", length, 1, length + 20 * arms)
    if "several" in tasks or "chained" in tasks:
        add("several", longest, 4, longest + 80 * arms)
    if "memory" in tasks:
        units += [Unit("memory", length, cost=length) for length in bench.lengths]
    if "speed" in tasks:
        units += [Unit("speed", longest, i, cost=longest + 100 * arms) for i in range(rounds)]
    return units


def unsupported_reason(bench: Bench, task: str) -> str | None:
    """Why ``task`` cannot be measured on this vocabulary and these lengths, None if it can."""
    lines = {"needle": 1, "several": CONSTANTS + ALIASES, "chained": CONSTANTS + ALIASES}.get(task)
    return None if lines is None else bench.contexts.unsupported_reason(lines, min(bench.lengths))


def measure(bench: Bench, unit: Unit) -> list[Row]:
    """Rows of ``unit``; the port of the model must be open."""
    with torch.inference_mode():
        return list(_MEASURES[unit.task](bench, unit))


def _row(unit: Unit, arm: Arm, metric: str, context: str, length: int, value: float, **more: Any) -> Row:
    return {
        "unit": unit.name, "task": unit.task, "metric": metric, "arm": arm.key, "strategy": arm.slug,
        "spec": arm.strategy.spec, "budget": arm.budget, "context": context, "length": length, "value": value, **more,
    }  # fmt: skip


def _chunk_size(arm: Arm, length: int) -> int | None:
    return arm.chunk_size(keep_limit(arm.budget, length))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of ``targets [B, T]`` under ``logits [B, T, V]``, float32 ``[B, T]``."""
    return -logits.log_softmax(-1).gather(2, targets[..., None])[..., 0]


def _loss(bench: Bench, unit: Unit) -> Iterator[Row]:
    """One prefill serves all lengths: it reads on from one to the next."""
    lengths = sorted(bench.lengths)
    contexts = bench.contexts.plain("loss", unit.length, bench.contexts.samples, TARGET + 1)
    contexts = contexts[unit.first : unit.first + unit.count]
    ids = bench.tensor([context for context, _, _ in contexts])
    prefix: Prefix | None = None
    for length in lengths:
        if prefix is None:
            prefix = Prefix(bench.model, ids[:, :length], bench.arms)
        else:
            prefix.extend(ids[:, prefix.ids.shape[1] : length])
        fed, targets = ids[:, length : length + TARGET], ids[:, length + 1 : length + TARGET + 1]
        for arm in bench.arms:
            with prefix.open(arm) as cache:
                held = cache.bytes() / len(contexts)
                nats = (
                    token_nll(forward_chunked(bench.model, cache, fed, TARGET, _chunk_size(arm, length)), targets)
                    .mean(1)
                    .tolist()
                )
            for i, (value, (_, text, overlaps)) in enumerate(zip(nats, contexts, strict=True), unit.first):
                yield _row(
                    unit,
                    arm,
                    "nats",
                    f"loss-{i}",
                    length,
                    value,
                    tokens=TARGET,
                    bytes=held,
                    text=text,
                    overlaps=overlaps,
                )
            bench.tick(unit.cost / len(bench.arms) / len(lengths))


def _answers(
    bench: Bench, cache: Any, fed: Tensor, answers: Tensor, chunk_size: int | None
) -> tuple[list[bool], list[float]]:
    """For each row whether its whole answer is the likeliest, and the nats of a token of it."""
    fed = torch.cat([fed, answers[:, :-1]], 1)
    logits = forward_chunked(bench.model, cache, fed, answers.shape[1], chunk_size)
    return (logits.argmax(-1) == answers).all(1).tolist(), token_nll(logits, answers).mean(1).tolist()


def _needle(bench: Bench, unit: Unit) -> Iterator[Row]:
    contexts = bench.contexts.single(unit.length)[unit.first : unit.first + unit.count]
    prefix = Prefix(bench.model, bench.tensor([c.ids for c in contexts]), bench.arms)
    asked = bench.tensor([c.questions[0].question for c in contexts])
    answers = bench.tensor([c.questions[0].answer for c in contexts])
    for metric in ("unseen", "seen"):
        if metric == "seen":
            prefix.extend(asked[:, :-1])
            asked = asked[:, -1:]
        for arm in bench.arms:
            with prefix.open(arm) as cache:
                held = cache.bytes() / len(contexts)
                right, nats = _answers(bench, cache, asked, answers, _chunk_size(arm, unit.length))
            for i, context in enumerate(contexts):
                yield _row(
                    unit, arm, metric, f"needle-{unit.length}-{unit.first + i}", unit.length, float(right[i]),
                    nats=nats[i],
                    depth=context.questions[0].depth, bytes=held, text=context.text, overlaps=context.overlaps,
                )  # fmt: skip
            bench.tick(unit.cost / len(bench.arms) / 2)


def _several(bench: Bench, unit: Unit) -> Iterator[Row]:
    """Questions about several constants and their aliases; all of one size go through as one batch."""
    contexts = bench.contexts.multikey(unit.length)[unit.first : unit.first + unit.count]
    prefix = Prefix(bench.model, bench.tensor([c.ids for c in contexts]), bench.arms)
    rows = bench.rows_at_once(unit.length, bench.bytes_per_token())
    sizes: dict[tuple[int, int], list[tuple[int, Question]]] = {}  # one batch holds questions of one size
    for i, context in enumerate(contexts):
        for question in (q for q in context.questions if _OLD[q.task] in bench.tasks):
            sizes.setdefault((len(question.question), len(question.answer)), []).append((i, question))
    groups = [group[i : i + rows] for group in sizes.values() for i in range(0, len(group), rows)]
    for arm in bench.arms:
        for group in groups:
            with prefix.open(arm) as cache:
                held = cache.bytes() / len(contexts)
                cache.reorder_cache(torch.tensor([i for i, _ in group], device=bench.device))
                fed = bench.tensor([question.question for _, question in group])
                answers = bench.tensor([question.answer for _, question in group])
                right, nats = _answers(bench, cache, fed, answers, _chunk_size(arm, unit.length))
            for (i, question), value, cost in zip(group, right, nats, strict=True):
                context = contexts[i]
                yield _row(
                    unit, arm, "unseen", f"several-{unit.first + i}", unit.length, float(value), nats=cost,
                    depth=question.depth, bytes=held, text=context.text, overlaps=context.overlaps,
                ) | {"task": _OLD[question.task], "question": context.questions.index(question)}  # fmt: skip
        bench.tick(unit.cost / len(bench.arms))


def _memory(bench: Bench, unit: Unit) -> Iterator[Row]:
    context, text, _ = bench.contexts.plain("memory", unit.length, 1, 1)[0]
    ids, following = bench.tensor([context[:-1]]), bench.tensor([context[-1:]])
    prefix = Prefix(bench.model, ids, bench.arms)
    cuda = bench.device.type == "cuda"
    for arm in bench.arms:
        with prefix.open(arm) as cache:
            held = cache.bytes()
        yield _row(unit, arm, "cache", "memory-0", unit.length, float(held), bytes=held, text=text)
    del prefix
    for arm in bench.arms if cuda else ():
        torch.cuda.reset_peak_memory_stats(bench.device)
        with Prefix(bench.model, ids, bench.arms).open(arm) as cache:
            forward_chunked(bench.model, cache, following, 1)
        peak = torch.cuda.max_memory_allocated(bench.device)
        yield _row(unit, arm, "peak", "memory-0", unit.length, float(peak), text=text)
    bench.tick(unit.cost)


def _speed(bench: Bench, unit: Unit) -> Iterator[Row]:
    """One round: a dense prefill, and from it every arm in turn, in another order each round."""
    steps = _WARM + _TIMED
    context, text, _ = bench.contexts.plain("speed", unit.length, 1, steps)[0]
    ids, following = bench.tensor([context[: unit.length]]), bench.tensor([context[unit.length :]])
    Prefix(bench.model, ids[:, :64], bench.arms)  # warm-up
    dense, prefix = _timed(bench, lambda: Prefix(bench.model, ids, bench.arms))
    turn = unit.first * 5 % len(bench.arms)
    for arm in bench.arms[turn:] + bench.arms[:turn]:
        start = _now(bench)
        with prefix.open(arm) as cache:
            opened = _now(bench) - start
            seconds = [
                _timed(bench, partial(forward_chunked, bench.model, cache, token, 1))[0]
                for token in following.split(1, 1)
            ]
        name = f"speed-{unit.first}"
        yield _row(unit, arm, "prefill", name, unit.length, opened + (dense if arm.forks else 0.0), text=text)
        for value in seconds[_WARM:]:
            yield _row(unit, arm, "decode", name, unit.length, 1000 * value, text=text)
        bench.tick(unit.cost / len(bench.arms))


def _now(bench: Bench) -> float:
    bench.synchronise()
    return time.perf_counter()


def _timed(bench: Bench, work: Callable[[], Any]) -> tuple[float, Any]:
    start = _now(bench)
    result = work()
    return _now(bench) - start, result


_MEASURES: dict[str, Callable[[Bench, Unit], Iterator[Row]]] = {
    "loss": _loss, "needle": _needle, "several": _several, "memory": _memory, "speed": _speed,
}  # fmt: skip
