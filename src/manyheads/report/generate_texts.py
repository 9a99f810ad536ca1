# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads generate`` shows of texts: replies side by side, marked from where they differ, and their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..formatting import percent, size
from ..generate.texts import pieces
from .page import Code, Headline, Page, Replies, Section, Text, made
from .table import Column, Table, print_lines, print_table

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["page", "print_facts", "table"]

_ONCE = "Seconds are of one measurement in this order, no benchmark: `manyheads compare --tasks speed` times in turns."


def table(prompt: Mapping[str, Any]) -> Table:
    """One row per arm: bytes held, seconds, and where its words leave those of the first arm."""
    columns = [
        Column("arm", text=True), Column("held after\nthe prompt"), Column("of full"), Column("at the end"),
        Column("prompt", "s, once"), Column("reply", "s, once"), Column("tokens"), Column("forwards"),
        Column("first other word", text=True),
    ]  # fmt: skip
    rows = []
    for i, reply in enumerate(prompt["replies"]):
        rows.append(
            [
                reply["arm"], size(reply["held_bytes"]), percent(reply["held_ratio"]), size(reply["end_bytes"]),
                f"{reply['prompt_seconds']:.2f}", f"{reply['reply_seconds']:.2f}", str(reply["tokens"]),
                str(reply["forwards"]),
                "" if not i else _where(reply),
            ]
        )  # fmt: skip
    return Table(columns, rows, repeats=True)


def _title(prompt: Mapping[str, Any]) -> str:
    seeds = {reply["seed"] for reply in prompt["replies"]} - {None}
    return f"{prompt['prompt_tokens']} tokens" + "".join(f", seed {seed}" for seed in seeds)


def _where(reply: Mapping[str, Any]) -> str:
    return "none: the same" if reply["differs_at"] is None else f"word {reply['differs_at'] + 1}"


def _parted(reply: Mapping[str, Any]) -> tuple[str, str]:
    """The words that are those of the first arm, and the others."""
    at, said = reply["differs_at"], pieces(reply["text"].lstrip("\n"))
    return ("".join(said), "") if at is None else ("".join(said[:at]), "".join(said[at:]))


def _alike(prompts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each arm but the first: how many replies are the same, word by word."""
    first = prompts[0]["replies"][0]["arm"]
    said = []
    for i, reply in enumerate(prompts[0]["replies"][1:], 1):
        same = sum(prompt["replies"][i]["differs_at"] is None for prompt in prompts)
        share = sum(prompt["replies"][i]["held_ratio"] for prompt in prompts) / len(prompts)
        said.append(
            f"{reply['arm']} replies as {first} does to {same} of {len(prompts)} prompt(s), and holds "
            f"{percent(share)} of its bytes when the prompt is read"
        )
    return said


def print_facts(facts: Mapping[str, Any], console: Console) -> None:
    """Print the replies to each prompt, what differs in bold, and a table of what they cost."""
    from rich.text import Text as RichText

    for prompt in facts["prompts"]:
        console.print(RichText(f"\n{prompt['prompt']}", "bold"), RichText(f"({_title(prompt)})", "dim"))
        for reply in prompt["replies"]:
            same, other = _parted(reply)
            console.print(RichText(f"\n{reply['arm']}", "cyan"))
            console.print(RichText(same).append(other, "bold yellow"), soft_wrap=True)
        print_table(table(prompt), console)
    print_lines([_ONCE.replace("`", ""), *([f"page: {facts['out']}"] if facts["out"] else [])], console)


def page(facts: Mapping[str, Any]) -> Page:
    """The same as a page."""
    sections = []
    for prompt in facts["prompts"]:
        replies = [(reply["arm"], _about(reply), *_parted(reply)) for reply in prompt["replies"]]
        sections.append(Section(_title(prompt), [Code(prompt["prompt"]), Replies(replies), table(prompt)]))
    run = {"command": facts["command"], "environment": facts["environment"]}
    about: list[tuple[str, Any, str]] = [
        ("model", facts["model"], facts["model_class"]), ("dtype", facts["dtype"], ""),
        ("chat template", "yes" if facts["chat"] else "no", ""),
    ]  # fmt: skip
    return Page(
        facts["model"], "Replies side by side",
        f"{len(facts['prompts'])} prompt(s), the likeliest token at every step unless the arm chooses "
        "others; marked from the first word that is another than the first arm's",
        [Headline(line + ".") for line in _alike(facts["prompts"])],
        [*sections, Section("Read with care", [Text(_ONCE.replace("`", ""))]), made(run, about, "", "made in Python")],
    )  # fmt: skip


def _about(reply: Mapping[str, Any]) -> str:
    seconds = reply["prompt_seconds"] + reply["reply_seconds"]
    return f"{size(reply['held_bytes'])} ({percent(reply['held_ratio'])} of full), {seconds:.1f} s once"
