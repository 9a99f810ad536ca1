# SPDX-License-Identifier: Apache-2.0
"""The verb ``manyheads shorten``. What it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyheads.errors import UserError
from manyheads.files import write_asked

from .options import Device, Dtype, Json, Model, console, load_model, passive_threads, print_json, typed, writable

PAGE, WEIGHTS = "shortened.html", "weights.json"
Files = Annotated[list[str], typer.Argument(metavar="FILE...", help="Python files, or folders of them.")]
Spec = Annotated[str, typer.Option("--strategy", help="How, as dietcode:budget=0.6; slimcode needs no attention.")]

Learn = Annotated[
    list[str] | None, typer.Option(help="Files whose attention is measured; may repeat. \\[default: those to shorten]")
]
Weights = Annotated[Path | None, typer.Option(help=f"The {WEIGHTS} of an earlier run: nothing is measured.")]
Out = Annotated[
    Path | None, typer.Option(help="Folder for the shortened files, a page of them in colour, and the weights.")
]


def shorten(
    files: Files,
    strategy: Spec = "dietcode:budget=0.6",
    model: Model = None,
    learn: Learn = None,
    weights: Weights = None,
    out: Out = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Cut programs to the statements and words that a model attends to, before any model reads them.

    manyheads shorten mine.py --strategy dietcode:budget=0.6 --model all-minilm-l6-v2 --out shorter

    Tokens are those of the model's tokenizer; any model may read the result, which is no program any more. Without
    --out it is printed.
    """
    passive_threads()
    from manyheads.data.texts import is_code, read
    from manyheads.spec import parse
    from manyheads.text_reducing import TextReducer, TextWeights

    parsed = parse(strategy)
    if not isinstance(parsed, TextReducer):
        raise UserError(f"{strategy} shortens no texts; dietcode and slimcode do")
    texts = [text for text in read(files) if text.name.endswith(".py") or not is_code([text])]
    if not texts:
        raise UserError("no Python file is among these; only Python programs are shortened")
    place = None if out is None else writable(out, str(out))
    known = None if weights is None else TextWeights.load(weights)
    loaded, tokenizer = load_model(model, device, dtype, encoders=True)
    from manyheads.shortening import learn as measure

    if parsed.learns and known is None:
        source = texts if learn is None else [text for text in read(learn) if text.name.endswith(".py")]
        known = measure(parsed, loaded, tokenizer, [text.content for text in source])
    made = [parsed.shorten(text.content, tokenizer, known) for text in texts]
    names = [text.name for text in texts]
    sizes = [
        [len(tokenizer(x, add_special_tokens=False, verbose=False)["input_ids"]) for x in (text.content, one.text)]
        for text, one in zip(texts, made, strict=True)
    ]
    about = {"command": typed(), "model": model or "default", "strategy": parsed.spec}
    if place is not None:
        from manyheads.environment import environment
        from manyheads.report.page import write
        from manyheads.report.shortened import page

        for name, one in zip(names, made, strict=True):
            inside = [part for part in Path(name).parts if part not in ("..", Path(name).anchor)]
            write_asked(place.joinpath(*inside), one.text + "\n")
        if known is not None:
            known.save(place / WEIGHTS)
        write(page(names, made, sizes, known, {**about, "environment": environment()}), place / PAGE)
    if as_json:
        rows = [
            {"file": name, "tokens": before, "left": after, "text": one.text}
            for name, one, (before, after) in zip(names, made, sizes, strict=True)
        ]
        print_json({**about, "files": rows})
        return
    if place is None:
        for name, one in zip(names, made, strict=True):
            typer.echo((f"# {name}\n" if len(names) > 1 else "") + one.text)
        return
    screen = console()
    for name, (before, after) in zip(names, sizes, strict=True):
        screen.print(f"{name}: {after:,} of {before:,} tokens", markup=False)
    screen.print(f"written: {place}, in colour: {place / PAGE}", style="dim", markup=False)
