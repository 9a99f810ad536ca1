# SPDX-License-Identifier: Apache-2.0
"""Options that verbs share, each declared once, and what all verbs do with them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.errors import UserError
from manyheads.files import check_writable

if TYPE_CHECKING:
    from rich.console import Console

    from manyheads.experiment.executors import Executor

__all__ = [
    "Chat", "Device", "Dtype", "Json", "Length", "Model", "Out", "Protect", "Quick", "RayAddress", "Resume", "Samples",
    "Seed", "Slug", "TextFiles", "Workers", "console", "executor", "load_model", "passive_threads", "print_json",
    "quiet_libraries", "resumed", "typed", "writable",
]  # fmt: skip

Model = Annotated[str | None, typer.Option(help="Folder or hub name of a causal LM. \\[default: the shipped one]")]
TextFiles = Annotated[
    list[str] | None,
    typer.Option("--text", help="File or folder of text or code; may repeat. \\[default: the standard library]"),
]
Chat = Annotated[
    Path | None, typer.Option(help="JSON list of messages, written by the model's template, in place of --text.")
]
Protect = Annotated[
    str | None,
    typer.Option(help="Tokens that no cache strategy may drop, whatever its budget: system (the message), or 0-39+60."),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. \\[default: cpu]")]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="float32, bfloat16 or float16, of weights and cache. "
        "\\[default: the checkpoint's; the shipped model on a CPU: float32]"
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed of all draws. \\[default: 0]")]
Length = Annotated[int | None, typer.Option(min=1, help="Tokens of a prompt. \\[default: 1024, or all there are]")]
Samples = Annotated[int | None, typer.Option(min=1, help="Prompts or contexts of each kind. \\[default: 6]")]
Out = Annotated[
    Path | None,
    typer.Option(help="Folder of the page and of the results. \\[default: the next free manyheads-...]"),
]
Resume = Annotated[Path | None, typer.Option(help="Go on with the run in this folder; needs no other option.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="A small run: fewer and shorter samples; never outvotes a full run.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes of this machine to spread the work over.")]
RayAddress = Annotated[str | None, typer.Option("--ray", help="Ray cluster to spread the work over, or local.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of the table.")]
Slug = Annotated[str, typer.Argument(metavar="SLUG", help="Name of a paper or baseline, as `manyheads list` shows it.")]


def console(width: int = 150) -> Console:
    """A console that does not squeeze tables when the output is not a terminal."""
    from rich.console import Console

    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=width)


def print_json(value: object) -> None:
    """Print a document."""
    import json

    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def typed() -> list[str]:
    """The command as it was typed."""
    return ["manyheads", *(argument for argument in sys.argv[1:] if argument != "--debug")]


def passive_threads() -> None:
    """Have waiting threads sleep: spinning, they make a busy machine several times slower. Read when torch loads."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def quiet_libraries() -> None:
    """No progress bars of other libraries beside ours, nor the warnings of diffusers, if it is there."""
    from importlib.util import find_spec

    from transformers.utils import logging

    logging.disable_progress_bar()
    if find_spec("diffusers"):
        from diffusers.utils import logging as theirs

        theirs.disable_progress_bar()
        theirs.set_verbosity_error()


def resumed(
    folder: Path, out: Path | None, given: dict[str, Any], kinds: tuple[str, ...], verb: str
) -> tuple[dict[str, Any], Path]:
    """The options of the run in ``folder``, and that folder.

    Raises:
        UserError: it is no run of ``verb``, others are ``given``, or ``out`` is another folder.
    """
    from manyheads.experiment.journal import read_run

    if out is not None and out.resolve() != folder.resolve():
        raise UserError("--resume goes on in its own folder; leave --out away")
    run = read_run(folder)
    if run.get("kind") not in kinds:
        raise UserError(f"{folder} holds no run of manyheads {verb}; run the command again that made it")
    options: dict[str, Any] = run["options"]
    if other := [name for name, value in given.items() if options.get(name) != value]:
        raise UserError(
            f"--resume goes on with the options of the run in {folder}; leave --{' and --'.join(other)} away"
        )
    return options, folder


def executor(workers: int | None, ray: str | None) -> Executor | None:
    """Where units of an experiment run; this process when None.

    Raises:
        UserError: both are given.
    """
    from manyheads.experiment.executors import Processes, Ray

    if workers is not None and ray is not None:
        raise UserError("give --workers or --ray, not both")
    if ray is not None:
        return Ray(ray)
    return None if workers is None or workers == 1 else Processes(workers)


def load_model(
    model: str | None, device: str | None, dtype: str | None = None, encoders: bool = False
) -> tuple[Any, Any]:
    """A language model and its tokenizer, the shipped one when None.

    Args:
        model: folder or name.
        device: the processor when None.
        dtype: as ``float32``; of the checkpoint when None.
        encoders: take models too that only read text; of encoder-decoder models the encoder.

    Raises:
        UserError: there is none of that name, or it is of another kind.
    """
    from transformers.utils import logging

    from manyheads import models

    logging.disable_progress_bar()
    kind = models.named_dtype(dtype)
    if model is None:
        return models.load_default(device or "cpu", kind)
    if encoders:
        return models.load_reader(model, device or "cpu", kind)
    loaded, tokenizer = models.load(model, device or "cpu", kind)
    if loaded.config.is_encoder_decoder:
        raise UserError(f"{model} reads with an encoder; give a decoder-only language model")
    return loaded, tokenizer


def writable(out: Path | None, name: str) -> Path:
    """The folder to write to: ``out``, or ``name`` or the first of ``name-2``, ... that is free.

    Raises:
        UserError: it cannot be written to.
    """
    place, number = out or Path(name), 1
    while out is None and place.exists():
        number += 1
        place = Path(f"{name}-{number}")
    check_writable(place)
    return place
