# SPDX-License-Identifier: Apache-2.0
"""The catalogue of papers: what there is, what stands, and the strategy behind a slug.

`papers.toml` says what a paper is; files say what stands. The slug names all four of them:
``<category>/<slug>.py`` (the strategy), ``claims/<slug>.py`` (its claim), ``<slug>.<device>.json`` (the claim's
results, see `results_folder`) and, in a checkout, ``tests/<category>/test_<slug>.py``. A paper with several strategies
is a folder ``<category>/<slug>/`` instead: its ``__all__`` names them, each has a module of its own, and ``slug.part``
is the one in the module ``part``. Nothing here imports a strategy except `strategies` and `load`.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from manyheads.errors import UserError

if TYPE_CHECKING:
    from manyheads.strategy import Strategy

PACKAGE = Path(__file__).resolve().parent
RECOMMENDED = "hedge"  # what the spec "auto" stands for

Training = Literal["none", "calibration", "required"]
State = Literal["planned", "untested", "strategy", "claim", "checked"]
STATES: tuple[State, ...] = get_args(State)
_DEVICES = ("cpu", "cuda")  # that claims are checked on

# What a search may find for a paper's `training`: words, so that "without training" ranks what needs none.
_TRAINING_WORDS = {
    "none": "training-free, without training, no training",
    "calibration": "needs a calibration pass",
    "required": "needs training",
}
_WEIGHTS = (8.0, 4.0, 4.0, 2.0, 1.0, 2.0)  # bm25 weights of slug, title, tags, summary, category, training
_STOP_WORDS = frozenset(
    "a an and any are as at be by can do does for from has have how i in into is it its me my of on or our that the "
    "out run runs running their them these this those to too use using we what when where which while who why will "
    "with you your".split()
)
# What people say, and what the rows call it.
_SAID_FOR = {
    "gpu": "cache memory", "haystack": "cache recall", "memory": "cache", "needle": "cache recall",
    "oom": "cache memory", "ram": "cache memory", "ruler": "cache recall", "serve": "cache", "serving": "cache",
    "slow": "speed fast", "sglang": "cache", "vllm": "cache", "vram": "cache memory",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Paper:
    """One row of the catalogue: a paper, or a baseline (`id` is None) that papers are measured against."""

    id: int | None = None
    slug: str
    category: str  # folder of the strategy, may be nested: "domains/vision"
    title: str
    summary: str  # one line: what it changes, what it needs or gives
    tags: tuple[str, ...]
    training: Training
    arxiv: str | None = None

    @property
    def baseline(self) -> bool:
        """Whether this is a method to measure against rather than a paper of the catalogue."""
        return self.id is None

    @property
    def module(self) -> str:
        """Name of the module that holds, or will hold, the strategy."""
        return f"manyheads.{self.category.replace('/', '.')}.{self.slug}"

    @property
    def family(self) -> str | None:
        """Name of the family of attention that it is in by what it costs, None where it is in none."""
        return _families().get(self.slug)

    @property
    def state(self) -> State:
        """What stands of this paper, read from the files (see `state_in`)."""
        return state_in(PACKAGE, self.category, self.slug)

    @property
    def checks(self) -> str:
        """What the checks of its claims say, a line for each device and subject; empty where none was run."""
        parts = sorted(path.stem for path in (PACKAGE / "claims" / self.slug).glob("[a-z]*.py"))
        named = {"": self.slug} | {f"{part}, ": f"{self.slug}.{part}" for part in parts}
        known = {start: checks_in(PACKAGE, slug) for start, slug in named.items()}
        return "; ".join(f"{one['line']} ({start}{on})" for start, every in known.items() for on, one in every.items())

    def row(self) -> dict[str, object]:
        """Return what ``--json`` prints of this paper."""
        return {
            "id": self.id,
            "slug": self.slug,
            "category": self.category,
            "family": self.family,
            "title": self.title,
            "state": self.state,
            "checks": self.checks,
            "training": self.training,
            "tags": list(self.tags),
            "summary": self.summary,
            "arxiv": self.arxiv,
        }


def state_in(package: Path, category: str, slug: str) -> State:
    """Derive a state from the files under `package`, the folder of the installed package, and the stored results.

    "planned": no strategy file. "untested": a strategy without ``test_<slug>.py``; tests are looked for in a checkout
    only, they are not installed. "strategy": no claim yet. "claim": a claim of which no full run is stored. "checked":
    there is one; what its checks say is another matter, see `Paper.checks`.
    """
    if not _stands(package, category, slug):
        return "planned"
    tests = package.parents[1] / "tests"
    in_checkout = tests.is_dir() and (package.parents[1] / "pyproject.toml").is_file()
    test = f"test_{slug}.py"
    if in_checkout and not (tests / category / test).is_file() and not any(tests.rglob(test)):
        return "untested"
    if not _is_there(package / "claims", slug):
        return "strategy"
    return "checked" if any(found["full"] for found in checks_in(package, slug).values()) else "claim"


def results_folder(package: Path = PACKAGE) -> Path:
    """Where results of claims are kept: ``results/claims`` of a checkout, else the user's data folder."""
    root = package.parents[1]
    if (root / "pyproject.toml").is_file() and (root / ".git").exists():
        return root / "results" / "claims"
    return Path.home() / ".local" / "share" / "manyheads" / "claims"


