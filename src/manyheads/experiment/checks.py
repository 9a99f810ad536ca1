# SPDX-License-Identifier: Apache-2.0
"""Checks: comparisons of two arms, or of an arm with a number, that end in one of four words.

A word comes from an interval and a margin alone:

- **holds**: the interval lies on the claimed side;
- **contradicted**: it lies wholly beyond the margin on the other side;
- **inconclusive**: neither; the result says what effect it could have seen and how many samples would decide;
- **not testable here**: a task does not fit the subject, the baseline (or the check's ``base``) itself fails on it, or
  what the check rests on (that an arm has learned what it is to lose) does not surely hold.

A quick run gives figures and no word.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Any, Literal

from .. import formatting
from .arms import Arm
from .estimates import BOTH, CONTEXTS, REPEATS, SEEDS, Estimate, difference, estimate, ratio, t_quantile
from .rows import Metric, Row, Value

__all__ = [
    "Check", "CheckResult", "Resolved", "Word", "above", "at_most", "below", "evaluate", "higher", "lower", "no_worse",
    "not_discriminative", "power", "resolve", "word_of",
]  # fmt: skip

Word = Literal["holds", "contradicted", "inconclusive", "not testable here"]
_POWER = NormalDist().inv_cdf(0.8)  # standard errors beyond the half-width at which four runs of five decide
_NORMAL = NormalDist().inv_cdf(0.975)
_MOST = 10**9  # samples that a run could be asked for


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
        given: what this rests on, itself a check; unless it holds this is not testable here.
        base: name of the arm that has to succeed for anything to be told; the experiment's baseline when empty.
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
    given: Check | None = None
    base: str = ""

    def __post_init__(self) -> None:
        """Refuse what could not be judged."""
        if self.sign not in (-1, 1) or not self.margin >= 0:
            raise ValueError(
                f"a check has a sign of +1 or -1 and a margin of 0 or more, not {self.sign}, {self.margin}"
            )
        if isinstance(self.than, int | float) and (self.relative or self.factor != 1 or self.than_where is not None):
            raise ValueError("a check against a number has no factor, no ratio and no conditions of another arm")

    def __str__(self) -> str:
        """Return the claim in words."""
        than = f"{self.than:g}" if isinstance(self.than, int | float) else self.than
        if self.factor != 1:
            than = f"{self.factor:g} x {than}"
        if self.than_where is not None:
            than += _conditions(self.than_where)
        if not isinstance(self.than, int | float) and self.than_at not in (None, self.at):
            than += f" (at a budget of {self.than_at:g})"
        relation = {
            (1, False): "above" if isinstance(self.than, int | float) else "higher than",
            (-1, False): "below" if isinstance(self.than, int | float) else "lower than",
            (1, True): "no lower than", (-1, True): "no higher than",
        }[self.sign, self.tolerant]  # fmt: skip
        budget = "" if self.at is None else f" at a budget of {self.at:g}"
        margin = f", margin {self.margin:g}" if self.margin else ""
        ratio = ", sample by sample" if self.relative else ""
        return f"{self.metric} of {self.arm} {relation} {than}{ratio}{_conditions(self.where)}{budget}{margin}"


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
        detectable: effect beyond the bound that a run of this size sees four times of five, of a ratio as a factor;
            None without an interval.
        needed: groups (see :class:`.estimates.Estimate`) with which four runs of five would decide if the effect is
            what it seems, contexts and seeds growing in proportion; None where it is decided or zero.
        reason: why it is not testable, or was retracted.
    """

    check: str
    word: Word | None
    effect: Estimate | None = None
    bound: float = 0.0
    detectable: float | None = None
    needed: int | None = None
    reason: str = ""


def word_of(found: Estimate, check: Check, bound: float) -> Word:
    """The word for an effect with its interval, compared with ``bound``."""
    low, high = sorted((check.sign * (found.low - bound), check.sign * (found.high - bound)))
    if low > (-check.margin if check.tolerant else 0.0):
        return "holds"
    return "contradicted" if high < -check.margin else "inconclusive"


@dataclass(frozen=True)
class Resolved:
    """A check with what it names: the key of a task, its metric, the arm, and the other arm unless it is a number."""

    task: str
    metric: Metric
    arm: Arm
    than: Arm | None


def resolve(check: Check, arms: Sequence[Arm], metrics: Mapping[tuple[str, str], Metric]) -> Resolved:
    """Find what a check names, before anything is measured.

    Raises:
        ValueError: it names a metric or an arm that is not there, or several, or a time is compared with a number; or
            what it rests on does.
    """
    if check.given is not None:
        resolve(check.given, arms, metrics)
    task, name = find_metric(check.metric, metrics)
    arm = _arm(check.arm, check.at, arms)
    if check.base:
        _arm(check.base, None, arms)
    if not isinstance(check.than, int | float):
        return Resolved(task, metrics[task, name], arm, _arm(check.than, check.than_at, arms))
    if metrics[task, name].kind == "time":
        raise ValueError(f"{check}: a time tells of the machine; compare it with that of another arm")
    return Resolved(task, metrics[task, name], arm, None)


