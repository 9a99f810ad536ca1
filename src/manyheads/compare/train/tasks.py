# SPDX-License-Identifier: Apache-2.0
"""What is done and measured: each unit trains or judges one model (the last one times all) and gives rows.

======== ========== ==========================================================================================
task     metric     value
======== ========== ==========================================================================================
tune     nats       loss on the validation part after a short training at ``rate``
train    nats       loss of the last tenth of the training; the model is kept
judge    nats       loss of a held-out window within the training length, nats per byte
judge    span       the same from byte ``first`` to ``last`` of the window, also beyond the training length
judge    needle     1 if all bytes of a planted constant are the likeliest, 0 else; ``nats`` per byte beside it
recall   right      share of right answers in a sequence of associative recall, by a model trained for it
cost     bytes      what the mixers remember after ``length`` tokens, per sequence
cost     decode     milliseconds of a token after ``length`` tokens, one row each
cost     speed      training tokens per second on sequences of ``length``, a row for each step under the clock
======== ========== ==========================================================================================
"""

import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ...data.synthetic import associative_recall
from ...errors import UserError
from ...models.decoder import Decoder, DecoderConfig
from ...tasks.text._contexts import Contexts
from ...training import BatchFn, Diverged, best_rate, token_nll, train_lm
from ...training.language import Batch
from ..results import Row
from .arms import Arm, build, check_causal
from .budget import Shares, Size
from .data import Stream

__all__ = ["Bench", "Unit", "measure", "model_folder", "plan", "rate_of", "spans"]

_RECALLED = 64  # sequences that associative recall is judged on
_WARM, _TIMED, _STEPS = 2, 10, 4  # tokens decoded before and under the clock; training steps under it
_CHUNK = 512  # tokens of a context that are read at once
_AT_ONCE = 16384  # tokens judged at once


