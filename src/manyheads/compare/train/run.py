# SPDX-License-Identifier: Apache-2.0
"""A comparison of token mixers by training, from beginning to end."""

import datetime
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import environment
from ...data.texts import Text, digest, standard_library
from ...errors import UserError
from ...models import placed
from ...models.decoder import Decoder
from ...progress import Progress
from ...strategy import Strategy
from ...tasks.text._contexts import Contexts
from ...tasks.text._corpus import Corpus
from ..results import FOLDER, RUN, Journal, Results, Row, read_run
from .arms import Arm, build, check_causal, default_strategies, make_arms, perturb_zero_params
from .budget import CPU, CUDA, QUICK, Shares, Size
from .data import Bytes, flat, split
from .tasks import Bench, measure, plan, step_times

__all__ = ["compare_trained", "size_for"]

_VALIDATED = 32  # sequences that a learning rate is judged on
_TRAINING = 0.65  # of the minutes, at the speed of training on text; recall is slower, and measuring takes the rest


def size_for(device: str, quick: bool = False, **changes: Any) -> Size:
    """The size of a run on ``device``, with ``changes`` that are not None.

    Raises:
        UserError: a size that nothing can be trained or measured with.
    """
    size = QUICK if quick else CUDA if device.startswith("cuda") else CPU
    size = replace(size, **{name: value for name, value in changes.items() if value is not None})
    if size.length < 32:
        raise UserError("a training sequence has at least 32 bytes; give a longer --lengths")
    if min(size.seeds, size.samples) < 1:
        raise UserError("seeds and samples count repetitions: give 1 or more")
    if not size.rates or min(size.rates) <= 0:
        raise UserError("rates are learning rates: give one or more, above 0")
    Shares.of(size)
    return replace(size, lengths=tuple(sorted({size.length, *(n for n in size.lengths if n > size.length)})))


