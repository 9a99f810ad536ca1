# SPDX-License-Identifier: Apache-2.0
"""What a claim is, how it is run, and what is stored of it.

A claim is data: what the paper says and where, an experiment, and checks. Its words come from the checks alone; there
is no conjunction of them. A ``proxy`` (a model or data of ours stands in for the paper's) never says *contradicted*: it
says *not shown*. Quick runs give figures and no word.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import UserError
from ..files import write_atomically
from .checks import Check, CheckResult, evaluate, find_metric, resolve
from .design import Experiment, Planned, Size
from .estimates import Estimate, difference, estimate, paired
from .holm import holm
from .rows import Metric, Row, conditions

if TYPE_CHECKING:
    from ..progress import Progress
    from .executors import Executor
    from .journal import Results

__all__ = ["Claim", "ClaimResult", "ClaimRun", "Reported", "Tier", "judge", "read_result", "run_claim", "store"]

Tier = Literal["exact", "scaled", "proxy"]
Device = Literal["cpu", "cuda"]
_FORMAT = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What the paper says.

    Attributes:
        value: the figures, as the paper has them.
        setting: model, data and budget of theirs.
        where: table, row and column; or the section, where it stands in prose.
    """

    value: str
    setting: str
    where: str


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One paper's headline claim, as it is checked here.

    Attributes:
        slug: of the paper.
        statement: the claim in one sentence.
        tier: ``exact`` (the paper's model, data and budget), ``scaled`` (its mechanism on a published model and real
            data, smaller; of training from scratch: the paper's architecture and training, smaller, on published real
            data), ``proxy`` (a model or data of ours stands in).
        reported: what the paper says, and where.
        experiment: what is measured.
        checks: what is judged. The rule is committed before the first full run.
        report: metrics (``task.metric``) whose figures are shown beside those judged; all of them when empty.
        caveat: what the reader has to know of the subject or the size.
        together: intervals hold for all checks together (Holm), see :mod:`.holm`.
    """

    slug: str
    statement: str
    tier: Tier
    reported: Reported
    experiment: Experiment
    checks: tuple[Check, ...]
    report: tuple[str, ...] = ()
    caveat: str = ""
    together: bool = False

    def __post_init__(self) -> None:
        """Refuse a claim that judges nothing, or two things under one name, by which a word is retracted."""
        names = list(map(str, self.checks))
        if not names or len(set(names)) < len(names):
            raise ValueError(f"the claim of {self.slug} has {'two checks that say the same' if names else 'no check'}")

    def planned(self, size: Size, on: str | None = None) -> Planned:
        """The experiment at a size, on its own subject or on ``on``, with every check's metric and arms found.

        Raises:
            ValueError: a check or the report names what is not there.
        """
        plan = self.experiment.at(size, on)
        metrics = _metrics(plan)
        for check in self.checks:
            resolve(check, plan.arms, metrics)
        for name in self.report:
            find_metric(name, metrics)
        return plan


@dataclass(frozen=True, kw_only=True)
class ClaimRun:
    """What one run of a claim found.

    Attributes:
        size, device: of the run.
        tier: as the claim had it.
        subject: measured in place of the claim's own, None where it was that.
        checks: results in the claim's order.
        figures: estimates of every arm and metric, and of its difference to the baseline, as plain values.
        seeds: of trainings and draws.
        seconds: that it took.
        date: ISO 8601, UTC.
        command: that repeats it.
        commit: of the checkout, None outside one.
        environment: machine and versions.
        retracted: words that turned out wrong: ``{"check": ..., "word": ..., "reason": ..., "date": ...}``; kept when
            the claim is run again, and in force as long as the check still ends in that word.
        legacy: set in a run that was stored before claims were data: its verdict and reason then.
    """

    size: Size
    device: Device
    tier: Tier
    subject: str | None = None
    checks: tuple[CheckResult, ...] = ()
    figures: tuple[Mapping[str, Any], ...] = ()
    seeds: tuple[int, ...] = (0,)
    seconds: float | None = None
    date: str = ""
    command: str = ""
    commit: str | None = None
    environment: Mapping[str, Any] = field(default_factory=dict)
    retracted: tuple[Mapping[str, str], ...] = ()
    legacy: Mapping[str, str] | None = None

    @property
    def measured(self) -> str:
        """On what: the device and, where it is not the claim's own, the subject."""
        return f"{self.device}, {self.subject}" if self.subject else self.device

    @property
    def line(self) -> str:
        """In one line: ``scaled: 3 of 5 hold, 1 contradicted, 1 inconclusive``."""
        if self.legacy is not None:
            return f"{self.tier}: {self.legacy['verdict']} (before claims were data)"
        if self.size == "quick":
            return f"{self.tier}: quick run of {len(self.checks)} checks, figures only"
        words = Counter(self.word(check) for check in self.checks)
        rest = ("contradicted", "not shown", "inconclusive", "not testable here", "retracted")
        parts = [f"{words[word]} {word}" for word in rest if words[word]]
        return ", ".join([f"{self.tier}: {words['holds']} of {len(self.checks)} hold", *parts])

    def word(self, check: CheckResult) -> str:
        """The word of a check as it is shown: a proxy that contradicts has not shown the claim, no more."""
        shown = "not shown" if self.tier == "proxy" and check.word == "contradicted" else check.word or "no word"
        if any(entry["check"] == check.check and entry["word"] in (check.word, shown) for entry in self.retracted):
            return "retracted"
        return shown

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        own = dataclasses.asdict(self) | {"line": self.line}
        for entry, check in zip(own["checks"], self.checks, strict=True):
            entry |= {"effect": check.effect and check.effect.plain(), "shown": self.word(check)}
        return own


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """Everything stored of one claim on one device and subject: at most one run for each size."""

    slug: str
    statement: str
    runs: tuple[ClaimRun, ...] = ()

    @property
    def deciding(self) -> ClaimRun | None:
        """The newest full run or, where there is none, the newest quick one; one before claims were data comes last."""
        return max(self.runs, key=lambda run: (run.size != "quick", run.legacy is None, run.date), default=None)

    @property
    def line(self) -> str:
        """What the deciding run says, in one line."""
        return self.deciding.line if self.deciding else "not run yet"

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "slug": self.slug, "statement": self.statement, "line": self.line,
            "runs": [run.plain() for run in self.runs],
        }  # fmt: skip


