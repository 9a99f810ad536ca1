# SPDX-License-Identifier: Apache-2.0
"""The verbs ``manyheads inspect`` and ``manyheads doctor``. What they need is imported when they run."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.errors import UserError
from manyheads.progress import shown

if TYPE_CHECKING:
    from rich.console import Console

_PROBE, _DOCTOR = "manyheads-inspect", "manyheads-doctor"
FINDINGS = "findings.json"

Model = Annotated[str | None, typer.Option(help="Folder or hub name of a causal LM. \\[default: the shipped one]")]
TextFiles = Annotated[
    list[str] | None, typer.Option(help="File or folder of text or code; may repeat. \\[default: the standard library]")
]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt. \\[default: 1024, or all there are]")]
Samples = Annotated[int | None, typer.Option(min=1, help="Prompts. \\[default: 6]")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all draws.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder of the page and of findings.json. \\[default: the next free one]")
]
Json = Annotated[bool, typer.Option("--json", help="Print findings.json instead of the table.")]
Quick = Annotated[bool, typer.Option("--quick", help="Three prompts of 512 tokens.")]


def inspect(
    model: Model = None,
    text: TextFiles = None,
    lens: Annotated[
        list[str] | None,
        typer.Option(
            help="Comma-separated: sinks, massive, rhythm, spans:system=0-12, or any lens of `manyheads list "
            "--category lenses` with its fields. \\[default: sinks,massive,rhythm]"
        ),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(help='Tokens that play a part: system=0-12 (12 not included) or system="words of the text".'),
    ] = None,
    chat: Annotated[Path | None, typer.Option(help="JSON list of messages, written by the model's template.")] = None,
    generate: Annotated[
        int, typer.Option(min=0, help="The model says so many tokens to each prompt first: the role response.")
    ] = 0,
    length: Length = None,
    samples: Samples = None,
    layers: Annotated[str | None, typer.Option(help="Layers to look at, as 0-3+7. \\[default: all]")] = None,
    ablate: Annotated[
        str | None, typer.Option(help="Score such as sink: take its highest heads out and measure the loss.")
    ] = None,
    device: Device = "cpu",
    seed: Seed = 0,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Look at what a model attends to: a table, a page with pictures, and all figures as JSON.

    Without options: the shipped model reads the source of Python's standard library. The page shows every score over
    layers and heads, the map of each head, tokens coloured by what a lens says of them, and where the mass goes.
    """
    _passive()
    from manyheads.data.texts import read

    from .naming import DEFAULT, parse_lenses, parse_role
    from .prompts import read_chat

    lenses, roles = parse_lenses(lens or list(DEFAULT))
    for given in role or []:
        roles |= parse_role(given)
    if chat is not None and text:
        raise UserError("give --chat or --text, not both")
    if chat is not None and roles:
        raise UserError("the roles of a chat are those of its messages; leave --role away")
    messages = None if chat is None else read_chat(chat)
    texts = read(text) if text else None
    chosen = _layers(layers)
    place = _folder(out, _PROBE)
    from . import page, run, table
    from .prompts import chat as as_prompt

    with shown(as_json) as progress:
        loaded, tokenizer = _load(model, device)
        prompts = (
            None if messages is None else [as_prompt(messages, tokenizer, generate > 0, chat.name if chat else "")]
        )
        seen = run.inspect_model(
            loaded, tokenizer, texts, lenses, prompts=prompts, roles=roles, generate=generate, layers=chosen,
            ablate=ablate, seed=seed, origin=_origin(model), command=_command(), progress=progress,
            length=length or (512 if quick else None), samples=samples or (3 if quick else run.SAMPLES),
        )  # fmt: skip
    document = _write(place, "inspect.html", page.render(seen), seen.document())
    if as_json:
        typer.echo(document, nl=False)
    else:
        table.print_findings(seen, place / "inspect.html", _console())


def doctor(
    model: Model = None,
    text: TextFiles = None,
    length: Length = None,
    samples: Samples = None,
    device: Device = "cpu",
    seed: Seed = 0,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Say what is unusual in a model, and what it means for caches, quantisation and long context.

    Attention sinks, heads that do nothing or the same as another, massive activations and channels, leaks of padding,
    loss by position, NaN and infinity: each with its figure and its threshold. The exit code is 0 whatever is found.
    """
    _passive()
    from manyheads.data.texts import read

    texts = read(text) if text else None
    place = _folder(out, _DOCTOR)
    from . import doctor as work
    from . import doctor_page, run, table

    with shown(as_json) as progress:
        loaded, tokenizer = _load(model, device)
        found = work.diagnose(
            loaded, tokenizer, texts, seed=seed, origin=_origin(model), command=_command(), progress=progress,
            length=length or (512 if quick else None), samples=samples or (3 if quick else run.SAMPLES), quick=quick,
        )  # fmt: skip
    document = _write(place, "doctor.html", doctor_page.render(found), found.document())
    if as_json:
        typer.echo(document, nl=False)
    else:
        table.print_diagnosis(found, place / "doctor.html", _console())


def _passive() -> None:
    # Threads that wait for one another by spinning make a busy machine several times slower. Read when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _load(model: str | None, device: str) -> Any:
    from transformers.utils import logging

    from manyheads import models

    logging.disable_progress_bar()
    if model is None:
        return models.load_default(device)
    loaded, tokenizer = models.load(model, device)
    if loaded.config.is_encoder_decoder:
        raise UserError(f"{model} reads with an encoder; give a decoder-only language model")
    return loaded, tokenizer


def _origin(model: str | None) -> str:
    return model or "the shipped model"


def _command() -> list[str]:
    return ["manyheads", *(a for a in sys.argv[1:] if a != "--debug")]


def _layers(text: str | None) -> list[int] | None:
    """``0-3+7`` as numbers."""
    if text is None:
        return None
    from ..spec import numbers

    return sorted(set(numbers(text)))


def _folder(out: Path | None, name: str) -> Path:
    """Where the page goes: ``out``, or ``name`` or the first of ``name-2``, ... that is free.

    Raises:
        UserError: it cannot be written to.
    """
    place, number = out or Path(name), 1
    while out is None and place.exists():
        number += 1
        place = Path(f"{name}-{number}")
    parent = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {place}; give another folder with --out")
    return place


def _write(place: Path, name: str, page: str, document: dict[str, Any]) -> str:
    """Write page and findings into ``place``; returns the findings as text."""
    import json

    from manyheads.files import write_atomically

    text = json.dumps(document, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_atomically(place / FINDINGS, text)
        write_atomically(place / name, page)
    except OSError as error:
        raise UserError(f"cannot write to {place} ({error}); give another folder with --out") from error
    return text


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=150)