def evaluate(
    check: Check, rows: Sequence[Row], arms: Sequence[Arm], metrics: Mapping[tuple[str, str], Metric],
    skipped: Mapping[str, str] | None = None, words: bool = True,
) -> CheckResult:  # fmt: skip
    """Judge one check by the rows of a run.

    Args:
        check: what is claimed.
        rows: of the run.
        arms: of the run, the baseline first.
        metrics: by task key and metric name.
        skipped: reasons by the key of a task that was left out.
        words: False in a quick run.

    Raises:
        ValueError: as :func:`resolve`, or no row fits.
        UserError: the two arms were not measured on the same samples.
    """
    named = resolve(check, arms, metrics)
    if skipped and named.task in skipped:
        return CheckResult(check=str(check), word="not testable here" if words else None, reason=skipped[named.task])
    metric = named.metric
    of_metric = [row for row in rows if (row.task, row.metric) == (named.task, metric.name)]
    than_where = check.where if check.than_where is None else check.than_where
    mine = _picked(of_metric, named.arm, check.where)
    other = _picked(of_metric, named.than, than_where) if named.than else []
    if not mine or (named.than and not other):
        raise ValueError(f"no row for the check {check}")
    bound = 0.0
    if named.than is None:
        found, bound = estimate(mine, metric), float(check.than)
    else:
        ignoring = frozenset({*check.where, *than_where} if than_where != check.where else ())
        if check.relative:
            found, bound = ratio(mine, other, metric, ignoring), check.factor
        else:
            found = difference(mine, other, metric, check.factor, ignoring)
    if words:
        base = _arm(check.base, None, arms) if check.base else arms[0]
        for where in (check.where, than_where):
            of_base = _picked(of_metric, base, where)
            if reason := not_discriminative(metric, of_base, base):
                return CheckResult(check=str(check), word="not testable here", effect=found, bound=bound, reason=reason)
        if check.given is not None and (reason := _missing(evaluate(check.given, rows, arms, metrics, skipped))):
            return CheckResult(check=str(check), word="not testable here", effect=found, bound=bound, reason=reason)
    word = word_of(found, check, bound)
    detectable, needed = power(found, check, bound)
    return CheckResult(
        check=str(check), word=word if words else None, effect=found, bound=bound, detectable=detectable,
        needed=needed if word == "inconclusive" else None,
    )  # fmt: skip


def _missing(rests_on: CheckResult) -> str | None:
    """Why a check that rests on another tells nothing, None where that one holds."""
    if rests_on.word == "holds":
        return None
    found = rests_on.effect
    seen = "" if found is None else f", {found.value:.2g} ({found.low:.2g} to {found.high:.2g})"
    return f"rests on another: {rests_on.check} does not surely hold here{seen}, so that this tells nothing"


def power(found: Estimate, check: Check, bound: float) -> tuple[float | None, int | None]:
    """Effect that such a run sees four times of five, and groups with which one would see the effect found."""
    if not found.bounded:
        return None, None
    # What the interval has to clear: towards the claim the bound, less the margin where it is tolerant; away from it
    # the bound and the margin.
    towards = check.sign * (found.value - bound) > (-check.margin if check.tolerant else 0.0)
    edge = bound - check.sign * check.margin if check.tolerant or not towards else bound
    value, low, high = found.value, found.low, found.high
    if check.relative:
        if edge <= 0:
            return None, None
        value, low, high, edge = math.log(value), math.log(low), math.log(high), math.log(edge)
    half, gap = max(high - value, value - low), abs(value - edge)
    seen = half + _POWER * found.error
    detectable = math.exp(seen) if check.relative else seen
    return detectable, None if gap == 0 or half == 0 else _groups(found, half, gap)


def _groups(found: Estimate, half: float, gap: float) -> int | None:
    """Fewest groups, at least two, whose half-width and power margin together stay within ``gap``.

    The half-width shrinks with the root of the groups and, where it was made with Student's t, with its quantile.
    """
    few = found.interval in (CONTEXTS, SEEDS, BOTH, REPEATS)
    start = t_quantile(0.975, found.groups - 1) if few else 1.0

    def reach(groups: int) -> float:
        t = t_quantile(0.975, groups - 1) / start if few and groups < 500 else _NORMAL / start if few else 1.0
        return (half * t + _POWER * found.error) * math.sqrt(found.groups / groups)

    low, high = 1, 2
    while reach(high) > gap:
        low, high = high, 2 * high
        if low > _MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if reach(middle) > gap else (low, middle)
    return high


def not_discriminative(metric: Metric, rows: Sequence[Row], baseline: Arm) -> str | None:
    """Why a share tells nothing: the baseline's interval is not wholly on the good side of the metric's floor."""
    of_base = [row for row in rows if row.arm == baseline.key]
    if metric.floor is None or not of_base:
        return None
    found = estimate(of_base, metric)
    if found.low > metric.floor if metric.higher else found.high < metric.floor:
        return None
    within, bound = formatting.interval(found.low, found.high, True), formatting.percent(metric.floor)
    return (
        f"not discriminative: {baseline.name} itself reaches {formatting.percent(found.value)} ({within}); only where "
        f"it is surely {'above' if metric.higher else 'below'} {bound} does this tell anything of the others"
    )


def find_metric(name: str, metrics: Mapping[tuple[str, str], Metric]) -> tuple[str, str]:
    """Task key and metric that ``task.metric`` or ``metric`` names; ValueError if none or several are."""
    found = [key for key in metrics if name in (key[1], ".".join(key))]
    if len(found) != 1:
        raise ValueError(f"{name!r} names {len(found)} metrics of {sorted('.'.join(key) for key in metrics)}")
    return found[0]


def _arm(name: str, budget: int | float | None, arms: Sequence[Arm]) -> Arm:
    """The arm of that name and budget, or the one that has no budget."""
    for wanted in (budget, None):
        for arm in arms:
            if arm.name == name and arm.budget == wanted and type(arm.budget) is type(wanted):
                return arm
    raise ValueError(f"no arm {name!r} at {budget}; there are {', '.join(arm.key for arm in arms)}")


def _picked(rows: Sequence[Row], arm: Arm, where: Mapping[str, Value]) -> list[Row]:
    return [row for row in rows if row.arm == arm.key and all(row.at.get(k) == v for k, v in where.items())]