def run_claim(
    claim: Claim, size: Size, device: Device, out: Path, *, on: str | None = None, executor: Executor | None = None,
    progress: Progress | None = None,
) -> ClaimRun:  # fmt: skip
    """Measure a claim's experiment at a size and judge it; nothing is stored but the rows in ``out``.

    ``on`` is measured in place of the claim's own subject.
    """
    from .runner import run

    plan = claim.planned(size, on)
    flags = f"{' --quick' if size == 'quick' else ''}{' --device cuda' if device == 'cuda' else ''}"
    flags += f" --model {on}" if on else ""
    command = f"manyheads claims run {claim.slug}{flags}"
    about = {"command": command.split(), "options": {"claim": claim.slug}, "kind": "claim"}
    results = run(plan, out, device=device, executor=executor, progress=progress, about=about)
    return judge(claim, results, size, device, command, on)


def judge(
    claim: Claim, results: Results, size: Size, device: Device, command: str, on: str | None = None
) -> ClaimRun:  # fmt: skip
    """Judge the rows of a finished run."""
    from ..environment import commit

    plan, run = claim.planned(size, on), results.run
    metrics = _metrics(plan)
    checks = tuple(
        evaluate(check, results.rows, plan.arms, metrics, skipped=run["skipped"], words=size != "quick")
        for check in claim.checks
    )
    if claim.together:
        checks = holm(checks, claim.checks)
    shown = {find_metric(name, metrics) for name in claim.report} or set(metrics)
    shown |= {find_metric(check.metric, metrics) for check in claim.checks}
    rows = [row for row in results.rows if (row.task, row.metric) in shown]
    return ClaimRun(
        size=size, device=device, tier=claim.tier, subject=on and Path(on).name, checks=checks,
        figures=tuple(_figures(rows, plan, metrics)), seeds=plan.seeds, seconds=run.get("seconds"),
        date=run.get("finished", ""), command=command, commit=commit(), environment=run["environment"],
    )  # fmt: skip


