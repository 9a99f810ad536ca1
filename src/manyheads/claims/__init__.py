# SPDX-License-Identifier: Apache-2.0
"""Claims: the headline of each paper as data, checked at the scale of the machine at hand.

``claims/<slug>.py`` exposes ``claim``, a :class:`manyheads.experiment.claim.Claim`, and nothing else. A paper of which
two things are measured that share no arms is a folder: ``<slug>/__init__.py`` has the claim, ``<slug>/<part>.py`` that
of ``slug.part``, which has results of its own. Results are kept
per device in ``results/claims/<slug>.<device>.json`` of a checkout, those on another subject than the claim's own in
``<slug>.<device>.<subject>.json``; a run outside a checkout writes to the user's data
folder and never into the installed package, which carries ``claims/summary.json``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyheads.catalog import digest, results_folder, results_of
from manyheads.errors import UserError

if TYPE_CHECKING:
    from manyheads.experiment.claim import Claim, ClaimResult

__all__ = ["SUMMARY", "known", "load", "of_paper", "results_folder", "slugs", "stored", "summary"]

_FOLDER = Path(__file__).resolve().parent
SUMMARY = _FOLDER / "summary.json"


def slugs() -> list[str]:
    """Return the slugs that have a claim, sorted, those of parts of a paper as ``slug.part``."""
    forms = ("[a-z]*.py", "[a-z]*/__init__.py", "[a-z]*/[a-z]*.py")
    files = [path.relative_to(_FOLDER) for form in forms for path in _FOLDER.glob(form)]
    return sorted(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files)


def of_paper(slug: str) -> list[str]:
    """Return the slugs of the claims of a paper: its own, and those of its parts."""
    return [name for name in slugs() if name.partition(".")[0] == slug]


def known(slug: str) -> str:
    """`slug`, which has a claim.

    Raises:
        UserError: it has none; the message names those that there are.
    """
    if slug not in slugs():
        from manyheads.catalog import nearest

        close = nearest(slug, slugs())
        hint = f"did you mean {close[0]}?" if close else f"there are claims of: {', '.join(slugs()) or 'none yet'}"
        raise UserError(f"{slug} has no claim yet; {hint}")
    return slug


def load(slug: str) -> Claim:
    """Import the claim of `slug`.

    Raises:
        UserError: there is none; the message names those that there are.
    """
    from manyheads.experiment.claim import Claim

    claim = import_module(f"{__name__}.{known(slug)}").claim
    if not isinstance(claim, Claim) or claim.slug != slug:
        raise TypeError(f"claims/{slug}.py must expose `claim`, a Claim with slug {slug!r}")
    return claim


def stored(slug: str, folder: Path | None = None) -> list[ClaimResult]:
    """What is stored of the claim of `slug`, one result for each device and subject.

    Raises:
        UserError: a file is damaged.
    """
    from manyheads.experiment.claim import read_result

    place = folder or results_folder()
    found = (read_result(path) for path in results_of(slug, place).values())
    return [result for result in found if result is not None]


def summary(folder: Path | None = None) -> dict[str, dict[str, dict[str, Any]]]:
    """Lines of all claims by slug, device and subject, from stored results: what the package has as summary.json.

    ``{slug: {device: {"line": ..., "date": ..., "full": ...}}}``; :func:`manyheads.catalog.checks_in` reads it.

    Raises:
        UserError: a file of results is damaged.
    """
    found = {}
    for slug in slugs():
        known = [result for result in stored(slug, folder) if result.deciding]
        lines = {result.runs[0].measured: digest(result.plain()) for result in known}
        if lines:
            found[slug] = lines
    return found
