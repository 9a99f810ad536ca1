# SPDX-License-Identifier: Apache-2.0
"""The verbs ``manyheads inspect`` and ``manyheads doctor``. What they need is imported when they run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.errors import UserError
from manyheads.progress import shown

from .options import (
    Chat,
    Device,
    Dtype,
    Json,
    Length,
    Model,
    Out,
    Quick,
    Samples,
    Seed,
    TextFiles,
    console,
    load_model,
    passive_threads,
    quiet_libraries,
    typed,
    writable,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Callable

    from manyheads.report.page import Page

_PROBE, _DOCTOR = "manyheads-inspect", "manyheads-doctor"
FINDINGS = "findings.json"

Against = Annotated[
    str | None,
    typer.Option(help="Another checkpoint of the model, for a lens that compares two, such as thinking_sparks."),
]
Image = Annotated[list[Path] | None, typer.Option(help="Image that a vision transformer looks at; may repeat.")]
Audio = Annotated[list[Path] | None, typer.Option(help="WAV file that a model as Whisper transcribes; may repeat.")]
Translate = Annotated[
    Path | None,
    typer.Option(help="File of sentences, one a line, that a model translates; a translation behind a tab is read."),
]
Questions = Annotated[
    Path | None, typer.Option(help="For hallucination_risk: JSON list of questions, each with its answers.")
]
Risk = Annotated[
    float | None,
    typer.Option(min=0.01, max=0.99, help="Of those: share of wrong ones among answers given. \\[default: 0.2]"),
]


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
    chat: Chat = None,
    image: Image = None,
    audio: Audio = None,
    translate: Translate = None,
    generate: Annotated[
        int, typer.Option(min=0, help="The model says so many tokens to each prompt first: the role response.")
    ] = 0,
    length: Length = None,
    samples: Samples = None,
    layers: Annotated[str | None, typer.Option(help="Layers to look at, as 0-3+7. \\[default: all]")] = None,
    questions: Questions = None,
    risk: Risk = None,
    ablate: Annotated[
        str | None, typer.Option(help="Score such as sink: take its highest heads out and measure the loss.")
    ] = None,
    against: Against = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Look at what a model attends to: a table, a page with pictures, and all figures as JSON.

    Without options: the shipped model reads the source of Python's standard library. Text encoders are
    looked at too, of encoder-decoder models the encoder; they have no loss. Vision transformers take --image,
    speech models of Whisper's kind --audio, those that translate --translate. --lens hallucination_risk asks
    questions whose answers are known where no part of a text is named: --questions or our own, gaps of --text too.
    The page shows every score over layers and heads, maps, tokens coloured by a lens, and where the mass goes.
    """
    passive_threads()
    from manyheads.data.texts import read
    from manyheads.inspect.naming import DEFAULT, asks, parse_lenses, parse_role

    lenses, roles = parse_lenses(lens or list(DEFAULT))
    if image or audio or translate:
        no = {
            "--text": text, "--role": role, "--chat": chat, "--generate": generate, "--length": length,
            "--samples": None if translate else samples, "--ablate": ablate, "--against": against, "--quick": quick,
            "--seed": seed, "--questions": questions, "--risk": risk, "--image beside --audio": image and audio,
            "--translate beside another": translate and (image or audio),
        }  # fmt: skip
        default = ["attention_confidence", *DEFAULT] if translate else list(DEFAULT)
        _look_at_signals(
            model, image, audio, translate, lenses if lens else default,
            [name for name, value in no.items() if value], layers=_layers(layers), samples=samples, device=device,
            dtype=dtype, out=out, as_json=as_json,
        )  # fmt: skip
        return
    for given in role or []:
        roles |= parse_role(given)
    if chat is not None and roles:
        raise UserError("the roles of a chat are those of its messages; leave --role away")
    messages = _messages(chat, text)
    texts, chosen = read(text) if text else None, _layers(layers)
    if questions is not None or (any(map(asks, lenses)) and not (roles or messages)):
        no = {
            "--role": role, "--chat": chat, "--generate": generate, "--length": length, "--layers": layers,
            "--ablate": ablate, "--against": against, "--lens of another kind": lens and not all(map(asks, lenses)),
            "--text beside --questions": text and questions,
        }  # fmt: skip
        _ask(
            model, questions, texts, [name for name, value in no.items() if value], risk=risk, out=out, as_json=as_json,
            each=samples or (40 if quick else None), device=device, dtype=dtype, seed=seed or 0,
        )  # fmt: skip
        return
    if risk is not None:
        raise UserError("--risk is for questions: add --lens hallucination_risk, or --questions FILE")
    place = writable(out, _PROBE)
    from manyheads.inspect import run
    from manyheads.inspect.prompts import chat as as_prompt
    from manyheads.report import inspect as shown_by

    with shown(as_json) as progress:
        loaded, tokenizer = load_model(model, device, dtype, encoders=True)
        said = chat.name if chat else ""
        prompts = None if messages is None else [as_prompt(messages, tokenizer, generate > 0, said)]
        other = None if against is None else (load_model(against, device, dtype)[0], against)
        seen = run.inspect_model(
            loaded, tokenizer, texts, lenses if lens else DEFAULT, prompts=prompts, roles=roles, generate=generate,
            layers=chosen, ablate=ablate, against=other, seed=seed or 0, origin=model or "the shipped model",
            command=typed(), progress=progress, length=length or (512 if quick else None),
            samples=samples or (3 if quick else run.SAMPLES),
        )  # fmt: skip
    _show(place / "inspect.html", shown_by.page(seen), seen, shown_by.print_findings, as_json)