def _metrics(plan: Planned) -> dict[tuple[str, str], Metric]:
    """Metrics of the tasks of a plan by task key and name."""
    return {(task.key, metric.name): metric for task in plan.tasks for metric in task.stated}


def _figures(rows: Sequence[Row], plan: Planned, metrics: Mapping[tuple[str, str], Metric]) -> list[dict[str, Any]]:
    """Estimates of every metric, arm and condition that has few values (a length, an offset).

    And the difference to the baseline, where it was measured on the same samples.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    shown = sorted(conditions(rows))
    for row in rows:
        at = tuple((name, row.at[name]) for name in shown if name in row.at)
        groups.setdefault((row.task, row.metric, at, row.arm), []).append(row)
    found = []
    base = plan.arms[0].key
    for (task, name, at, arm), mine in groups.items():
        metric = metrics[task, name]
        entry = {"task": task, "metric": name, "unit": metric.unit, "arm": arm, "at": dict(at)}
        entry["estimate"] = estimate(mine, metric).plain()
        other = groups.get((task, name, at, base))
        if arm != base and other is not None and paired(mine, other):
            entry["delta"] = difference(mine, other, metric).plain()
        found.append(entry)
    return found


def read_result(path: Path) -> ClaimResult | None:
    """Read what is stored of a claim on one device, None when there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError("another version wrote it")
        return ClaimResult(slug=data["slug"], statement=data["statement"], runs=tuple(map(_run_of, data["runs"])))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no result of a claim ({error}); delete it and run the claim again") from error


def _run_of(data: dict[str, Any]) -> ClaimRun:
    unbounded = {"low": float("-inf"), "high": float("inf"), "error": float("nan")}

    def check(entry: dict[str, Any]) -> CheckResult:
        effect = entry["effect"] and Estimate(**{
            **entry["effect"],
            **{name: value for name, value in unbounded.items() if entry["effect"].get(name) is None},
        })  # fmt: skip
        return CheckResult(**{**{k: v for k, v in entry.items() if k != "shown"}, "effect": effect})

    if data["tier"] not in get_args(Tier):
        raise ValueError(f"unknown tier {data['tier']!r}")
    own: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k not in ("checks", "line")
    }
    return ClaimRun(checks=tuple(map(check, data["checks"])), **own)


def store(claim: Claim, run: ClaimRun, folder: Path) -> Path:
    """Put ``run`` into the file of its claim, device and subject, in place of an earlier one of the same size; atomic.

    Retractions of the earlier run are kept. Figures have six digits.

    Raises:
        UserError: the folder cannot be written to.
    """
    path = folder / f"{claim.slug}.{run.device}{f'.{run.subject}' if run.subject else ''}.json"
    earlier = read_result(path)
    stored = earlier.runs if earlier else ()
    others = [other for other in stored if other.size != run.size]
    kept = [entry for other in stored if other.size == run.size for entry in other.retracted]
    kept += [entry for entry in run.retracted if entry not in kept]
    run = dataclasses.replace(run, retracted=tuple(kept))
    result = ClaimResult(slug=claim.slug, statement=claim.statement, runs=tuple(sorted([*others, run], key=_order)))
    data = _rounded({"format": _FORMAT, "reported": dataclasses.asdict(claim.reported), **result.plain()})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"the result could not be stored: {error.strerror}: {path}") from error
    return path


def _rounded(value: Any) -> Any:
    """Plain values with floats of six significant digits."""
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _order(run: ClaimRun) -> tuple[str, str]:
    return run.device, run.size