def results_of(slug: str, folder: Path) -> dict[str, Path]:
    """Files of results of a claim in ``folder`` by what they were measured on: ``cpu``, ``cpu, gemma3-270m``."""
    files: dict[str, Path] = {}
    for device in _DEVICES:
        own, start = folder / f"{slug}.{device}.json", f"{slug}.{device}."
        others = sorted(path for path in folder.glob(f"{start}*.json") if path != own)
        named = {f"{device}, {path.name.removeprefix(start).removesuffix('.json')}": path for path in others}
        files |= ({device: own} if own.is_file() else {}) | named
    return files


def checks_in(package: Path, slug: str) -> dict[str, dict[str, Any]]:
    """What is known of a claim by device, and subject if not its own: ``line``, ``date``, and whether it is ``full``.

    Results of one's own come first, then those that the package was made with. Reads JSON only.

    Raises:
        UserError: a file of results is damaged.
    """
    packed = _json(package / "claims" / "summary.json").get(slug, {})
    own = {}
    for on, path in results_of(slug, results_folder(package)).items():
        try:
            own[on] = digest(_json(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no result of a claim ({error}); delete it and run the claim again") from error
    return dict(sorted((packed | own).items()))


def digest(stored: dict[str, Any]) -> dict[str, Any]:
    """What `checks_in` says of a file of results."""
    full = [run for run in stored["runs"] if run["size"] != "quick" and run["legacy"] is None]
    dates = [run["date"] for run in full or stored["runs"]]
    return {"line": stored["line"], "date": max(dates), "full": bool(full)}


def _json(path: Path) -> dict[str, Any]:
    """Contents of a file, empty where there is none; UserError where it is damaged."""
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except ValueError as error:
        raise UserError(f"{path} is no result of a claim ({error}); delete it and run the claim again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is no result of a claim; delete it and run the claim again")
    return found


def _stands(package: Path, category: str, slug: str) -> bool:
    """Whether there is a strategy: a file, or a folder of several."""
    return _is_there(package / category, slug)


def _is_there(place: Path, slug: str) -> bool:
    """Whether a folder has the module ``slug``: a file, or a folder of its own."""
    return (place / f"{slug}.py").is_file() or (place / slug / "__init__.py").is_file()


@cache
def _families() -> dict[str, str]:
    """Family of each strategy by its slug, of ``costs/families.toml``; imports none of the formulas."""
    with (PACKAGE / "costs" / "families.toml").open("rb") as file:
        return {slug: name for name, row in tomllib.load(file).items() for slug in row["members"]}


@cache
def _rows() -> tuple[Paper, ...]:
    """Read papers.toml once: papers in the order of their numbers, then baselines."""
    with (PACKAGE / "papers.toml").open("rb") as file:
        tables = tomllib.load(file)
    return tuple(Paper(**{**row, "tags": tuple(row["tags"])}) for row in [*tables["paper"], *tables["baseline"]])


def papers() -> list[Paper]:
    """Return the papers of the catalogue, by number."""
    return [row for row in _rows() if not row.baseline]


def baselines() -> list[Paper]:
    """Return the methods that papers are measured against."""
    return [row for row in _rows() if row.baseline]


def names() -> list[str]:
    """Return every slug, papers first."""
    return [row.slug for row in _rows()]


def categories() -> list[str]:
    """Return every category, sorted."""
    return sorted({row.category for row in _rows()})


def nearest(name: str, among: list[str] | None = None) -> list[str]:
    """Return up to three names that `name` may have meant: those that contain it, then those spelled like it."""
    from difflib import get_close_matches

    known = names() if among is None else among
    wanted = name.strip().lower().replace("-", "_")
    containing = [slug for slug in known if wanted and wanted in slug]
    return list(dict.fromkeys([*containing, *get_close_matches(wanted, known, n=3, cutoff=0.5)]))[:3]


def get(slug: str) -> Paper:
    """Return the row named `slug`, or that of ``slug.part``.

    Raises:
        UserError: there is none; the message holds the nearest names.
    """
    for row in _rows():
        if row.slug == slug.partition(".")[0]:
            return row
    close = nearest(slug)
    hint = f"did you mean {', '.join(close)}?" if close else "`manyheads list` shows all names"
    raise UserError(f"unknown strategy {slug!r}: {hint}")


def strategies(slug: str) -> dict[str, type[Strategy]]:
    """Import the strategies of a paper: their classes by their slugs, ``slug`` or ``slug.part``.

    A file has one, the one `Strategy` that it defines; a folder those that its ``__all__`` names.

    A part of a paper is named behind it, as `pab.redundancy`, and lies in a file of that name in the paper's folder.

    Raises:
        UserError: the name is unknown, or the paper has no strategy yet.
        TypeError: a file that does not define exactly one, or a folder that shows none, or two of one module.
    """
    paper = get(slug)
    if not _stands(PACKAGE, paper.category, paper.slug):
        standing = ", ".join(row.slug for row in _rows() if row.state != "planned") or "none yet"
        raise UserError(f"{slug} is in the catalogue but has no strategy yet; these stand: {standing}")
    from manyheads.strategy import Strategy

    module = import_module(paper.module)
    folder = hasattr(module, "__path__")
    found = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, Strategy)
        if (name in module.__all__ if folder else value.__module__ == module.__name__)
    ]
    made = {cls.slug: cls for cls in found}
    if not folder and len(found) != 1:
        raise TypeError(f"{paper.module} must define exactly one Strategy, not {[c.__name__ for c in found]}")
    if not found or len(made) < len(found):
        raise TypeError(f"{paper.module} must show strategies, each of its own module, not {sorted(made)}")
    return made


