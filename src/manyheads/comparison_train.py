# SPDX-License-Identifier: Apache-2.0
"""The comparison of ``manyheads compare --train``: token mixers, each in a small language model, trained alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import catalog
from .errors import UserError
from .experiment.arms import Arm
from .experiment.design import Experiment, Planned
from .experiment.journal import FOLDER, RUN, Results, read_run
from .spec import parse, read, told_by_spec
from .strategy import Mixer, Ranker, Strategy

if TYPE_CHECKING:
    from .data.texts import Text
    from .experiment.executors import Executor
    from .progress import Progress

__all__ = [
    "BASE",
    "TrainingSize",
    "compare_on",
    "compare_trained",
    "mixers",
    "plan_on",
    "plan_training",
    "training_size",
]

BASE = "softmax"
_WISHED = ("softmax:window=64", "tnl_lightning", "minimax_hybrid:every=4", "blalm_mlstm", "coca")
# Of the budget of an arm; the rest is for associative recall. A tuning run has nearly half the length of a judged one:
# much shorter ones choose rates that are too large.
_TUNE, _TEXT = 0.25, 0.55
_FEWEST = 4  # steps of any training
_VALIDATED, _RECALLED = 32, 64  # sequences that a learning rate, and associative recall, are judged on
_TRAINING = 0.65  # of the minutes, at the speed of training on text; recall is slower, and measuring takes the rest
_ON_GPU = 8.0  # minutes when nothing is said: a GPU's speed is not known beforehand


@dataclass(frozen=True)
class TrainingSize:
    """Models and data of a comparison.

    Attributes:
        dim, layers, heads: of every model.
        length: bytes of a training sequence.
        tokens: of a training step, in sequences of ``length``.
        budget: tokens that each arm is trained on in all, tuning and associative recall included.
        rates: learning rates that every arm tries.
        seeds: trainings on text per arm.
        samples: held-out windows.
        reach: multiples of ``length`` that the held-out windows are long.
        lengths: tokens at which the state is weighed and decoding timed.
        pairs, recall_length, recall_vocab, recall_batch: of the associative recall.
        rounds: repetitions of the timing of training.
    """

    dim: int = 96
    layers: int = 4
    heads: int = 4
    length: int = 256
    tokens: int = 512
    budget: int = 600_000
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    seeds: int = 3
    samples: int = 32
    reach: int = 8
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    pairs: int = 4
    recall_length: int = 24
    recall_vocab: int = 18
    recall_batch: int = 8
    rounds: int = 8

    @property
    def batch(self) -> int:
        """Sequences of a step on text."""
        return max(1, self.tokens // self.length)

    @property
    def steps(self) -> tuple[int, int, int]:
        """Of a tuning run, one for each rate; of a training on text, one for each seed; of the one on recall.

        Raises:
            UserError: the budget is too small for any.
        """
        step = self.batch * self.length
        found = (
            int(_TUNE * self.budget / len(self.rates) / step),
            int(_TEXT * self.budget / self.seeds / step),
            int((1 - _TUNE - _TEXT) * self.budget / (self.recall_batch * self.recall_length)),
        )
        if min(found) < _FEWEST:
            least = _FEWEST * step * max(len(self.rates) / _TUNE, self.seeds / _TEXT)
            raise UserError(f"a budget of {self.budget:,} tokens is too small; give --budget {least:.0f} or more")
        return found

    @property
    def times(self) -> tuple[int, ...]:
        """Multiples of the length at which training is timed: by fours, up to two steps' tokens."""
        most = max(1, 2 * self.tokens // self.length)
        return tuple(4**i for i in range(most.bit_length()) if 4**i <= most)


CPU = TrainingSize()
QUICK = TrainingSize(
    dim=64, length=128, budget=100_000, seeds=2, samples=24, lengths=(128, 1024, 4096), rates=(3e-3, 1e-2), reach=4,
    rounds=4,
)  # fmt: skip
CUDA = TrainingSize(
    dim=512, layers=8, heads=8, length=1024, tokens=8192, budget=16_000_000, rates=(3e-4, 1e-3, 3e-3), samples=48,
    lengths=(1024, 4096, 16384, 65536), pairs=16, recall_length=128, recall_vocab=128, recall_batch=32,
)  # fmt: skip


def training_size(device: str = "cpu", quick: bool = False, **changes: Any) -> TrainingSize:
    """The size of a comparison on ``device``, with ``changes`` that are not None.

    Raises:
        UserError: a size that nothing can be trained or measured with.
    """
    size = QUICK if quick else CUDA if device.startswith("cuda") else CPU
    size = replace(size, **{name: value for name, value in changes.items() if value is not None})
    if size.length < 32:
        raise UserError("a training sequence has at least 32 bytes; give a longer --lengths")
    if min(size.seeds, size.samples) < 1:
        raise UserError("seeds and samples count repetitions: give 1 or more")
    lengths = tuple(sorted({size.length, *(n for n in size.lengths if n > size.length)}))
    return replace(size, lengths=lengths)


def mixers(strategies: Iterable[str | Strategy] | None = None, causal: bool = True) -> dict[str, Strategy]:
    """Token mixers by their specs, softmax attention first, each once; those that stand when None are given.

    Args:
        strategies: mixers or their specs.
        causal: of decoders; else of models that see both sides.

    Raises:
        UserError: unknown strategy or field, or a strategy that is no such token mixer.
    """
    if strategies is None:
        strategies = [spec for spec in _WISHED if catalog.get(read(spec).name).state != "planned"]
    found = {strategy.spec: strategy for strategy in map(parse, (BASE, *strategies))}
    for spec, strategy in found.items():
        if not isinstance(strategy, Mixer):
            raise UserError(f"{spec} is no token mixer: leave --train away to compare it on a model as it is")
        if causal and "causal" not in strategy.directions:
            ranks = "--ranking COLLECTION, or " if isinstance(strategy, Ranker) else ""
            raise UserError(
                f"{spec} sees both sides, and decoders are compared here: {ranks}name a task of encoders, such as "
                "--tasks sequence_classification"
            )
        if not causal and "bidirectional" not in strategy.directions:
            raise UserError(
                f"{spec} sees the past only, and the task is one of models that see both sides: leave it out"
            )
    return found


def plan_training(
    strategies: Iterable[str | Strategy] | None = None, size: TrainingSize | None = None
) -> Experiment:  # fmt: skip
    """The experiment of a comparison by training; trains and reads nothing.

    Args:
        strategies: mixers or their specs, see :func:`mixers`; those that the catalogue does not know have to be in the
            run's ``data["strategies"]`` by their specs.
        size: of models, data and budget, see :func:`training_size`; the CPU's when None.

    Raises:
        UserError: as for :func:`mixers`, or a budget that is too small.
    """
    from .tasks.training.associative_recall import AssociativeRecall
    from .tasks.training.byte_lm import ByteLM
    from .tasks.training.mixer_cost import MixerCost
    from .tasks.training.mixer_speed import MixerSpeed
    from .tasks.training.planted_constant import PlantedConstant

    size = size or CPU
    tune, text, recall = size.steps
    model: dict[str, Any] = {"dim": size.dim, "layers": size.layers, "heads": size.heads}
    trained = {
        **model, "length": size.length, "batch": size.batch, "steps": text, "tune_steps": tune, "rates": size.rates,
        "samples": size.samples, "validating": _VALIDATED,
    }  # fmt: skip
    on_text = ByteLM(**trained, reach=size.reach)
    tasks = (
        on_text,
        PlantedConstant(**trained),
        AssociativeRecall(
            **model, length=size.recall_length, batch=size.recall_batch, steps=recall, rates=size.rates,
            samples=_RECALLED, pairs=size.pairs, tokens=size.recall_vocab, trainings=1, tuned_by=on_text,
        ),
        MixerSpeed(
            **model, length=size.length, times=size.times, rounds=size.rounds,
            tokens=size.length * max(size.times[-1], size.batch // size.times[-1] * size.times[-1]),
        ),
        MixerCost(**model, length=size.length, lengths=size.lengths),
    )  # fmt: skip
    arms = tuple(Arm(spec, spec if told_by_spec(strategy) else "") for spec, strategy in mixers(strategies).items())
    return Experiment(
        subject="trainable", arms=arms, baseline=arms[0], tasks=tasks, equal="parameters", seeds=size.seeds
    )


def compare_trained(
    texts: Sequence[Text] | None = None, strategies: Iterable[str | Strategy] | None = None,
    budget: str | int | None = None, *, minutes: float | None = None, seeds: int | None = None,
    samples: int | None = None, length: int | None = None, quick: bool = False, size: TrainingSize | None = None,
    seed: int = 0, device: str = "cpu", out: str | Path = FOLDER, command: Sequence[str] = (),
    progress: Progress | None = None, options: Mapping[str, Any] | None = None, executor: Executor | None = None,
) -> Results:  # fmt: skip
    """Train a small language model for each token mixer on one budget, and keep rows and models in ``out``.

        results = manyheads.compare_trained(strategies=["tnl_lightning", MyMixer()])

    Arms differ in their mixer only: the same number of parameters within 2 %, the same bytes in the same order, the
    same learning rates tried. A run that was cut off goes on when it is called again with the same settings. The model
    of an arm's first training is ``out/models/<arm>/seed-0``, see :meth:`manyheads.models.decoder.Decoder.load`.

    Args:
        texts: what to learn, see :mod:`manyheads.data.texts`; the standard library's source when None.
        strategies: token mixers, or their specs; ``softmax`` is always among them.
        budget: of each arm, in tokens (``2M``), or of all arms in time (``10m``); the size's when None.
        minutes: in place of ``budget``: about so long, all arms together, by their speed on this machine.
        seeds: trainings on text per arm.
        samples: held-out windows.
        length: bytes of a training sequence.
        quick: a size for a first look.
        size: in place of the four above, see :func:`training_size`.
        seed: of all draws.
        device: ``cpu`` or ``cuda``.
        out: folder of the results.
        command: what was typed, for the report.
        progress: is told how far the run is.
        options: settings to keep in ``run.json``.
        executor: where units run; this process when None.

    Raises:
        UserError: anything that the caller can mend, before any training; a mixer that sees the future among it.
    """
    from .data.texts import standard_library
    from .experiment.runner import run
    from .tasks.training._bytes import split

    tokens, minutes = _budget(budget, minutes, device, quick, size)
    size = size or training_size(device, quick, seeds=seeds, samples=samples, length=length)
    size = replace(size, budget=tokens or size.budget)
    made = mixers(strategies)
    own = {spec: strategy for spec, strategy in made.items() if not told_by_spec(strategy)}
    read_texts = list(standard_library() if texts is None else texts)
    data = {"texts": read_texts, "strategies": own}
    if minutes is not None:
        found = _earlier_budget(Path(out), minutes)
        if found is None:
            found = _affordable(minutes, plan_training(made.values(), size).at("cpu"), seed, device, data)
        size = replace(size, budget=found)
    about = {
        "command": list(command), "options": dict(options or {}), "kind": "train",
        "training": {
            **asdict(size), "minutes": minutes, "steps": dict(zip(("tune", "text", "recall"), size.steps, strict=True)),
            "parts": {part: sum(len(t.content.encode()) for t in some) for part, some in split(read_texts).items()},
        },
    }  # fmt: skip
    return run(
        plan_training(made.values(), size).at("cpu"), out, seed=seed, device=device, data=data, executor=executor,
        progress=progress, about=about,
    )  # fmt: skip


def plan_on(
    tasks: Sequence[str], strategies: Iterable[str], seeds: int | None = None, samples: int | None = None
) -> Experiment:
    """The experiment of :func:`compare_on`; trains and reads nothing."""
    from .tasks import given

    read_tasks = [given(task) for task in tasks]
    made: list[Any] = [
        task if samples is None or "samples" in own else task.sized({"samples": samples}) for task, own in read_tasks
    ]
    if wrong := [task.name for task in made if task.subject != "trainable"]:
        raise UserError(f"{wrong[0]} measures on a model as it is: leave --train away")
    directions = {bool(getattr(getattr(task, "kind", None), "causal", True)) for task in made}
    if len(directions) > 1:
        raise UserError("some of these tasks are of decoders, others of models that see both sides: compare them apart")
    arms = tuple(Arm(spec, spec) for spec in mixers(strategies, directions.pop()))
    return Experiment(
        subject="trainable", arms=arms, baseline=arms[0], tasks=tuple(made), equal="parameters", seeds=seeds or 3
    )


def compare_on(
    tasks: Sequence[str], strategies: Iterable[str], *, seeds: int | None = None, samples: int | None = None,
    texts: Sequence[Text] | None = None, seed: int = 0, device: str = "cpu", out: str | Path = FOLDER,
    command: Sequence[str] = (), progress: Progress | None = None, options: Mapping[str, Any] | None = None,
    executor: Executor | None = None,
) -> Results:  # fmt: skip
    """Train a small model for each token mixer on tasks of one's own choice, which say how large and how long.

        results = compare_on(["sequence_classification:data=tones,length=1024,stride=16"], ["maelre"])

    Args:
        tasks: names of tasks that train, with fields, see :func:`manyheads.tasks.given`.
        strategies: specs of mixers; ``softmax`` is always among them.
        seeds: trainings of each arm; 3 when None.
        samples: that are judged; each task's own number when None.
        texts, seed, device, out, command, progress, options, executor: as for :func:`compare_trained`.

    Raises:
        UserError: a task or mixer that does not fit, before any training.
    """
    from .experiment.runner import run

    data = {} if texts is None else {"texts": list(texts)}
    about = {"command": list(command), "options": dict(options or {}), "kind": "train"}
    return run(
        plan_on(tasks, strategies, seeds, samples).at("cpu"), out, seed=seed, device=device, data=data,
        executor=executor, progress=progress, about=about,
    )  # fmt: skip


def _budget(
    budget: str | int | None, minutes: float | None, device: str, quick: bool, size: TrainingSize | None
) -> tuple[int | None, float | None]:
    """Tokens of each arm, or minutes of all."""
    from .training.budget import Budget

    if budget is not None and minutes is not None:
        raise UserError("give --budget or --minutes, not both")
    if minutes is not None and minutes <= 0:
        raise UserError("--minutes is a time above 0")
    if budget is None:
        silent = minutes is None and size is None and device.startswith("cuda") and not quick
        return None, _ON_GPU if silent else minutes
    found = Budget(budget, "tokens") if isinstance(budget, int) else Budget.parse(budget)
    if found.unit == "steps":
        raise UserError("arms share a budget in tokens or time; write for instance --budget 2M or --budget 10m")
    return (None, found.amount / 60) if found.unit == "seconds" else (int(found.amount), None)


def _affordable(minutes: float, plan: Planned, seed: int, device: str, data: Mapping[str, Any]) -> int:
    """Tokens per arm, to two digits, that fit into so many minutes."""
    from .experiment.runner import context
    from .tasks.training._decoders import decoder_of
    from .tasks.training.byte_lm import ByteLM
    from .training import train_lm

    made, task = context(plan, seed, device, data), plan.tasks[0]
    assert isinstance(task, ByteLM)
    task.guard(made)
    seconds = 0.0
    for arm in plan.arms:
        stamps: list[float] = []
        model, draw = decoder_of(made, arm, task.config, task.parameters), task.batches(made, 0)
        train_lm(
            model, lambda step, draw=draw: (draw(step)[0].to(made.device), None), 3, lr=1e-5,  # type: ignore[misc]
            on_step=lambda _, stamps=stamps: stamps.append(_now(made)),  # type: ignore[misc]
        )  # fmt: skip
        seconds += min(after - before for before, after in pairwise(stamps)) / (task.batch * task.length)
    return int(float(f"{_TRAINING * 60 * minutes / seconds:.1e}"))


def _now(made: Any) -> float:
    from .tasks.training._decoders import now

    return now(made)


def _earlier_budget(out: Path, minutes: float) -> int | None:
    """The budget of an unfinished run of as many minutes in this folder: what is left of it must not be another."""
    if not (out / RUN).exists():
        return None
    training: Mapping[str, Any] = read_run(out).get("training", {})
    return training.get("budget") if training.get("minutes") == minutes else None
