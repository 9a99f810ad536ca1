# SPDX-License-Identifier: Apache-2.0
"""Dialogues of emotional support, and instructions for a reply whose following code can tell.

The dialogues are real ones of ESConv, or a few lines of our own where nothing is to be downloaded. Those that ESConv
kept are published by turns, each with some turns before it, and are put together again here. Each instruction has a
reply that follows it, all of one meaning, so that a model can be asked which of them it holds likeliest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

__all__ = ["INSTRUCTIONS", "Instruction", "dialogues"]

Message = dict[str, str]
_TURN = re.compile(r"[\d.]+ ([01]) (\d+) (?:\[[^\]]*\] )?(.*)")  # weight, who, its number, strategy, and what was said
_SPANISH = frozenset(
    "el la los las un una de que no es por con para y me te lo su estoy esto eso cómo pero muy".split()
)


@dataclass(frozen=True)
class Instruction:
    """How a reply is to be written.

    Attributes:
        name: in rows.
        text: of the instruction.
        reply: one that follows it.
        followed: whether any reply does, by code.
    """

    name: str
    text: str
    reply: str
    followed: Callable[[str], bool]


def _upper(reply: str) -> bool:
    return reply == reply.upper() and any(letter.isalpha() for letter in reply)


def _spanish(reply: str) -> bool:
    words = [word.strip(".,;:!?¡¿\"'").lower() for word in reply.split()]
    return len(words) > 2 and sum(word in _SPANISH for word in words) * 4 >= len(words)


INSTRUCTIONS = (
    Instruction(
        "upper case", "Write every reply in upper case letters.", "I AM SORRY TO HEAR THAT. PLEASE TELL ME MORE.",
        _upper,
    ),
    Instruction(
        "Spanish", "Write every reply in Spanish.", "Siento mucho oír eso. Por favor, cuéntame más.", _spanish
    ),
    Instruction(
        "bullet list", "Write every reply as a bullet list.", "- I am sorry to hear that.\n- Please tell me more.",
        lambda reply: reply.lstrip()[:2] in ("- ", "* ", "• "),
    ),
    Instruction(
        "Captain", "Call the user Captain in every reply.", "I am sorry to hear that, Captain. Please tell me more.",
        lambda reply: "captain" in reply.lower(),
    ),
)  # fmt: skip


def dialogues(least: int, source: str = "esconv") -> list[list[Message]]:
    """Dialogues of ``least`` messages or more, the user's first; who writes twice in a row has one message of it.

    Args:
        least: messages.
        source: ``esconv``, those that were not kept for ESConv; ``esconv-dev`` or ``esconv-test``, of its parts of that
            name; or ``made``: eight dialogues of any length that are made here.

    Raises:
        UserError: the file of ESConv cannot be had.
    """
    if source == "made":
        return [[_line(n, i) for i in range(least)] for n in range(8)]
    found = [_joined(told) for told in (_failed() if source == "esconv" else _kept(source))]
    return [turns for turns in found if len(turns) >= least]


def _failed() -> Iterator[list[tuple[bool, str]]]:
    """By dialogue, whether the user wrote, and what."""
    from . import files

    for entry in json.loads(files.text("esconv-failed")):
        yield [(line["speaker"] == "speaker", line["content"]) for line in entry["dialog"]]


def _kept(name: str) -> Iterator[list[tuple[bool, str]]]:
    """As :func:`_failed`, of lines that each hold a turn of the assistant's behind some before it."""
    from . import files

    told: dict[int, tuple[bool, str]] = {}
    for line in files.text(name).splitlines():
        cells = [_TURN.fullmatch(cell.strip()) for cell in re.split(r"\bEOS\b", line)]
        turns = {int(cell[2]): (cell[1] == "0", cell[3]) for cell in cells if cell}
        if told and max(turns) <= max(told):  # numbers begin anew
            yield [told[i] for i in sorted(told)]
            told = {}
        told |= turns
    yield [told[i] for i in sorted(told)]


def _joined(told: Iterable[tuple[bool, str]]) -> list[Message]:
    turns: list[Message] = []
    for user, said in told:
        role, content = "user" if user else "assistant", " ".join(said.split())
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += f" {content}"
        elif turns or role == "user":
            turns.append({"role": role, "content": content})
    return turns


def _line(n: int, i: int) -> Message:
    days = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
    if i % 2:
        return {"role": "assistant", "content": f"That sounds hard. What happened on {days[(n + i) % 5]}?"}
    return {"role": "user", "content": f"I had a bad day on {days[(n + i) % 5]}, and I slept {3 + (n + i) % 4} hours."}
