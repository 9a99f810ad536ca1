# SPDX-License-Identifier: Apache-2.0
"""Claims: the headline of each paper as data, checked at the scale of the machine at hand.

``claims/<slug>.py`` exposes ``claim``, a :class:`manyheads.experiment.claim.Claim`, and nothing else. Results are kept
per device in ``results/claims/<slug>.<device>.json`` of a checkout; a run outside a checkout writes to the user's data
folder and never into the installed package, which carries ``claims/summary.json``.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyheads.errors import UserError

if TYPE_CHECKING:
    from manyheads.experiment.claim import Claim, ClaimResult

__all__ = ["load", "results_folder", "slugs", "stored", "summary"]

_FOLDER = Path(__file__).resolve().parent
SUMMARY = _FOLDER / "summary.json"
DEVICES = ("cpu", "cuda")


def slugs() -> list[str]:
    """Return the slugs that have a claim, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("[a-z]*.py"))


def load(slug: str) -> Claim:
    """Import the claim of `slug`.

    Raises:
        UserError: there is none; the message names those that there are.
    """
    from manyheads.experiment.claim import Claim

    if slug not in slugs():
        raise UserError(f"{slug} has no claim yet; there are claims of: {', '.join(slugs()) or 'none yet'}")
    claim = import_module(f"{__name__}.{slug}").claim
    if not isinstance(claim, Claim) or claim.slug != slug:
        raise TypeError(f"claims/{slug}.py must expose `claim`, a Claim with slug {slug!r}")
    return claim


def results_folder() -> Path:
    """Where results are written: ``results/claims`` of a checkout, else the user's data folder."""
    root = _FOLDER.parents[2]
    if (root / "pyproject.toml").is_file() and (root / ".git").exists():
        return root / "results" / "claims"
    return Path.home() / ".local" / "share" / "manyheads" / "claims"


def stored(slug: str, folder: Path | None = None) -> list[ClaimResult]:
    """What is stored of the claim of `slug`, one result a device.

    Raises:
        UserError: a file is damaged.
    """
    from manyheads.experiment.claim import read_result

    place = folder or results_folder()
    found = (read_result(place / f"{slug}.{device}.json") for device in DEVICES)
    return [result for result in found if result is not None]


def summary() -> dict[str, Any]:
    """Lines of all claims as they stood when the package was made: ``{slug: {device: {"line": ..., "date": ...}}}``.

    Results of one's own come first, see :func:`stored`. Imports nothing.
    """
    try:
        found: dict[str, Any] = json.loads(SUMMARY.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found
