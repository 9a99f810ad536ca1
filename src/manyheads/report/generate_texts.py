# SPDX-License-Identifier: Apache-2.0
"""What ``manyheads generate`` shows of texts: replies side by side, marked from where they differ, and their cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..formatting import number, percent, size
from ..generate.texts import pieces
from .heads import card_of, script_data
from .inspect import rows_of_heads
from .page import Cards, Code, Headline, Notes, Page, Replies, Section, Text, made
from .table import Column, Table, print_lines, print_table

if TYPE_CHECKING:
    from rich.console import Console

    from ..generate.texts import Reply
    from ..lens import LensResult

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


def _beside(reply: Mapping[str, Any]) -> dict[str, str]:
    """What else was written for a reply, by whom."""
    texts: dict[str, str] = reply["notes"].get("texts", {})
    return texts


def _noted(reply: Mapping[str, Any]) -> str:
    """The other figures that a strategy has to tell."""
    told = ((name, value) for name, value in reply["notes"].items() if name != "texts")
    return ", ".join(f"{name} {' | '.join(map(str, x)) if isinstance(x, list) else x}" for name, x in told)


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
            for name, text in _beside(reply).items():
                console.print(RichText(f"{name}: ", "cyan").append(text.strip(), "dim"), soft_wrap=True)
            if noted := _noted(reply):
                console.print(RichText(noted, "dim"), soft_wrap=True)
        print_table(table(prompt), console)
    print_lines([_ONCE.replace("`", ""), *([f"page: {facts['out']}"] if facts["out"] else [])], console)


def page(facts: Mapping[str, Any], found: Sequence[Sequence[Reply]] = ()) -> Page:
    """The same as a page, with what lenses saw in the replies that were ``found``."""
    sections, tables = [], dict[str, Any]()
    for i, prompt in enumerate(facts["prompts"]):
        replies = [(reply["arm"], _about(reply), *_parted(reply)) for reply in prompt["replies"]]
        texts = [
            (name, f"written for the reply of {reply['arm']}", text, "")
            for reply in prompt["replies"] for name, text in _beside(reply).items()
        ]  # fmt: skip
        noted = [f"{reply['arm']}: {said}" for reply in prompt["replies"] if (said := _noted(reply))]
        beside, listed = Replies(texts) if texts else None, Notes(noted) if noted else None
        asked, cost = Code(prompt["prompt"]), table(prompt)
        sections.append(Section(_title(prompt), [asked, Replies(replies), beside, listed, cost]))
        sections += _looked(prompt, found[i], tables) if found else []
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
        *(("inspect.js", script_data(tables, {}, {}, (1, 1))) if tables else ()),
    )  # fmt: skip


def _looked(prompt: Mapping[str, Any], replies: Sequence[Reply], tables: dict[str, Any]) -> list[Section]:
    """What lenses saw in each reply: tables of heads, and a map of heads by step."""
    sections = []
    for reply in replies:
        groups: list[Any] = []
        for spec, found in reply.found.items():
            sites = list(dict.fromkeys(site for one in found.tables.values() for site in one.sites))
            cards = [card_of(one, name, tables, sites) for name, one in found.tables.items() if one.values.shape[2] > 1]
            shown = [*rows_of_heads(spec, found, tables), *(card for card in cards if card)]
            if found.notes:
                groups.append(Text(" ".join(found.notes)))
            groups += [Cards(shown, spec), *_places(found, reply)]
        if groups:
            sections.append(
                Section(f"{reply.arm}: what its heads did, {prompt['prompt_tokens']} tokens and on", groups)
            )
    return sections


def _places(found: LensResult, reply: Reply) -> list[Table]:
    """Records of a lens, with the text of the tokens that they name."""
    made = []
    for name, rows in found.records.items():
        known = [row for row in rows if isinstance(row.get("column"), int) and row["column"] < len(reply.words)]
        if not known:
            continue
        others = [key for key in known[0] if key not in ("prompt", "column")]
        columns = [Column("token", text=True), Column("place"), *(Column(key) for key in others)]
        cells: list[list[Any]] = [
            [repr(reply.words[row["column"]]), str(row["column"]), *(_figure(row[key]) for key in others)]
            for row in known
        ]
        made.append(Table(columns, cells, name))
    return made


def _figure(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _about(reply: Mapping[str, Any]) -> str:
    seconds = reply["prompt_seconds"] + reply["reply_seconds"]
    return f"{size(reply['held_bytes'])} ({percent(reply['held_ratio'])} of full), {seconds:.1f} s once"
