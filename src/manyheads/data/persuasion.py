# SPDX-License-Identifier: Apache-2.0
"""Dialogues in which one side persuades, with the strategies by which the other resists: RESPER, files of one's own.

``persuasion``   288 dialogues of PersuasionForGood, 10,392 sentences; the persuadee's 4,638 have one of ten labels
``negotiation``  719 dialogues of CraigslistBargain, 8,592 turns; both sides resist, and all have one of eight labels

The annotations are RESPER's. Rows of the negotiations that are marked as copies of others are left out. The repository
states no licence for them.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from . import files

__all__ = ["NONE", "Dialogue", "Turn", "donated", "negotiations", "persuasions", "read_dialogue", "read_folder"]

NONE = "not-a-strategy"


@dataclass(frozen=True, slots=True)
class Turn:
    """What somebody said.

    Attributes:
        text: of it.
        own: whether it is of somebody who may resist, so that it has a label.
        label: its strategy; empty where it is not ``own``, or not known.
    """

    text: str
    own: bool
    label: str = ""


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns in their order."""

    name: str
    turns: tuple[Turn, ...]


def _collected(rows: Sequence[tuple[str, Turn]]) -> tuple[Dialogue, ...]:
    found: dict[str, list[Turn]] = {}
    for name, turn in rows:
        found.setdefault(name, []).append(turn)
    return tuple(Dialogue(name, tuple(turns)) for name, turns in found.items())


def persuasions() -> tuple[Dialogue, ...]:
    """PersuasionForGood: a persuader asks for a donation, the persuadee's sentences are labelled.

    Raises:
        UserError: the file cannot be had.
    """
    rows = csv.DictReader(io.StringIO(files.text("resper-persuasion")))
    return _collected([(row["B2"], Turn(row["Unit"], row["B4"] == "1", row["Our Label"])) for row in rows])


def donated() -> dict[str, bool]:
    """Whether the persuadee gave anything in the end, by dialogue of :func:`persuasions`.

    Raises:
        UserError: the file cannot be had.
    """
    rows = csv.DictReader(io.StringIO(files.text("resper-donations")))
    return {row["B2"]: float(row["B6"]) > 0 for row in rows if row["B4"] == "1"}


def negotiations() -> tuple[Dialogue, ...]:
    """CraigslistBargain: a buyer and a seller; what has no label is no strategy.

    Raises:
        UserError: the file cannot be had.
    """
    rows = list(csv.reader(io.StringIO(files.text("resper-negotiation"))))[1:]
    # The last column is for remarks: "Dupe", and "Dupes start here" and "till this point" about the rows between.
    kept = [row for row in rows if not row[5].startswith("Dupe")]
    # A label is "Information Inquiry-Contesting": a strategy and the kind of strategy that it is.
    return _collected(
        [(row[0], Turn(row[2], True, row[3].rpartition("-")[0].lower().replace(" ", "-") or NONE)) for row in kept]
    )


def read_folder(folder: Path) -> tuple[Dialogue, ...]:
    """Dialogues of the user's own, a file ``NAME.csv`` each, as :func:`read_dialogue` has them.

    Raises:
        UserError: there is none, or a file is none.
    """
    if not (found := tuple(read_dialogue(path) for path in sorted(folder.glob("*.csv")))):
        raise UserError(f"{folder} holds no dialogue NAME.csv")
    return found


def read_dialogue(path: Path) -> Dialogue:
    """A file with a row for each turn: ``text``, ``resists`` (1 or 0), and ``label`` where it is known.

    A turn of somebody who resists and has no label is no strategy, unless the file has no such column at all.

    Raises:
        UserError: it is no such file, or nobody may resist in it.
    """
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text with a row for each turn") from error
    if not rows or not {"text", "resists"} <= set(rows[0]):
        raise UserError(
            f"{path} has no rows under a header with text and resists (1 or 0), and label where it is known"
        )
    if wrong := [row["resists"] for row in rows if row["resists"] not in ("0", "1")]:
        raise UserError(f"{path}: resists is 1 for who may resist and 0 for others, not {wrong[0]!r}")
    if all(row["resists"] == "0" for row in rows):
        raise UserError(f"{path} has no turn of who may resist: resists is 0 everywhere")
    known = "label" in rows[0]
    turns = tuple(
        Turn(row["text"] or "", own, (row["label"] or NONE) if own and known else "")
        for row in rows for own in [row["resists"] == "1"]
    )  # fmt: skip
    return Dialogue(path.stem, turns)
