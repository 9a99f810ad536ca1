# SPDX-License-Identifier: Apache-2.0
"""A comparison from beginning to end."""

import datetime
import hashlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import environment
from ..catalog import nearest
from ..data.texts import Text, digest, standard_library
from ..errors import UserError
from ..integrations import use
from ..progress import Progress
from ..strategy import Strategy
from ..tasks.text._contexts import Contexts
from ..tasks.text._corpus import Corpus
from .arms import Arm, make_arms
from .bench import TARGET, Bench, Row
from .defaults import BUDGETS, LENGTHS, SAMPLES, STRATEGIES
from .results import FOLDER, Journal, Results
from .tasks import TASKS, measure, plan, unsupported_reason

__all__ = ["BUDGETS", "FOLDER", "LENGTHS", "SAMPLES", "STRATEGIES", "Progress", "check", "compare", "work"]

ROUNDS = 2
_SHORTEST = 32  # tokens of a context


def compare(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[Text] | None = None,
    strategies: Iterable[str | Strategy] = STRATEGIES,
    budgets: Sequence[int | float | str] = BUDGETS,
    tasks: Sequence[str] = TASKS,
    *,
    lengths: Sequence[int] | None = None,
    samples: int = SAMPLES,
    rounds: int = ROUNDS,
    seed: int = 0,
    out: str | Path = FOLDER,
    origin: str | None = None,
    command: Sequence[str] = (),
    progress: Progress | None = None,
    options: dict[str, Any] | None = None,
) -> Results:
    """Compare strategies on a model and text, and keep the rows in ``out``.

        model, tokenizer = manyheads.models.load_default()
        results = manyheads.compare.compare(model, tokenizer, strategies=["snapkv", "keydiff"], budgets=[0.25])

    Every arm (a strategy at a budget) sees the same contexts. A run that was cut off goes on when it is called again
    with the same settings and folder; quality figures are the same on the same machine, however often it is cut off.

    Args:
        model: a causal language model of transformers, in evaluation mode, on the device to use.
        tokenizer: its tokenizer.
        texts: what to read, see :mod:`manyheads.data.texts`; the standard library's source when None.
        strategies: strategies or their specs; ``full`` is always among them.
        budgets: fractions in (0, 1] of the tokens of a context, or whole numbers of slots.
        tasks: some of :data:`manyheads.compare.tasks.TASKS`.
        lengths: tokens of a context; when None, 1024 and 2048 as far as the model reads so many.
        samples: contexts per task and length.
        rounds: repetitions of the timing.
        seed: of all draws.
        out: folder of the results.
        origin: what the model is called in the report; its class when None.
        command: what was typed, for the report.
        progress: hears how far the run is.
        options: more settings to keep in ``run.json``.

    Raises:
        UserError: anything that the caller can mend, before any work is done.
    """
    chosen = _tasks(tasks)
    if samples < 1 or rounds < 1:
        raise UserError("samples and rounds count repetitions: give 1 or more")
    sizes = _lengths(model, lengths)
    arms = make_arms(strategies, budgets, sizes[0])
    read = list(standard_library() if texts is None else texts)
    bench = Bench(model, Contexts(Corpus(read, tokenizer), tokenizer, samples, seed), arms, chosen, sizes)
    skipped = {task: reason for task in chosen if (reason := unsupported_reason(bench, task))}
    kept = tuple(task for task in chosen if task not in skipped)
    if not kept:
        raise UserError(f"nothing to measure: {next(iter(skipped.values()))}")
    bench.tasks = kept
    surroundings = environment.environment()
    with use(model), torch.inference_mode():
        units = plan(bench, kept, rounds)
        if "loss" in kept:
            bench.contexts.plain("loss", sizes[-1], samples, TARGET + 1)  # a text that is too short is found now
        run = {
            "format": 1,
            "command": list(command),
            "settings": {
                "strategies": [arm.key for arm in arms], "tasks": list(chosen), "lengths": sizes, "samples": samples,
                "rounds": rounds, "seed": seed, "device": str(bench.device), "threads": torch.get_num_threads(),
            },
            "options": options or {},
            "model": _identity(model, origin),
            "texts": {"files": len(read), "characters": sum(len(t.content) for t in read), "sha256": digest(read)},
            "versions": {name: surroundings[name] for name in ("manyheads", "torch", "transformers")},
            "environment": surroundings,
            "arms": [_describe(arm) for arm in arms],
            "skipped": skipped,
            "units": [unit.name for unit in units],
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }  # fmt: skip
        journal = Journal(Path(out), run)
        said = progress or (lambda done, total, message: None)
        return work(bench, journal, units, measure, said, read)


