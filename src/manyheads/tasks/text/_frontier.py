# SPDX-License-Identifier: Apache-2.0
"""Loss against entropy of ways to sample, each a curve over its parameter, compared at equal entropy and equal mass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...decoding._cut import Cut
from ...decoding.lnd import GlobalSampling
from ...decoding.sampling import Sampling
from ...errors import UserError, refusal
from ...experiment import Arm, Metric, Row, RunContext, Task

__all__ = ["METRICS", "Array", "Curve", "FrontierTask", "Rows", "at_level", "cut_of", "pseudo_values", "swept"]

Array = np.ndarray[Any, np.dtype[np.float64]]
Rows = np.ndarray[Any, np.dtype[np.intp]]
_FIELDS = ("temperature", "top_k", "top_p", "min_p")
METRICS = (
    Metric("nll_at_entropy", "loss at equal entropy", "nats/token", what="of texts of one entropy"),
    Metric("excess", "loss above nucleus at equal entropy", "nats/token", what="of top-k, normalised alike"),
    Metric("distortion_at_mass", "distortion at equal mass", what="where cuts keep the same mass of human contexts"),
    Metric("nll", "loss of what is written", "nats/token", what="by the model as it is"),
    Metric("entropy", "entropy of what is written", "nats/token"),
    Metric("pressure", "log of the share of texts that the cut keeps", "nats/token"),
    Metric("mass", "mass kept", what="mean over human contexts"),
    Metric("distortion", "distortion"),
)  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """What an arm is at each value of its parameter, figures ``[C, K]`` of C contexts.

    Attributes:
        arm: which.
        family: the field of the cut that is swept.
        whole: normalised over whole texts.
        values: of the field, K.
        figures: ``nll``, ``entropy``, ``pressure``, ``mass`` and ``distortion``.
    """

    arm: Arm
    family: str
    whole: bool
    values: tuple[float, ...]
    figures: Mapping[str, Array]


def cut_of(arm: Arm) -> tuple[Cut, str]:
    """The sampler of an arm, and the one field of its cut that is not at its default.

    Raises:
        UserError: it is another strategy, or cuts in no way or in several.
    """
    for strategy in arm.strategies:
        if isinstance(strategy, (Sampling, GlobalSampling)):
            changed = [name for name in _FIELDS if getattr(strategy, name) != getattr(type(strategy), name)]
            if len(changed) == 1:
                return strategy, changed[0]
    raise UserError(
        f"{arm.key}: a frontier is drawn of sampling or lnd with one of temperature, top_k, top_p and min_p, as in "
        "lnd:top_k=40"
    )


def swept(cut: Any, family: str, value: float) -> Any:
    """The sampler with another value of its field."""
    return replace(cut, **{family: int(value) if family == "top_k" else value})


def pseudo_values(statistic: Callable[[Rows], Array], count: int) -> Array:
    """Jackknife pseudo-values ``[count, ...]`` of a statistic of the rows that it is given.

    Their mean estimates the statistic, and they are as independent as the rows are, however it combines them.
    """
    rows = np.arange(count)
    whole = statistic(rows)
    if count == 1:
        return whole[None]
    return np.stack([count * whole - (count - 1) * statistic(np.delete(rows, i)) for i in rows])


def at_level(x: Array, y: Array, level: float) -> float:
    """``y`` at a level of ``x``, by straight lines between points ``[K]`` in the order of x; NaN outside of them."""
    order = np.argsort(x, kind="stable")
    if not x[order[0]] <= level <= x[order[-1]]:
        return float("nan")
    return float(np.interp(level, x[order], y[order]))


@dataclass(frozen=True, kw_only=True)
class FrontierTask(Task):
    """Base of tasks that draw curves; a value for each context, by the jackknife where a curve is read.

    Attributes:
        top_k, top_p, min_p, temperature: values of an arm's parameter.
        levels: entropies at which losses are compared, as shares of pure sampling's.
        masses: kept masses at which distortions are compared.
    """

    top_k: tuple[float, ...] = (2, 5, 10, 20, 50, 150)
    top_p: tuple[float, ...] = (0.3, 0.5, 0.65, 0.8, 0.9, 0.97)
    min_p: tuple[float, ...] = (0.5, 0.3, 0.15, 0.06, 0.02, 0.005)
    temperature: tuple[float, ...] = (0.4, 0.6, 0.75, 0.85, 0.92, 0.97)
    levels: tuple[float, ...] = (0.6, 0.8)
    masses: tuple[float, ...] = (0.8, 0.9)

    def unsupported_reason(self, run: RunContext) -> str | None:
        return refusal(lambda: [cut_of(arm) for arm in run.arms])

    def compared(self, curves: Sequence[Curve], pure: Array, greedy: Array) -> Iterator[Row]:
        """Rows of all curves, given losses ``[C]`` of their common ends: pure sampling and the likeliest token."""
        count, ends = len(pure), np.zeros(len(pure))
        for curve in curves:
            for name, values in curve.figures.items():
                for k, value in enumerate(curve.values):
                    yield from self.each(name, curve.arm, values[:, k], at={"setting": f"{curve.family}={value:g}"})
        for share in self.levels:
            level, losses = share * float(pure.mean()), dict[str, Array]()
            for curve in curves:
                x = np.column_stack([ends, curve.figures["entropy"], pure])
                y = np.column_stack([greedy, curve.figures["nll"], pure])
                found = pseudo_values(_read(x, y, level), count)
                losses[curve.arm.key] = found
                yield from self.each("nll_at_entropy", curve.arm, found, at={"entropy": share})
            for curve in curves:
                beside = [c for c in curves if c.family == "top_p" and c.whole == curve.whole]
                if curve.family == "top_k" and beside:
                    found = losses[curve.arm.key] - losses[beside[0].arm.key]
                    yield from self.each("excess", curve.arm, found, at={"entropy": share})
        for mass in self.masses:
            for curve in curves:
                if curve.whole or curve.family == "temperature":
                    continue
                found = pseudo_values(_read(curve.figures["mass"], curve.figures["distortion"], mass), count)
                if np.isfinite(found).all():
                    yield from self.each("distortion_at_mass", curve.arm, found, at={"mass": mass})


def _read(x: Array, y: Array, level: float) -> Callable[[Rows], Array]:
    return lambda rows: np.asarray(at_level(x[rows].mean(0), y[rows].mean(0), level))