_LABELS = {
    "tune": "learning rate {number}", "train": "training {number}", "judge": "judging {number}",
    "recall": "associative recall", "cost": "state, decoding and speed of all",
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """What is done and written at once; ``number`` is a rate's place, a seed, or 0."""

    task: str
    arm: Arm | None
    number: int = 0
    cost: float = 1.0  # expected seconds, for the progress display

    @property
    def name(self) -> str:
        return f"{self.task}/{'all' if self.arm is None else self.arm.key}/{self.number}"

    @property
    def label(self) -> str:
        """What the progress display says."""
        what = _LABELS[self.task].format(number=self.number + 1)
        return what if self.arm is None else f"{self.arm.key}: {what}"


@dataclass
class Bench:
    """What the units of a run share; ``tick`` hears of work done, in the unit's cost, ``rows`` are those so far."""

    arms: list[Arm]
    size: Size
    contexts: Contexts
    train: Tensor
    validation: Tensor  # [N, T + 1]
    folder: Path
    device: torch.device
    seed: int
    parameters: int
    recall_parameters: int
    reach: int
    planted: bool
    shares: Shares = field(init=False)
    rows: list[Row] = field(default_factory=list)
    tick: Callable[[float], None] = lambda part: None

    def __post_init__(self) -> None:
        self.shares = Shares.of(self.size)

    def stream(self, number: int) -> Stream:
        return Stream(self.train, self.size.length, self.size.batch, self.seed + number)

    def fit(
        self, unit: Unit, config: DecoderConfig, parameters: int, get_batch: BatchFn[Batch], steps: int,
        rates: list[float],
    ) -> tuple[Decoder, list[float], float]:  # fmt: skip
        """A new model of the unit's arm, trained, the loss of each step, and the rate: the first that does not diverge.

        Raises:
            UserError: all ``rates`` diverge.
        """
        assert unit.arm is not None
        number = 0 if unit.task == "tune" else unit.number
        for rate in rates:
            model = build(unit.arm, config, parameters, self.seed + number, self.device)
            try:
                state = train_lm(model, get_batch, steps, lr=rate, on_step=lambda _: self.tick(unit.cost / steps))
            except Diverged as error:
                if rate == rates[-1]:
                    raise Diverged(f"{unit.arm.key}: {error}") from error
            else:
                return model, state.losses, rate
        raise AssertionError("no rate to train at")

    def rates(self, arm: Arm) -> list[float]:
        """The rate found by tuning, and the lower ones should it diverge in a longer run."""
        best = rate_of(self.rows, arm.key)
        assert best is not None
        return sorted((rate for rate in self.size.rates if rate <= best), reverse=True)


def plan(bench: Bench, pace: dict[str, float]) -> list[Unit]:
    """Units in their order; ``pace`` is seconds per training token of each arm. Seeds take turns over all arms."""
    size, shares = bench.size, bench.shares
    tune, text = (steps * size.step for steps in (shares.tune, shares.text))
    recall = shares.recall * size.recall_batch * size.recall_length
    judged = size.samples * (bench.reach + 1) * size.length / 3  # a forward costs a third of a training step
    units = [Unit("tune", arm, i, tune * pace[arm.key]) for arm in bench.arms for i in range(len(size.rates))]
    for seed in range(size.seeds):
        for arm in bench.arms:
            units += [Unit("train", arm, seed, text * pace[arm.key]), Unit("judge", arm, seed, judged * pace[arm.key])]
    units += [Unit("recall", arm, 0, 2 * recall * pace[arm.key]) for arm in bench.arms]
    return [*units, Unit("cost", None, 0, 0.5 * size.lengths[-1] * sum(pace.values()))]


def measure(bench: Bench, unit: Unit) -> list[Row]:
    """Rows of ``unit``."""
    return list(_MEASURES[unit.task](bench, unit))


def model_folder(folder: Path, arm: str, seed: int) -> Path:
    """Where the model of an arm is kept."""
    return folder / "models" / re.sub(r"[^\w.-]+", "-", arm) / f"seed-{seed}"


def rate_of(rows: list[Row], arm: str) -> float | None:
    """The learning rate at which the arm's validation loss was lowest, None before it was tuned."""
    tuned = [row for row in rows if (row["task"], row["arm"]) == ("tune", arm)]
    return best_rate({row["rate"]: row["value"] for row in tuned}) if tuned else None


def spans(length: int, reach: int) -> list[tuple[int, int]]:
    """Parts of a window of ``reach * length`` bytes, each four times as far as the last, then by doubling."""
    ends = [length]
    while ends[0] > 32:
        ends.insert(0, ends[0] // 4)
    while ends[-1] < reach * length:
        ends.append(2 * ends[-1])
    return list(zip([0, *ends[:-1]], ends, strict=True))


def row(unit: Unit, arm: Arm, metric: str, context: str, length: int, value: float, **more: Any) -> Row:
    """One row of ``rows.jsonl``."""
    return {
        "unit": unit.name, "task": unit.task, "metric": metric, "arm": arm.key, "strategy": arm.strategy.slug,
        "spec": arm.key, "context": context, "length": length, "value": value, **more,
    }  # fmt: skip


def _tune(bench: Bench, unit: Unit) -> Iterator[Row]:
    assert unit.arm is not None
    size, rate = bench.size, bench.size.rates[unit.number]
    more: dict[str, Any] = {"rate": rate, "tokens": bench.shares.tune * size.step}
    try:
        model, _, _ = bench.fit(unit, size.text, bench.parameters, bench.stream(0), bench.shares.tune, [rate])
        value = float(token_nll(model, bench.validation).mean())
    except Diverged:  # as bad as knowing nothing
        value, more["diverged"] = math.log(size.text.vocab), True
    yield row(unit, unit.arm, "nats", "validation", size.length, value, **more)


def _train(bench: Bench, unit: Unit) -> Iterator[Row]:
    assert unit.arm is not None
    size, steps, stream = bench.size, bench.shares.text, bench.stream(unit.number)
    start, rates = time.perf_counter(), bench.rates(unit.arm)
    model, losses, rate = bench.fit(unit, size.text, bench.parameters, stream, steps, rates)
    model.save(model_folder(bench.folder, unit.arm.key, unit.number))
    tail = losses[-max(1, steps // 10) :]
    points = sorted({round(i * (steps - 1) / 31) for i in range(32)})
    yield row(
        unit, unit.arm, "nats", f"seed-{unit.number}", size.length, sum(tail) / len(tail), seed=unit.number, rate=rate,
        tokens=steps * size.step, seconds=time.perf_counter() - start, order=stream.order(steps),
        curve=[[(i + 1) * size.step, losses[i]] for i in points],
    )  # fmt: skip


def _load(bench: Bench, arm: Arm, number: int) -> Decoder:
    """The trained model, also of a strategy that the catalogue does not know."""
    model = build(arm, bench.size.text, bench.parameters, bench.seed + number, bench.device)
    path = model_folder(bench.folder, arm.key, number) / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is gone, and the run cannot go on without it; start again with another --out")
    model.load_state_dict(load_file(path, device=str(bench.device)))
    return model.eval()


def _judge(bench: Bench, unit: Unit) -> Iterator[Row]:
    assert unit.arm is not None
    model, length, seed = _load(bench, unit.arm, unit.number), bench.size.length, unit.number
    whole = bench.reach * length
    windows = bench.contexts.plain("loss", whole, bench.size.samples, 1)
    ids = torch.stack([torch.from_numpy(window) for window, _, _ in windows]).to(bench.device)
    check_causal(model, ids[:1, :length], unit.arm.key)  # again: training may open a path that was shut
    found = token_nll(model, ids, batch=max(1, _AT_ONCE // whole))
    for i, (_, text, overlaps) in enumerate(windows):
        more = {"seed": seed, "text": text, "overlaps": overlaps}
        yield row(unit, unit.arm, "nats", f"loss-{i}", length, float(found[i, :length].mean()), **more)
        for first, last in spans(length, bench.reach):
            value = float(found[i, first:last].mean())
            yield row(unit, unit.arm, "span", f"loss-{i}", length, value, first=first, last=last, **more)
    if bench.planted:
        inserter = bench.contexts.inserter
        planted = bench.contexts.single(length - inserter.question_size - inserter.answer_size)
        asked = [[*context.ids, *context.questions[0].question, *context.questions[0].answer] for context in planted]
        fed = torch.tensor(asked, device=bench.device)
        answers = fed[:, -inserter.answer_size :]
        with torch.no_grad():
            likeliest = model(fed[:, :-1])[0][:, -inserter.answer_size :].argmax(-1)
        cost = token_nll(model, fed)[:, -inserter.answer_size :].mean(1).tolist()
        right = (likeliest == answers).all(1).tolist()
        for i, (context, value) in enumerate(zip(planted, right, strict=True)):
            yield row(
                unit, unit.arm, "needle", f"needle-{i}", length, float(value), nats=cost[i], seed=seed,
                depth=context.questions[0].depth, text=context.text,
            )  # fmt: skip


def _recall(bench: Bench, unit: Unit) -> Iterator[Row]:
    assert unit.arm is not None
    size, steps = bench.size, bench.shares.recall

    def drawn(batch: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        ids, loss_mask = associative_recall(batch, size.recall_length, size.pairs, size.recall_vocab, generator)
        return ids.to(bench.device), loss_mask.to(bench.device)

    def get_batch(step: int) -> tuple[Tensor, Tensor]:
        return drawn(size.recall_batch, (bench.seed + 1) * 1_000_003 + step)

    rates = bench.rates(unit.arm)
    model, _, rate = bench.fit(unit, size.recall, bench.recall_parameters, get_batch, steps, rates)
    ids, loss_mask = drawn(_RECALLED, bench.seed)
    with torch.no_grad():
        right = (model(ids[:, :-1])[0].argmax(-1) == ids[:, 1:]) & loss_mask
    shares = (right.sum(1) / loss_mask.sum(1)).tolist()
    tokens = steps * size.recall_batch * size.recall_length
    for i, value in enumerate(shares):
        yield row(unit, unit.arm, "right", f"recall-{i}", size.recall_length, value, rate=rate, tokens=tokens)


def _cost(bench: Bench, unit: Unit) -> Iterator[Row]:
    """All arms token by token in turn, so that whatever else the machine does slows them alike."""
    models = {arm.key: _load(bench, arm, 0) for arm in bench.arms}
    text = torch.from_numpy(bench.contexts.plain("loss", bench.reach * bench.size.length, bench.size.samples, 1)[0][0])
    longest = bench.size.lengths[-1] + len(bench.size.lengths) * (_WARM + _TIMED)
    ids = text.repeat(1 + longest // len(text))[None, :longest].to(bench.device)
    states: dict[str, Any] = dict.fromkeys(models)
    read = before = 0
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=bench.device.type == "cuda"):
        for length in bench.size.lengths:
            for arm in bench.arms:
                for part in ids[:, read:length].split(_CHUNK, 1):
                    _, states[arm.key] = models[arm.key](part, state=states[arm.key])
                size = sum(state.nbytes for state in states[arm.key])
                yield row(unit, arm, "bytes", "cost-0", length, float(size))
            for i in range(_WARM + _TIMED):
                turn = i % len(bench.arms)
                for arm in bench.arms[turn:] + bench.arms[:turn]:
                    start = now(bench.device)
                    _, states[arm.key] = models[arm.key](ids[:, length + i : length + i + 1], state=states[arm.key])
                    passed = now(bench.device) - start
                    if i >= _WARM:
                        yield row(unit, arm, "decode", f"cost-{i}", length, 1000 * passed)
            read = length + _WARM + _TIMED
            bench.tick(unit.cost * (length - before) / bench.size.lengths[-1])
            before = length
    states.clear()
    for length in bench.size.speed_lengths:
        stream = replace(bench.stream(0), length=length, batch=max(1, bench.size.tokens // length))
        for _ in range(2):
            for arm in bench.arms:
                for seconds in step_times(models[arm.key], stream, _STEPS, bench.device):
                    yield row(unit, arm, "speed", "cost-0", length, stream.batch * length / seconds)


def step_times(model: Decoder, get_batch: BatchFn[Batch], steps: int, device: torch.device) -> list[float]:
    """Seconds of each training step but the first."""
    stamps: list[float] = []
    train_lm(model, get_batch, steps + 1, lr=1e-5, on_step=lambda _: stamps.append(now(device)))
    return [after - before for before, after in pairwise(stamps)]


def now(device: torch.device) -> float:
    """The time when the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


_MEASURES: dict[str, Callable[[Bench, Unit], Iterator[Row]]] = {
    "tune": _tune, "train": _train, "judge": _judge, "recall": _recall, "cost": _cost,
}  # fmt: skip
