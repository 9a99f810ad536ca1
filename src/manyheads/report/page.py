# SPDX-License-Identifier: Apache-2.0
"""One page for all verbs: headlines, then sections of figures, cards, tables and notes, then how it was made.

A page is one file that asks for nothing: no network, and no script but ours, which its policy names by its hash. All
texts are escaped. Everything but what the script offers can be read without it. A part of a section is drawn by the
macro of its class's name in ``parts.html.j2``.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING, Any

from .table import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..inspect.checks import HealthCheck

__all__ = [
    "Card", "Cards", "Check", "Code", "Details", "Facts", "Figure", "Headline", "Notes", "Overlays", "Page", "Part",
    "Replies", "Section", "Table", "Text", "Thumbs", "Tokens", "made", "render", "write",
]  # fmt: skip


@dataclass(frozen=True)
class Headline:
    """A sentence that says what was found; ``lead`` stands before it in bold, ``level`` is a check's."""

    text: str
    lead: str = ""
    level: str = ""


@dataclass(frozen=True)
class Figure:
    """An SVG and what it shows; nothing where the SVG is empty."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Card:
    """A small picture with its title.

    Attributes:
        title: above it.
        picture: SVG, or empty.
        about: below the title.
        log: the same with logarithmic colours, that a script shows in its place.
        said: below the picture.
        values: the numbers behind it.
        width: CSS class: ``wide`` or ``lines``, or empty.
    """

    title: str
    picture: str = ""
    about: str = ""
    log: str = ""
    said: str = ""
    values: Table | None = None
    width: str = ""


@dataclass(frozen=True)
class Cards:
    """Cards beside each other, under a heading of their own."""

    cards: Sequence[Card]
    title: str = ""
    about: str = ""


@dataclass(frozen=True)
class Thumbs:
    """Images beside each other: ``(name, note, source)`` each; ``alt`` is said before the name."""

    images: Sequence[tuple[str, str, str]]
    alt: str


@dataclass(frozen=True)
class Text:
    """A paragraph; small and grey where ``soft``. With ``toggle`` a script's button for logarithmic colours follows."""

    text: str
    soft: bool = True
    toggle: bool = False


@dataclass(frozen=True)
class Notes:
    """A list of sentences."""

    lines: Sequence[str]


@dataclass(frozen=True)
class Details:
    """A table that is folded away."""

    summary: str
    table: Table


@dataclass(frozen=True)
class Code:
    """Code or a command, as it is."""

    text: str


@dataclass(frozen=True)
class Check:
    """One thing that was looked for: its level, its figure and what it means, and the pictures behind it."""

    found: HealthCheck
    cards: Sequence[Card]


@dataclass(frozen=True)
class Tokens:
    """Tokens in colour, ``(text, CSS classes)`` each; a script offers other series and prompts."""

    label: str
    tokens: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Replies:
    """Texts beside each other: ``(title, about, beginning, rest)`` each; the rest is marked."""

    replies: Sequence[tuple[str, str, str, str]]


@dataclass(frozen=True)
class Overlays:
    """Maps over an image.

    Attributes:
        number: of the row.
        picture: source of the image, of ``size`` (width, height).
        maps: name, unit, what is said of it, source of the map or empty, and the ends of its colours.
        ramp: source of the colours in a row.
        shown: what the image is.
    """

    number: int
    picture: str
    size: tuple[int, int]
    maps: Sequence[Mapping[str, Any]]
    ramp: str
    shown: str = "generated"


@dataclass(frozen=True)
class Facts:
    """Names and values, ``(name, value, small)`` each."""

    rows: Sequence[tuple[str, Any, str]]


Part = Figure | Cards | Thumbs | Text | Notes | Details | Code | Check | Tokens | Replies | Overlays | Facts | Table


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it; left out where nothing does."""

    title: str
    parts: Sequence[Part | None]

    @property
    def shown(self) -> list[Part]:
        """The parts that have something to show."""
        parts = [part for part in self.parts if part is not None]
        return [
            part
            for part in parts
            if not (isinstance(part, Figure) and not part.svg) and not (isinstance(part, Cards) and not part.cards)
        ]


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: of the browser's window.
        heading: what the page answers.
        short: the run in a line.
        headlines: what was found, in plain words.
        sections: in their order.
        script: name of the script that works on ``data``; the page has none where there is no ``data``.
        data: for the script, of JSON's types.
        controls: what the script lets choose (see ``parts.html.j2``), for pages of maps.
    """

    title: str
    heading: str
    short: str
    headlines: Sequence[Headline]
    sections: Sequence[Section]
    script: str = ""
    data: Any = None
    controls: Mapping[str, Any] = field(default_factory=dict)


def made(run: Mapping[str, Any], facts: Sequence[tuple[str, Any, str]], note: str, python: str) -> Section:
    """How a run was made: its command (``python`` says where it was none), ``facts``, versions, date and sources."""
    command = run.get("command")
    seconds = run.get("seconds")
    date = run.get("started") or run.get("date") or ""
    rows = [*facts, *((name, value, "") for name, value in run.get("environment", {}).items() if value is not None)]
    rows.append(("date", f"{date}, {seconds:.0f} s" if seconds else date, ""))
    return Section("How it was made", [Code(shlex.join(command) if command else python), Facts(rows), Text(note)])


def markup(text: str) -> Any:
    """``text`` as HTML that is not escaped again."""
    from markupsafe import Markup

    return Markup(text)


def embedded(data: Any) -> Any:
    """JSON that stands inside an element: nothing in it can end the element that holds it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return markup(text)


def _file(name: str) -> str:
    return (resources.files(__package__ or "") / "templates" / name).read_text("utf-8")


def render(page: Page) -> str:
    """The page as HTML."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader(__package__ or ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["markup"] = markup
    code = "" if page.data is None else _file(page.script)
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        page=page, style=markup(_file("style.css")), script=markup(code),
        script_hash=markup(f"'sha256-{digest}'") if code else markup("'none'"),
        data="" if page.data is None else embedded(page.data),
    )  # fmt: skip


def write(page: Page, path: Path, option: str = "--out") -> Path:
    """Write the page to where the user's ``option`` says; the file holds all of it or is what it was.

    Raises:
        UserError: it cannot be written.
    """
    from ..files import write_asked

    return write_asked(path, render(page), option)