def load(slug: str) -> type[Strategy]:
    """Import the strategy named `slug` or ``slug.part`` and return its class.

    A bare slug means the part of the same name, or the only one.

    Raises:
        UserError: the name is unknown or stands for several strategies, or the paper has no strategy yet.
        TypeError: see `strategies`.
    """
    found = strategies(slug)
    if slug in found:
        return found[slug]
    if "." not in slug and len(found) == 1:
        return next(iter(found.values()))
    raise UserError(f"{slug} names no strategy; of this paper there are {', '.join(sorted(found))}")


def find(words: str, limit: int = 10) -> list[tuple[Paper, float]]:
    """Rank papers and baselines by how well they match any of `words`.

    Full-text search over slug, title, tags, summary, category and need of training: words are reduced to their stems
    (Porter) and weighed by their rarity (bm25). Some words also stand for those of the rows: "vllm" for a cache.

    Args:
        words: what is looked for, as one would say it.
        limit: the most rows to return.

    Returns:
        Rows with their score, best first; the score is positive and only comparable within one search.
        Empty when nothing matches or `words` says nothing.
    """
    import re
    import sqlite3
    from contextlib import closing

    terms = [word for word in re.findall(r"[^\W_]+", words.lower()) if word not in _STOP_WORDS]
    terms += [word for term in terms for word in _SAID_FOR.get(term, "").split()]
    if not terms:
        return []
    query = " OR ".join(f'"{term}"' for term in terms)
    with closing(sqlite3.connect(":memory:")) as table:
        columns = "slug, title, tags, summary, category, training"
        table.execute(f"CREATE VIRTUAL TABLE row USING fts5({columns}, tokenize='porter unicode61')")
        texts = (
            (r.slug, r.title, " ".join(r.tags), r.summary, r.category, _TRAINING_WORDS[r.training]) for r in _rows()
        )
        table.executemany("INSERT INTO row VALUES (?, ?, ?, ?, ?, ?)", texts)
        ranked = table.execute(
            f"SELECT rowid, bm25(row, {', '.join('?' * len(_WEIGHTS))}) AS cost FROM row WHERE row MATCH ? "
            "ORDER BY cost, rowid LIMIT ?",
            (*_WEIGHTS, query, limit),
        ).fetchall()
    return [(_rows()[rowid - 1], -cost) for rowid, cost in ranked]
