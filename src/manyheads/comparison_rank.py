# SPDX-License-Identifier: Apache-2.0
"""The comparison of ``manyheads compare --train --ranking``: rankers trained alike on a collection, beside BM25."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .experiment.arms import Arm
from .experiment.design import Experiment
from .experiment.journal import FOLDER, Results
from .spec import parse
from .strategy import Ranker, Strategy

if TYPE_CHECKING:
    from .data.ranking import Collection
    from .experiment.executors import Executor
    from .progress import Progress

__all__ = ["compare_rankers", "plan_ranking"]

_STRATEGIES = ("tkl_local", "tkl_local:chunk=0")
_BM25, _RANDOM = (Arm(name, options={"ranker": name}) for name in ("bm25", "random"))
_QUICK: dict[str, Any] = {"steps": 20, "batch": 4, "dim": 40, "layers": 1, "candidates": 20, "looks": 1}
_CPU: dict[str, Any] = {"steps": 300, "batch": 8, "candidates": 100}
_CUDA: dict[str, Any] = {"steps": 1000, "batch": 32, "dim": 300, "candidates": 1000}


def plan_ranking(
    given: str | Path | Collection = "cranfield", strategies: Iterable[str | Strategy] | None = None, *,
    model: str | None = None, seeds: int = 3, device: str = "cpu", quick: bool = False, **sizes: Any,
) -> Experiment:  # fmt: skip
    """The experiment; trains nothing. See :func:`compare_rankers`."""
    from .data.ranking import Collection
    from .tasks.training.ranking import Ranking

    arms = [_BM25]
    for strategy in map(parse, strategies or _STRATEGIES):
        if not isinstance(strategy, Ranker):
            raise UserError(f"{strategy.spec} ranks no documents; leave --ranking away, or take {_STRATEGIES[0]}")
        arms.append(Arm(strategy.spec, strategy.spec))
    if model is not None:
        arms.append(Arm(model, options={"ranker": "embedding"}))
    named = given.name if isinstance(given, Collection) else str(given)
    size = _QUICK if quick else _CUDA if device.startswith("cuda") else _CPU
    made = {"collection": named, "parts": 1, "edges": (), **size, **sizes} | ({"encoder": model} if model else {})
    return Experiment(
        subject="trainable", arms=(*arms, _RANDOM), baseline=_BM25, tasks=(Ranking(**made),), equal="parameters",
        seeds=seeds,
    )  # fmt: skip


def compare_rankers(
    given: str | Path | Collection = "cranfield", strategies: Iterable[str | Strategy] | None = None, *,
    model: str | None = None, seeds: int | None = None, quick: bool = False, seed: int = 0, device: str = "cpu",
    out: str | Path = FOLDER, command: Sequence[str] = (), progress: Progress | None = None,
    options: Mapping[str, Any] | None = None, executor: Executor | None = None, **sizes: Any,
) -> Results:  # fmt: skip
    """Train a ranker of each strategy on the judgements of a collection, and rank queries that it never saw.

        results = manyheads.compare_rankers("cranfield", ["tkl_local", "tkl_local:chunk=0"], model="all-minilm-l6-v2")

    BM25 is the baseline, and chance the control. The model of a training is ``out/models/<arm>/ranking-<fold>``, see
    :meth:`manyheads.models.ranker.RankingModel.load` and ``rank``.

    Args:
        given: a collection's name, or a folder of yours, see :mod:`manyheads.data.ranking`.
        strategies: rankers or their specs.
        model: an encoder whose passages are ranked beside by cosine, see :func:`manyheads.models.load_reader`.
        seeds: trainings, each tested on a fold of its own; of a collection that says which queries test, on these.
        quick: a size for a first look.
        seed: of all draws.
        device: ``cpu`` or ``cuda``.
        out: folder of the results.
        command: what was typed, for the report.
        progress: is told how far the run is.
        options: settings to keep in ``run.json``.
        executor: where units run; this process when None.
        sizes: fields of :class:`manyheads.tasks.training.ranking.Ranking` in place of the size's.

    Raises:
        UserError: anything that the caller can mend, before any training.
    """
    from .data.ranking import collection
    from .experiment.runner import run

    held = collection(given)
    plan = plan_ranking(given, strategies, model=model, seeds=seeds or 3, device=device, quick=quick, **sizes)
    about = {"command": list(command), "options": dict(options or {}), "kind": "train"}
    return run(
        plan.at("cpu"), out, seed=seed, device=device, data={"collection": held}, executor=executor, progress=progress,
        about=about,
    )  # fmt: skip
