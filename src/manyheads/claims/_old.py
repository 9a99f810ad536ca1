# SPDX-License-Identifier: Apache-2.0
"""Claims: the headline of each paper, checked at the scale of the machine at hand.

``claims/<slug>.py`` exposes ``claim: Claim``; its results are stored beside it in ``claims/<slug>.json``, one for each
device and size of run. A claim file imports torch inside its `run` only, so that listing claims stays quick.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import get_args

from manyheads.errors import UserError
from manyheads.files import write_atomically
from manyheads.records import Device, Figure, Record, Result, Verdict, read

__all__ = [
    "FOLDER", "Claim", "Device", "Figure", "Outcome", "Record", "Result", "Setting", "Verdict", "load", "records",
    "run", "slugs", "store", "stored",
]  # fmt: skip

FOLDER = Path(__file__).resolve().parent


def _silent(message: str, done: float) -> None:
    """Report no progress."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """How large a run may be.

    Quick runs stay under 30 seconds on two CPU cores, full ones under 10 minutes.
    """

    device: Device = "cpu"
    quick: bool = False
    seeds: tuple[int, ...] = (0, 1, 2)
    progress: Callable[[str, float], None] = field(default=_silent, compare=False)  # (what is done now, share done)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run found: its verdict, why in one or two sentences, and the figures that it rests on."""

    verdict: Verdict
    reason: str
    figures: tuple[Figure, ...]

    def __post_init__(self) -> None:
        """Refuse a verdict that is none of the three, and one that rests on nothing."""
        if self.verdict not in get_args(Verdict):
            raise ValueError(f"verdict {self.verdict!r} is none of {', '.join(get_args(Verdict))}")
        if not self.figures and self.verdict != "not testable here":
            raise ValueError(f"the verdict {self.verdict!r} needs figures")


@dataclass(frozen=True, slots=True)
class Claim:
    """One paper's headline claim and how to check it.

    Args:
        slug: the paper's name in the catalogue.
        statement: the claim in one sentence, as it is checked here.
        paper_figure: the figure that the paper gives, with its setting.
        run: measures strategy and baselines under equal budget and judges.
    """

    slug: str
    statement: str
    paper_figure: str
    run: Callable[[Setting], Outcome]


def slugs() -> list[str]:
    """Return the slugs that have a claim, sorted."""
    return sorted(path.stem for path in FOLDER.glob("[a-z]*.py"))


def load(slug: str) -> Claim:
    """Import the claim of `slug`.

    Raises:
        UserError: there is none; the message names those that there are.
    """
    if slug not in slugs():
        raise UserError(f"{slug} has no claim yet; claims stand for: {', '.join(slugs()) or 'none yet'}")
    claim = import_module(f"{__name__}.{slug}").claim
    if not isinstance(claim, Claim) or claim.slug != slug:
        raise TypeError(f"claims/{slug}.py must expose `claim`, a Claim with slug {slug!r}")
    return claim


def stored(slug: str, folder: Path | None = None) -> Record | None:
    """Read what is stored of the claim of `slug`, None when it was never run.

    Raises:
        UserError: the file is damaged.
    """
    return read((folder or FOLDER) / f"{slug}.json")


def store(claim: Claim, result: Result, folder: Path | None = None) -> Path:
    """Add `result` to the record of `claim`, in place of an earlier one of the same device and size; atomic.

    Returns:
        The file written.

    Raises:
        UserError: the folder cannot be written to.
    """
    earlier = stored(claim.slug, folder)
    others = [
        other
        for other in (earlier.results if earlier else ())
        if (other.device, other.quick) != (result.device, result.quick)
    ]
    results = tuple(sorted([*others, result], key=lambda item: (item.device, item.quick)))
    record = Record(claim.slug, claim.statement, claim.paper_figure, results)
    path = (folder or FOLDER) / f"{claim.slug}.json"
    text = json.dumps(asdict(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"the result could not be stored: {error.strerror}: {path}") from error
    return path


def run(slug: str, setting: Setting | None = None) -> Result:
    """Run the claim of `slug`; nothing is stored.

    Raises:
        UserError: there is no such claim, or no GPU where one was asked for.
    """
    from manyheads.environment import environment

    claim = load(slug)
    setting = setting or Setting()
    if setting.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UserError("no CUDA device was found; run the claim with --device cpu")
    if setting.quick:
        setting = replace(setting, seeds=setting.seeds[:1])
    start = perf_counter()
    outcome = claim.run(setting)
    flags = f"{' --quick' if setting.quick else ''}{' --device cuda' if setting.device == 'cuda' else ''}"
    return Result(
        device=setting.device,
        quick=setting.quick,
        verdict=outcome.verdict,
        reason=outcome.reason,
        figures=outcome.figures,
        seeds=setting.seeds,
        seconds=round(perf_counter() - start, 1),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=f"manyheads claims run {slug}{flags}",
        environment=environment(),
    )


def records() -> list[Record]:
    """Return every claim with what is stored of it, by slug; a claim that was never run has no results."""
    found = []
    for slug in slugs():
        record = stored(slug)
        if record is None:
            claim = load(slug)
            record = Record(slug, claim.statement, claim.paper_figure)
        found.append(record)
    return found
