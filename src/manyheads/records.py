# SPDX-License-Identifier: Apache-2.0
"""Stored results of claims: what a run found, on which machine, and how it is read back."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Literal

from manyheads.errors import UserError

__all__ = ["Device", "Figure", "Record", "Result", "Verdict", "read"]

Verdict = Literal["holds", "does not hold here", "not testable here"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value: of `n` samples, with the bounds of its 95 % interval where it has one."""

    name: str
    value: float
    n: int
    low: float | None = None
    high: float | None = None
    unit: str = ""

    def __post_init__(self) -> None:
        """Refuse what is no number: a figure that could not be measured is left out."""
        if not all(isfinite(bound) for bound in (self.value, self.low, self.high) if bound is not None):
            raise ValueError(f"the figure {self.name!r} is not finite: {self.value} [{self.low}, {self.high}]")

    def __str__(self) -> str:
        """Return "name 0.412 nats [0.4, 0.43], n=64"."""
        unit = f" {self.unit}" if self.unit else ""
        interval = f" [{self.low:.4g}, {self.high:.4g}]" if self.low is not None and self.high is not None else ""
        return f"{self.name} {self.value:.4g}{unit}{interval}, n={self.n}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One stored run of a claim."""

    device: Device
    quick: bool
    verdict: Verdict
    reason: str
    figures: tuple[Figure, ...]
    seeds: tuple[int, ...]
    seconds: float | None  # None where it was not kept
    date: str  # ISO 8601, UTC
    command: str
    environment: dict[str, str | int | None]


@dataclass(frozen=True, slots=True)
class Record:
    """Everything stored of one claim: at most one result for each device and size of run."""

    slug: str
    statement: str
    paper_figure: str
    results: tuple[Result, ...] = ()

    @property
    def deciding(self) -> Result | None:
        """The newest full run or, where there is none, the newest quick one."""
        return max(self.results, key=lambda result: (not result.quick, result.date), default=None)

    @property
    def verdict(self) -> Verdict | None:
        """What the deciding result says."""
        return self.deciding.verdict if self.deciding else None

    def row(self) -> dict[str, object]:
        """Return what ``--json`` prints of this claim; what a run gives is None or empty before the first."""
        result = self.deciding
        return {
            "slug": self.slug,
            "statement": self.statement,
            "paper_figure": self.paper_figure,
            "verdict": result.verdict if result else None,
            "reason": result.reason if result else None,
            "quick": result.quick if result else None,
            "device": result.device if result else None,
            "figures": [asdict(figure) for figure in result.figures] if result else [],
            "seeds": list(result.seeds) if result else [],
            "seconds": result.seconds if result else None,
            "environment": result.environment if result else None,
            "date": result.date if result else None,
            "command": result.command if result else None,
        }


def read(path: Path) -> Record | None:
    """Read the record of a claim, None when there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        results = tuple(
            Result(
                **{
                    **result,
                    "figures": tuple(Figure(**figure) for figure in result["figures"]),
                    "seeds": tuple(result["seeds"]),
                }
            )
            for result in data["results"]
        )
        return Record(data["slug"], data["statement"], data["paper_figure"], results)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a claim record ({error}); delete it and run the claim again") from error