def check(
    strategies: Iterable[str | Strategy] = STRATEGIES,
    budgets: Sequence[int | float | str] = BUDGETS,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = LENGTHS,
) -> None:
    """Raise the UserErrors of :func:`compare` that need no model."""
    _tasks(tasks)
    make_arms(strategies, budgets, _sorted(lengths)[0])


def work(
    bench: Any, journal: Journal, units: Sequence[Any], measure: Callable[[Any, Any], list[Row]], progress: Progress,
    texts: Sequence[Text],
) -> Results:  # fmt: skip
    """Measure the ``units`` that the journal does not hold yet; ``bench.tick`` gets a listener to the work done.

    Args:
        bench: what ``measure`` gets with each unit; it calls ``bench.tick`` with units of ``unit.cost``.
        journal: takes the rows.
        units: with ``name``, ``label`` and ``cost``.
        measure: gives the rows of a unit.
        progress: hears how far the run is.
        texts: those of them that rows name are listed in ``run.json``.
    """
    start, total = time.perf_counter(), sum(unit.cost for unit in units)
    done = 0.0
    for unit in units:
        if unit.name not in journal.done:
            gone = done

            def tick(step: float, message: str = unit.label) -> None:
                nonlocal gone
                gone += step
                progress(gone, total, message)

            progress(done, total, unit.label)
            bench.tick = tick
            journal.add(measure(bench, unit))
        done += unit.cost
        progress(done, total, "")
    seconds = journal.run.get("seconds", 0.0) + time.perf_counter() - start
    used = {row["text"] for row in journal.rows if "text" in row}
    sources = [{"name": t.name, "sha256": t.sha256} for t in texts if t.name in used]
    return journal.finish(seconds=round(seconds, 2), peak_rss_bytes=_peak_memory(), sources=sources)


def _tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    if not tasks:
        raise UserError(f"no task is given; there are {', '.join(TASKS)}")
    for task in tasks:
        if task not in TASKS:
            close = nearest(task, list(TASKS))
            raise UserError(
                f"unknown task {task!r}: " + (f"did you mean {close[0]}?" if close else f"there are {', '.join(TASKS)}")
            )
    return tuple(task for task in TASKS if task in tasks)


def _lengths(model: nn.Module, lengths: Sequence[int] | None) -> list[int]:
    """Lengths of contexts, sorted, as far as the model reads."""
    config: Any = getattr(model, "config", None)
    max_context = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 2**40)
    most = max_context - 2 * TARGET  # room for what follows a context
    if lengths is None:
        sizes = [length for length in LENGTHS if length <= most]
        return sizes or [_power_of_two(most)]
    sizes = _sorted(lengths)
    if sizes[-1] > most:
        raise UserError(
            f"{type(model).__name__} reads {max_context} tokens, which leaves {most} for a context; "
            f"{sizes[-1]} is too long"
        )
    return sizes


def _sorted(lengths: Sequence[int]) -> list[int]:
    sizes = sorted(set(lengths))
    if not sizes or sizes[0] < _SHORTEST:
        raise UserError(f"a context has at least {_SHORTEST} tokens; give longer --lengths")
    return sizes


def _power_of_two(most: int) -> int:
    if most < _SHORTEST:
        raise UserError("the model reads too few tokens for a context and what follows it")
    return 1 << (most.bit_length() - 1)


def _describe(arm: Arm) -> dict[str, Any]:
    return {"key": arm.key, "strategy": arm.slug, "label": arm.label, "spec": arm.strategy.spec, "budget": arm.budget}


def _identity(model: nn.Module, origin: str | None) -> dict[str, Any]:
    """What tells this model from any other: class, size, and hashes of its config and weights."""
    weights = hashlib.sha256()
    parameters = 0
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        weights.update(name.encode())
        weights.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    for parameter in model.parameters():
        parameters += parameter.numel()
    config: Any = getattr(model, "config", None)
    text = config.to_json_string() if config is not None else ""
    return {
        "name": origin or type(model).__name__,
        "class": type(model).__name__,
        "parameters": parameters,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "weights_sha256": weights.hexdigest(),
    }


def _peak_memory() -> int | None:
    """Most memory that this process has held, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # not POSIX
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
