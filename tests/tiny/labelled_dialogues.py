# SPDX-License-Identifier: Apache-2.0
"""A folder of twelve dialogues whose turns of the resister have labels, and the task on it with learned words."""

import csv

import pytest

from manyheads.tasks.language.resisting_strategies import ResistingStrategies

SAID = {
    "": ("please give us some {0} now", "many {0} children need help"), "not-a-strategy": ("yes i see that",),
    "hesitance": ("maybe later not {0}",), "organization-inquiry": ("what do they do with {0}", "who are they"),
}  # fmt: skip
THINGS = ("money", "food", "time", "books")


def rows(number):
    """Turns of a dialogue: two of the persuader's, one of the resister's, and so on; their number differs."""
    labels = list(SAID)
    found = []
    for n in range(5 + number % 4):
        label = "" if n % 3 < 2 and n < 4 + number % 4 else labels[1 + (n + number) % 3]
        said = SAID[label][(n + number) % len(SAID[label])]
        found.append(
            (said.format(THINGS[(n * number) % 4]), int(label != ""), label if label != "not-a-strategy" else "")
        )
    return found


def write(path, turns, columns=("text", "resists", "label")):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *(turn[: len(columns)] for turn in turns)])


@pytest.fixture
def dialogues(tmp_path):
    """The task, without a published encoder."""
    for number in range(12):
        write(tmp_path / f"d{number}.csv", rows(number))
    return ResistingStrategies(
        folder=str(tmp_path), words="learned", dim=8, heads=2, batch=3, steps=3, rates=(3e-3,), dropout=0.0, most=6,
    )  # fmt: skip