def compare_trained(
    texts: Sequence[Text] | None = None,
    strategies: Iterable[str | Strategy] | None = None,
    *,
    size: Size | None = None,
    minutes: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    out: str | Path = FOLDER,
    command: Sequence[str] = (),
    progress: Progress | None = None,
    options: dict[str, Any] | None = None,
) -> Results:
    """Train a small language model for each token mixer on one budget, and keep rows and models in ``out``.

        results = manyheads.compare.compare_trained(strategies=["tnl_lightning", MyMixer()])

    Arms differ in their mixer only: the same number of parameters within 2 %, the same bytes in the same order, the
    same learning rates tried. A run that was cut off goes on when it is called again with the same settings.

    Args:
        texts: what to learn, see :mod:`manyheads.data.texts`; the standard library's source when None.
        strategies: strategies that override ``build``, or their specs; ``softmax`` is always among them.
        size: of models, data and budget, see :func:`size_for`; that of the device when None.
        minutes: in place of ``size.budget``: about so long, all arms together, by their speed on this machine.
        seed: of all draws.
        device: ``cpu`` or ``cuda``.
        out: folder of the results.
        command: what was typed, for the report.
        progress: hears how far the run is, in seconds.
        options: more settings to keep in ``run.json``.

    Raises:
        UserError: anything that the caller can mend, before any training; a mixer that sees the future among it.
    """
    place = torch.device(placed(device, None)[0])
    if minutes is not None and minutes <= 0:
        raise UserError("--minutes is a time above 0")
    size = size or size_for(device)
    arms = make_arms(default_strategies() if strategies is None else strategies)
    read = list(standard_library() if texts is None else texts)
    parts = split(read)
    numbers, validation = _data(parts, size)
    contexts = Contexts(Corpus(parts["test"], Bytes()), Bytes(), size.samples, seed)
    reach, skipped = _reach(contexts, size), {}
    if reach < size.reach:
        skipped["span"] = f"no held-out text is longer than {reach} times the training length; give longer files"
    if (reason := contexts.unsupported_reason(1, size.length)) is not None:
        skipped["needle"] = reason
    sizes = [Decoder(arms[0].strategy, config).parameters_held for config in (size.text, size.recall)]
    bench = Bench(
        arms, size, contexts, numbers.to(place), validation.to(place), Path(out), place, seed, parameters=sizes[0],
        recall_parameters=sizes[1], reach=reach, planted="needle" not in skipped,
    )  # fmt: skip
    pace, held = _prepare(bench)
    if minutes is not None:
        bench.size = replace(size, budget=_earlier_budget(Path(out), minutes) or _affordable(minutes, pace))
        bench.shares = Shares.of(bench.size)
    units = plan(bench, pace)
    surroundings = environment.environment()
    run = {
        "format": 1,
        "kind": "train",
        "command": list(command),
        "settings": {
            "strategies": [arm.key for arm in arms], **asdict(bench.size), "minutes": minutes, "longest": reach,
            "seed": seed, "device": str(place), "threads": torch.get_num_threads(),
        },
        "options": options or {},
        "model": {
            "name": f"models of {sizes[0] / 1e6:.2g} million parameters trained from scratch", "class": "Decoder",
            "parameters": sizes[0], "dtype": "float32" if place.type == "cpu" else "float32, bfloat16 in products",
        },
        "texts": {
            "files": len(read), "characters": sum(len(t.content) for t in read), "sha256": digest(read),
            **{part: sum(len(t.content.encode()) for t in found) for part, found in parts.items()},
        },
        "versions": {name: surroundings[name] for name in ("manyheads", "torch", "transformers")},
        "environment": surroundings,
        "arms": [_describe(arm, *held[arm.key]) for arm in arms],
        "steps": asdict(bench.shares),
        "skipped": skipped,
        "units": [unit.name for unit in units],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    journal = Journal(Path(out), run)
    bench.rows = journal.rows
    return work(bench, journal, units, measure, progress or (lambda done, total, message: None), parts["test"])


def _data(parts: dict[str, list[Text]], size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Training bytes, and validation sequences ``[N, T + 1]`` spread evenly over their part."""
    numbers = flat(parts["train"], 4 * size.length, "training")
    held = flat(parts["validation"], size.length + 1, "validation")
    starts = np.linspace(0, len(held) - size.length - 1, min(_VALIDATED, len(held) // size.length)).astype(int)
    return numbers, torch.stack([held[i : i + size.length + 1].long() for i in starts])


def _reach(contexts: Contexts, size: Size) -> int:
    """The largest multiple of the training length, halving from the one wished for, that held-out windows can have."""
    reach = size.reach
    while reach > 1:
        try:
            contexts.plain("loss", reach * size.length, size.samples, 1)
        except UserError:
            reach //= 2
        else:
            return reach
    contexts.plain("loss", size.length, size.samples, 1)
    return 1


def _prepare(bench: Bench) -> tuple[dict[str, float], dict[str, tuple[int, int]]]:
    """Refuse arms that cannot be matched or see the future; seconds per training token, and parameters, of each."""
    pace, held = {}, {}
    for arm in bench.arms:
        model = build(arm, bench.size.text, bench.parameters, bench.seed, bench.device)
        small = build(arm, bench.size.recall, bench.recall_parameters, bench.seed, bench.device)
        held[arm.key] = (model.parameters_held, small.parameters_held)
        perturb_zero_params(model)
        check_causal(model.eval(), bench.validation[:2, :-1], arm.key)
        pace[arm.key] = min(step_times(model, bench.stream(0), 2, bench.device)) / bench.size.step
    return pace, held


def _affordable(minutes: float, pace: dict[str, float]) -> int:
    """Tokens per arm, to two digits, that fit into so many minutes."""
    tokens = _TRAINING * 60 * minutes / sum(pace.values())
    return int(float(f"{tokens:.1e}"))


def _earlier_budget(out: Path, minutes: float) -> int | None:
    """The budget of an unfinished run of as many minutes in this folder: what is left of it must not be another."""
    if not (out / RUN).exists():
        return None
    settings = read_run(out)["settings"]
    return settings.get("budget") if settings.get("minutes") == minutes else None


def _describe(arm: Arm, parameters: int, recall: int) -> dict[str, Any]:
    return {
        "key": arm.key, "label": arm.key, "strategy": arm.strategy.slug, "spec": arm.key, "parameters": parameters,
        "recall_parameters": recall,
    }  # fmt: skip


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


def _peak_memory() -> int | None:
    """Most memory that this process has held, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # not POSIX
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
