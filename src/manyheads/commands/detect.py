# SPDX-License-Identifier: Apache-2.0
"""The verb ``manyheads detect``. What it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyheads.errors import UserError

from .options import Json, Model, console, passive_threads, print_json, typed


def detect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="UTF-8 text that may be marked; - reads what is piped.")],
    strategy: Annotated[
        str, typer.Option(help="The watermark with its message, as green_list:message=1011,key=7.", show_default=False)
    ],
    model: Model = None,
    as_json: Json = False,
) -> None:
    """Read the message that a watermark hid in a text, and how surprising it is that the text agrees with yours.

    Only the tokenizer of the model is loaded.
    """
    passive_threads()
    try:
        text = typer.get_text_stream("stdin").read() if str(file) == "-" else file.expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read as UTF-8 text: {error}") from None
    from manyheads import models
    from manyheads.generate.detect import detect as read

    found = read(text, strategy, models.tokenizer(models.default_path() if model is None else model))
    if as_json:
        print_json(
            {
                "command": typed(), "strategy": strategy, "tokens": found.tokens, "bits": found.bits,
                "evidence": found.evidence, "p_value": found.p_value,
            }
        )  # fmt: skip
        return
    console().print(
        f"{found.tokens:,} tokens say {found.bits}; p = {found.p_value:.2g} that a text without the message agrees so "
        "well", markup=False,
    )  # fmt: skip