def _ask(
    model: str | None, questions: Path | None, texts: list[Any] | None, no: list[str], *, risk: float | None,
    each: int | None, device: str | None, dtype: str | None, seed: int, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """``inspect`` of answers to questions; ``no`` are options that it has no use for."""
    if no:
        raise UserError(f"{no[0]} is not for questions: leave it away, or name the parts of a text with --role source=")
    place = writable(out, _PROBE)
    from manyheads.inspect import risk as work
    from manyheads.report import risk as shown_by

    with shown(as_json) as progress:
        asked = (
            work.read_questions(questions)
            if questions
            else work.built_in_questions(each or work.EACH, seed, texts or ())
        )
        loaded, tokenizer = load_model(model, device, dtype)
        found = work.risk_report(
            loaded, tokenizer, asked, risk=risk or 0.2, seed=seed, origin=model or "the shipped model", command=typed(),
            progress=progress,
        )  # fmt: skip
    _show(place / "inspect.html", shown_by.page(found), found, shown_by.print_report, as_json)


def _look_at_signals(
    model: str | None, image: list[Path] | None, audio: list[Path] | None, translate: Path | None, lenses: list[Any],
    no: list[str], *, layers: list[int] | None, samples: int | None, device: str | None, dtype: str | None,
    out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """``inspect`` of images, recordings or sentences to translate; ``no`` are options that it has no use for."""
    if no:
        what = "images" if image else "recordings" if audio else "translations"
        raise UserError(f"{no[0]} is not for {what}: leave it away")
    if model is None:
        raise UserError(
            "the shipped model reads text: name a model with --model that takes --image, --audio or --translate"
        )
    place = writable(out, _PROBE)
    from manyheads import models
    from manyheads.inspect.signal_run import inspect_signals
    from manyheads.inspect.signals import read_audio, read_images
    from manyheads.inspect.translations import read_translations
    from manyheads.report import inspect as shown_by

    quiet_libraries()
    notes = []
    with shown(as_json) as progress:
        if image:
            loaded, processor = models.load_vision(model, device or "cpu", models.named_dtype(dtype))
            signals = read_images(image, loaded, processor)
            if processor is None:
                notes = ["Without preprocessor_config.json images are resized and normalised as those of ImageNet."]
        elif translate:
            loaded, tokenizer = models.load_translator(model, device or "cpu", models.named_dtype(dtype))
            signals = read_translations(translate, loaded, tokenizer, samples)
        else:
            loaded, extractor, tokenizer = models.load_speech(model, device or "cpu", models.named_dtype(dtype))
            signals = read_audio(audio or [], loaded, extractor, tokenizer)
        seen = inspect_signals(
            loaded, signals, lenses, layers=layers, notes=notes, origin=model, command=typed(), progress=progress
        )
    from manyheads.report.page import write

    for part, other in seen.others.items():
        write(shown_by.page(other), place / f"{part}.html")
    _show(place / "inspect.html", shown_by.page(seen), seen, shown_by.print_findings, as_json)


def doctor(
    model: Model = None,
    text: TextFiles = None,
    chat: Chat = None,
    length: Length = None,
    samples: Samples = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    quick: Quick = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Say what is unusual in a model, and what it means for caches, quantisation and long context.

    Attention sinks, heads that do nothing or the same as another, massive activations and channels, leaks of padding,
    loss by position, NaN and infinity: each with its figure and its threshold. The exit code is 0 whatever is found.
    """
    passive_threads()
    from manyheads.data.texts import read

    messages = _messages(chat, text)
    texts = read(text) if text else None
    place = writable(out, _DOCTOR)
    from manyheads.inspect import doctor as work
    from manyheads.inspect import run
    from manyheads.inspect.prompts import chat as as_prompt
    from manyheads.report import doctor as shown_by

    with shown(as_json) as progress:
        loaded, tokenizer = load_model(model, device, dtype)
        prompts = None if messages is None else [as_prompt(messages, tokenizer, False, chat.name if chat else "")]
        found = work.diagnose(
            loaded, tokenizer, texts, prompts=prompts, seed=seed or 0, origin=model or "the shipped model",
            command=typed(), length=length or (512 if quick else None),
            samples=samples or (3 if quick else run.SAMPLES), quick=quick, progress=progress,
        )  # fmt: skip
    _show(place / "doctor.html", shown_by.page(found), found, shown_by.print_diagnosis, as_json)


def _messages(chat: Path | None, text: list[str] | None) -> list[dict[str, str]] | None:
    """The messages of ``--chat``, None without it."""
    from manyheads.inspect.prompts import read_chat

    if chat is not None and text:
        raise UserError("give --chat or --text, not both")
    return None if chat is None else read_chat(chat)


def _layers(text: str | None) -> list[int] | None:
    """``0-3+7`` as numbers."""
    if text is None:
        return None
    from ..spec import numbers

    return sorted(set(numbers(text)))


def _show(place: Path, page: Page, found: Any, print_: Callable[[Any, Path, Any], None], as_json: bool) -> None:
    """Write the page to ``place`` and what was ``found`` beside it, and print it."""
    import json

    from manyheads.files import write_asked
    from manyheads.report.page import write

    text = json.dumps(found.document(), allow_nan=False, ensure_ascii=False) + "\n"
    write_asked(place.with_name(FINDINGS), text)
    write(page, place)
    if as_json:
        typer.echo(text, nl=False)
    else:
        print_(found, place, console())
