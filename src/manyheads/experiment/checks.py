# SPDX-License-Identifier: Apache-2.0
"""Checks: comparisons of two arms, or of an arm with a number, that end in one of four words.

A word comes from an interval and a margin alone:

- **holds**: the interval lies on the claimed side;
- **contradicted**: it lies wholly beyond the margin on the other side;
- **inconclusive**: neither; the result says what effect it could have seen and how many samples would decide;
- **not testable here**: a task does not fit the subject, or the baseline itself fails on it.

A quick run gives figures and no word.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .arms import Arm
from .estimates import Estimate, difference, estimate, ratio
from .rows import Metric, Row, Value

__all__ = [
    "Check", "CheckResult", "Word", "above", "at_most", "below", "evaluate", "higher", "lower", "no_worse", "word_of",
]  # fmt: skip

Word = Literal["holds", "contradicted", "inconclusive", "not testable here"]
_POWER = 1 + 0.8416 / 1.96  # half-widths that an effect needs to be seen four times of five


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison. Make it with :func:`lower`, :func:`higher`, :func:`no_worse`, :func:`above`, :func:`below`.

    Attributes:
        metric: ``metric`` or ``task.metric``.
        arm: name of an arm.
        than: name of another, or a number.
        sign: +1 if the claim is that the arm's value is larger, -1 if smaller.
        margin: what the other side may be ahead by before the claim is contradicted; for ``no_worse`` also before it
            no longer holds.
        tolerant: ``no_worse``: the margin is on the claimed side too.
        at, than_at: budgets of the two arms; None for arms without one.
        where, than_where: conditions that rows have to meet, as ``{"length": 4096}``.
        factor: on the other arm's value: 0.5 claims half of it.
        relative: compare as ratio of the same samples rather than as difference: for times.
        says: the claim in words; made of the above when empty.
    """

    metric: str
    arm: str
    than: str | float
    sign: int
    margin: float = 0.0
    tolerant: bool = False
    at: int | float | None = None
    than_at: int | float | None = None
    where: Mapping[str, Value] = field(default_factory=dict)
    than_where: Mapping[str, Value] | None = None
    factor: float = 1.0
    relative: bool = False
    says: str = ""

    def __str__(self) -> str:
        """Return the claim in words."""
        if self.says:
            return self.says
        than = f"{self.than:g}" if isinstance(self.than, int | float) else self.than
        if self.factor != 1:
            than = f"{self.factor:g} x {than}"
        if self.than_where is not None:
            than += _conditions(self.than_where)
        relation = {
            (1, False): "above" if isinstance(self.than, int | float) else "higher than",
            (-1, False): "below" if isinstance(self.than, int | float) else "lower than",
            (1, True): "no lower than", (-1, True): "no higher than",
        }[self.sign, self.tolerant]  # fmt: skip
        budget = "" if self.at is None else f" at a budget of {self.at:g}"
        margin = f", margin {self.margin:g}" if self.margin else ""
        return f"{self.metric} of {self.arm} {relation} {than}{_conditions(self.where)}{budget}{margin}"


def _conditions(where: Mapping[str, Value]) -> str:
    return f" ({', '.join(f'{name} {value}' for name, value in where.items())})" if where else ""


def lower(metric: str, arm: str, *, than: str, **more: Any) -> Check:
    """The arm's value is lower than the other arm's, see :class:`Check`."""
    return Check(metric=metric, arm=arm, than=than, sign=-1, **_same(more))


def higher(metric: str, arm: str, *, than: str, **more: Any) -> Check:
    """The arm's value is higher than the other arm's, see :class:`Check`."""
    return Check(metric=metric, arm=arm, than=than, sign=1, **_same(more))


def no_worse(
    metric: str, arm: str, *, than: str, margin: float, better: Literal["lower", "higher"], **more: Any
) -> Check:
    """The arm is at most ``margin`` worse than the other arm (non-inferiority), see :class:`Check`."""
    sign = 1 if better == "higher" else -1
    return Check(metric=metric, arm=arm, than=than, sign=sign, margin=margin, tolerant=True, **_same(more))


def above(metric: str, arm: str, number: float, **more: Any) -> Check:
    """The arm's value is above a number, see :class:`Check`."""
    return Check(metric=metric, arm=arm, than=number, sign=1, **more)


def below(metric: str, arm: str, number: float, **more: Any) -> Check:
    """The arm's value is below a number, see :class:`Check`."""
    return Check(metric=metric, arm=arm, than=number, sign=-1, **more)


def at_most(metric: str, arm: str, *, times: float, than: str, **more: Any) -> Check:
    """The ratio of the arm to the other, sample by sample, is below ``times``: for times and sizes."""
    return Check(metric=metric, arm=arm, than=than, sign=-1, factor=times, relative=True, **_same(more))


