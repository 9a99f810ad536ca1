# SPDX-License-Identifier: Apache-2.0
"""The verb ``manyheads ask``. What it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyheads.errors import UserError

from .options import Device, Dtype, Json, Model, Protect, console, load_model, passive_threads, print_json, typed


def ask(
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="What is asked, each by itself.")],
    context: Annotated[Path, typer.Option(help="File of text that the questions are about.")],
    model: Model = None,
    strategy: Annotated[
        str, typer.Option(help="How the cache of the context is kept, as snapkv:budget=0.5; more joined by +.")
    ] = "full",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 64,
    protect: Protect = None,
    system: Annotated[str, typer.Option(help="System message before the context, in the chat template.")] = "",
    plain: Annotated[bool, typer.Option("--plain", help="Leave the tokenizer's chat template away.")] = False,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Read a context once, compress its cache, and answer each question from a copy of it.

    Answers are greedy and do not depend on the order of the questions. The cache is compressed before they are known.
    """
    passive_threads()
    try:
        text = context.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--context {context} cannot be read as UTF-8 text: {error}") from None
    from manyheads.spec import parse, protecting, split_together

    strategy = strategy if protect is None else protecting(strategy, protect)
    parsed = [parse(spec) for spec in split_together(strategy)]
    from manyheads import questions as asking
    from manyheads.formatting import size

    loaded, tokenizer = load_model(model, device, dtype)
    found = asking.ask(
        loaded,
        tokenizer,
        text,
        questions,
        strategy=parsed,
        max_new_tokens=max_new_tokens,
        chat=not plain,
        system=system,
    )
    if as_json:
        print_json(
            {
                "command": typed(), "model": model or "default", "strategy": strategy, "context": str(context),
                "tokens": found.tokens, "bytes": found.bytes, "full_bytes": found.full_bytes,
                "host_bytes": found.host_bytes,
                "answers": [
                    {"question": q, "answer": a} for q, a in zip(found.questions, found.answers, strict=True)
                ],
            }
        )  # fmt: skip
        return
    screen = console()
    for question, answer in zip(found.questions, found.answers, strict=True):
        screen.print(question, style="bold", markup=False)
        screen.print(f"{answer or '(nothing)'}\n", markup=False)
    beside = f", and {size(found.host_bytes)} in host memory" if found.host_bytes else ""
    screen.print(
        f"{found.tokens:,} tokens of context, cache of {size(found.bytes)} ({strategy}), "
        f"{found.bytes / found.full_bytes:.0%} of the whole one's {size(found.full_bytes)}{beside}",
        style="dim", markup=False,
    )  # fmt: skip