def _same(more: dict[str, Any]) -> dict[str, Any]:
    """``at`` and ``where`` hold for both arms unless the other's are given."""
    return {"than_at": more.get("at"), **more}


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What a run says of a check.

    Attributes:
        check: in words.
        word: None in a quick run.
        effect: the difference (or ratio, or value) that was judged, and its interval.
        bound: what the effect is compared with.
        detectable: effect beyond the bound that a run of this size sees four times of five; None without an interval.
        needed: samples or seeds that would decide if the effect is what it seems; None where it is decided or zero.
        reason: why it is not testable, or was retracted.
    """

    check: str
    word: Word | None
    effect: Estimate | None = None
    bound: float = 0.0
    detectable: float | None = None
    needed: int | None = None
    reason: str = ""

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "check": self.check, "word": self.word, "effect": self.effect.plain() if self.effect else None,
            "bound": self.bound, "detectable": self.detectable, "needed": self.needed, "reason": self.reason,
        }  # fmt: skip


def word_of(found: Estimate, check: Check, bound: float) -> Word:
    """The word for an effect with its interval, compared with ``bound``."""
    low, high = sorted((check.sign * (found.low - bound), check.sign * (found.high - bound)))
    if low > (-check.margin if check.tolerant else 0.0):
        return "holds"
    return "contradicted" if high < -check.margin else "inconclusive"


def evaluate(
    check: Check, rows: Iterable[Row], arms: Sequence[Arm], metrics: Mapping[tuple[str, str], Metric], seed: int = 0,
    skipped: Mapping[str, str] | None = None, words: bool = True,
) -> CheckResult:  # fmt: skip
    """Judge one check by the rows of a run.

    Args:
        check: what is claimed.
        rows: of the run.
        arms: of the run, the baseline first.
        metrics: by task key and metric name.
        seed: of the bootstrap.
        skipped: reasons by the key of a task that was left out.
        words: False in a quick run.
    """
    task, name = find_metric(check.metric, metrics)
    if skipped and task in skipped:
        return CheckResult(check=str(check), word="not testable here" if words else None, reason=skipped[task])
    metric = metrics[task, name]
    of_metric = [row for row in rows if (row.task, row.metric) == (task, name)]
    mine = _picked(of_metric, _arm(check.arm, check.at, arms), check.where)
    if not mine:
        raise ValueError(f"no row for the check {check}")
    bound = 0.0
    if isinstance(check.than, int | float):
        found, bound = estimate(mine, metric, seed), float(check.than)
    else:
        than_where = check.where if check.than_where is None else check.than_where
        other = _picked(of_metric, _arm(check.than, check.than_at, arms), than_where)
        ignoring = frozenset({*check.where, *than_where} if than_where != check.where else ())
        if check.relative:
            found, bound = ratio(mine, other, metric, seed, ignoring), check.factor
        else:
            found = difference(mine, other, metric, seed, check.factor, ignoring)
    if words and (reason := not_discriminative(metric, of_metric, arms[0], seed)):
        return CheckResult(check=str(check), word="not testable here", effect=found, bound=bound, reason=reason)
    word = word_of(found, check, bound)
    half = max(found.high - found.value, found.value - found.low)
    edge = bound - check.sign * check.margin if check.tolerant else bound
    gap, decided = abs(found.value - edge), word != "inconclusive"
    return CheckResult(
        check=str(check), word=word if words else None, effect=found, bound=bound,
        detectable=half * _POWER if math.isfinite(half) else None,
        needed=None if decided or gap == 0 or not math.isfinite(half)
        else min(10**9, math.ceil(found.groups * (half * _POWER / gap) ** 2)),
    )  # fmt: skip


def not_discriminative(metric: Metric, rows: Sequence[Row], baseline: Arm, seed: int = 0) -> str | None:
    """Why a share tells nothing: the baseline itself is not shown to be above the metric's floor."""
    of_base = [row for row in rows if row.arm == baseline.key]
    if metric.floor is None or not of_base:
        return None
    found = estimate(of_base, metric, seed)
    if found.value > metric.floor:
        return None
    return (
        f"not discriminative: {baseline.name} itself reaches {found.value:.2f} [{found.low:.2f}, {found.high:.2f}], "
        f"and {metric.floor:g} tells nothing of any arm"
    )


def find_metric(name: str, metrics: Mapping[tuple[str, str], Metric]) -> tuple[str, str]:
    """Task key and metric that ``task.metric`` or ``metric`` names; ValueError if none or several are."""
    found = [key for key in metrics if name in (key[1], ".".join(key))]
    if len(found) != 1:
        raise ValueError(f"{name!r} names {len(found)} metrics of {sorted('.'.join(key) for key in metrics)}")
    return found[0]


def _arm(name: str, budget: int | float | None, arms: Sequence[Arm]) -> Arm:
    for arm in arms:
        if arm.name == name and (arm.budget == budget or arm.budget is None):
            return arm
    raise ValueError(f"no arm {name!r} at {budget}; there are {', '.join(arm.key for arm in arms)}")


def _picked(rows: Sequence[Row], arm: Arm, where: Mapping[str, Value]) -> list[Row]:
    return [row for row in rows if row.arm == arm.key and all(row.at.get(k) == v for k, v in where.items())]
