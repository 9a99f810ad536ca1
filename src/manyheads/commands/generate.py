# SPDX-License-Identifier: Apache-2.0
"""The verb ``manyheads generate``. What it needs is imported when it runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.errors import UserError
from manyheads.files import check_writable
from manyheads.progress import shown

from .options import Device, Json, Protect, Seed, console, passive_threads, print_json, quiet_libraries, typed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manyheads.experiment import CausalLM
    from manyheads.generate.rows import Row

Model = Annotated[
    str,
    typer.Option(
        help="A pipeline of diffusers: its folder, or one that ships (scenes, unet, moving). Or a language model: "
        "folder, hub name, or default."
    ),
]
Said = Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="As --prompt.")]
Spec = Annotated[
    list[str] | None,
    typer.Option("--strategy", help='As "sag:scale=0.75"; may repeat, a column each. "A + B" are used together.'),
]
Specs = Annotated[
    list[str] | None, typer.Option("--strategies", help="Several, with commas: full,auto,snapkv:budget=0.1.")
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="Text; may repeat, a row each.")]
Classes = Annotated[
    list[str] | None, typer.Option("--class", help="Number or label, for class-conditional pipelines; may repeat.")
]
Source = Annotated[
    str | None,
    typer.Option(
        help="Source of every prompt's image, as masactrl and video_p2p need it: its text, or a file of an image or "
        "of a video (gif, webp). For harmonpaint the image file to fill in."
    ),
]
Caption = Annotated[str | None, typer.Option(help="What --source shows where it is a file, as video_p2p needs it.")]
Out = Annotated[
    Path | None,
    typer.Option(
        help="Of images: png, jpg, webp, pdf or gif; webp and gif move if the images do \\[default: grid.png]. "
        "Of texts: an HTML page \\[default: none]."
    ),
]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's.")]
Guidance = Annotated[float | None, typer.Option(help="Scale of guidance. Default: the pipeline's.")]
Seeds = Annotated[str | None, typer.Option(help="Several, as 0,1,2: a row each.")]
Count = Annotated[int | None, typer.Option("--samples", min=1, help="So many seeds, from --seed on.")]
Size = Annotated[str | None, typer.Option(help="Height x width in pixels, as 512x768. Default: the pipeline's.")]
Words = Annotated[
    str | None, typer.Option(help="Words of the prompt, as cat+hat: maps of their attention in the baseline.")
]
Page = Annotated[Path, typer.Option(help="HTML page of the maps.")]
Budget = Annotated[
    str | None, typer.Option(help="Of texts: share of the tokens (0.25), or slots, of strategies that name none.")
]
Most = Annotated[
    int | None, typer.Option("--max-new-tokens", min=1, help="Of texts: tokens of a reply. \\[default: 64]")
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat", help="Of texts: write prompts in the chat template. \\[default: where there is one]"
    ),
]
System = Annotated[str | None, typer.Option(help="Of texts: a system message before every prompt.")]
Picture = Annotated[
    Path | None,
    typer.Option("--image", help="Of texts: a picture that every prompt is about, for a model that reads images."),
]
Lenses = Annotated[
    list[str] | None,
    typer.Option(
        "--lens",
        help="Of texts: lenses that look on, step by step: heads, or any of `manyheads list --category lenses`; their "
        "figures are in the JSON and on the page.",
    ),
]

_IMAGES = ("--class", "--source", "--caption", "--steps", "--guidance", "--size", "--maps")
_TEXTS = ("--budget", "--max-new-tokens", "--chat", "--protect", "--system", "--lens", "--image")
_BUDGET, _MOST = "0.25", 64


def generate(
    said: Said = None,
    model: Model = "scenes",
    strategy: Spec = None,
    strategies: Specs = None,
    prompt: Prompts = None,
    classes: Classes = None,
    source: Source = None,
    caption: Caption = None,
    out: Out = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = None,
    seeds: Seeds = None,
    samples: Count = None,
    size: Size = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: fits the device.")] = None,
    maps: Words = None,
    page: Page = Path("maps.html"),
    budget: Budget = None,
    max_new_tokens: Most = None,
    chat: Chat = None,
    protect: Protect = None,
    system: System = None,
    lens: Lenses = None,
    image: Picture = None,
    as_json: Json = False,
) -> None:
    """Generate without and with strategies, side by side: images from the same noise, or replies to the same prompt.

    manyheads generate --strategy sag:scale=0.75 --prompt "apple top left ship" --out grid.png

    manyheads generate --model ./sd3 --strategy sag --strategy "sag + headhunter:heads=3.1" --prompt "a red cat"

    manyheads generate --model ./dit --strategy sag --class 207

    manyheads generate --strategy masactrl:start_layer=2 --source photo.png --prompt "ghost top left ship"

    manyheads generate --model moving --strategy video_p2p --source "apple up frog" --prompt "ghost up frog" --out a.gif

    manyheads generate --strategy harmonpaint:mask=hole.png --source photo.png --prompt "apple top left ship"

    manyheads generate --model HuggingFaceTB/SmolLM2-135M-Instruct "Who wrote Hamlet?" --strategies full,auto

    manyheads generate --model default "def f(x):" --strategy ablate:heads=3.1 --lens heads --out reply.html

    manyheads generate --model ./llava "What is in the picture?" --image photo.png --strategies vcd,pai

    Of images the columns are the baseline, and each strategy with its difference from it. Of texts the words are marked
    from where they leave those of the plain model. The table shows what each held and cost.
    """
    from manyheads.generate.seeds import read_seeds
    from manyheads.spec import protecting

    passive_threads()
    specs, prompts = _specs(strategy, strategies), [*(said or []), *(prompt or [])]
    given = {
        "--class": classes, "--source": source, "--caption": caption, "--steps": steps, "--guidance": guidance,
        "--seed": seed, "--seeds": seeds, "--samples": samples, "--size": size, "--maps": maps, "--budget": budget,
        "--max-new-tokens": max_new_tokens, "--chat": chat, "--protect": protect, "--system": system,
        "--lens": lens, "--image": image,
    }  # fmt: skip
    used = [name for name, value in given.items() if value is not None]
    if (subject := _vlm(model, dtype, device) if image else _language_model(model, dtype, specs)) is not None:
        if wrong := [name for name in used if name in _IMAGES]:
            raise UserError(f"{model} writes text, and {wrong[0]} is of images; leave it away")
        plain = "dpad" if subject.fills_masks else "auto"
        specs = specs or ([] if lens else [plain])
        if image and (lens or protect):
            raise UserError(f"{'--lens' if lens else '--protect'} counts words, and --image has others: leave one away")
        if protect is not None:
            specs = [spec if spec == "full" else protecting(spec, protect) for spec in specs]
        drawn = read_seeds(seed or 0, seeds, samples)
        how = (max_new_tokens or _MOST, chat, system or "", drawn, lens or [], image)
        _texts(subject, specs, prompts, budget, how, out, device or "cpu", as_json)
        return
    if wrong := [name for name in used if name in _TEXTS]:
        raise UserError(
            f"{model} makes images, and {wrong[0]} is of texts; name a language model by --model, as --model default"
        )
    if find_spec("diffusers") is None:
        raise UserError('this needs diffusers; install it with `pip install "manyheads[diffusion]"`')
    from manyheads.generate import rows, run

    wanted = (prompts, classes or [], source, caption, read_seeds(seed or 0, seeds, samples))
    settings = run.Settings(steps, guidance, rows.read_size(size))
    _images(model, specs, wanted, settings, out or Path("grid.png"), device or "cpu", dtype, maps, page, as_json)


def _specs(one: list[str] | None, several: list[str] | None) -> list[str]:
    from manyheads.spec import split_list

    return [*(one or []), *(spec for text in several or [] for spec in split_list(text))]


def _language_model(model: str, dtype: str | None, specs: list[str]) -> CausalLM | None:
    """The language model of that name; None for a pipeline, and for what strategies of denoisers are to act on."""
    from manyheads.experiment import CausalLM
    from manyheads.experiment.subjects import subject
    from manyheads.spec import parse, split_together
    from manyheads.strategy import Denoiser

    found = subject(model, dtype)
    if not isinstance(found, CausalLM):
        return None
    of_images = any(isinstance(parse(part), Denoiser) for spec in specs for part in split_together(spec))
    return None if of_images else found


def _vlm(model: str, dtype: str | None, device: str | None) -> CausalLM | None:
    """The language model of that name that reads images, loaded; None for a pipeline."""
    from manyheads import models
    from manyheads.experiment import CausalLM
    from manyheads.experiment.subjects import subject

    if not isinstance(subject(model, dtype), CausalLM):
        return None
    quiet_libraries()
    return CausalLM(model, *models.load_vlm(model, device or "cpu", models.named_dtype(dtype)))


def _texts(
    subject: CausalLM, specs: list[str], prompts: list[str], budget: str | None,
    how: tuple[int, bool | None, str, list[int], list[str], Path | None], out: Path | None, device: str, as_json: bool,
) -> None:  # fmt: skip
    """Replies of a language model."""
    from manyheads.comparison import make_arms
    from manyheads.experiment.arms import BASELINE, Arm
    from manyheads.generate import texts
    from manyheads.inspect.signals import open_image
    from manyheads.models.chat import chats
    from manyheads.report import generate_texts as shown_by
    from manyheads.report.page import write

    if not prompts:
        raise UserError(f'give a prompt, as `manyheads generate --model {subject.name} "Who wrote Hamlet?"`')
    (most, chat, system, seeds, lens, image) = how
    arms = [Arm(BASELINE), *make_arms(specs, [budget or _BUDGET], subject)]
    if out is not None:
        if out.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"{out}: replies are written as a page; name it as --out {out.with_suffix('.html')}")
        check_writable(out, "--out", file=True)
    lenses = texts.looking(lens) if lens else []
    quiet_libraries()
    with shown(as_json) as progress:
        subject.load(device)
        model, tokenizer = subject.model, subject.tokenizer
        if tokenizer is None:
            raise UserError(f"{subject.name} has no tokenizer, so that it reads no text")
        replies = texts.run(
            model, tokenizer, arms, prompts, max_new_tokens=most, chat=chat, progress=progress, system=system,
            seeds=seeds, lenses=lenses, image=None if image is None else open_image(image),
        )  # fmt: skip
    facts = texts.facts(replies, model) | {
        "model": subject.name, "chat": chats(tokenizer) if chat is None else chat,
        "system": system or None, "image": None if image is None else str(image),
        "out": None if out is None else str(out), "command": typed(),
    }  # fmt: skip
    if out is not None:
        write(shown_by.page(facts, replies if lenses else ()), out)
    if as_json:
        print_json(facts)
    else:
        shown_by.print_facts(facts, console())


def _images(
    model: str, specs: list[str], asked: tuple[list[str], list[str], str | None, str | None, list[int]], settings: Any,
    out: Path, device: str, dtype: str | None, maps: str | None, page: Path, as_json: bool,
) -> None:  # fmt: skip
    """Images or videos of a pipeline."""
    from manyheads.generate import rows, run, words
    from manyheads.models import pipeline as loading
    from manyheads.report import generate as shown_by
    from manyheads.report.grids import check_out

    quiet_libraries()
    prompts, classes, source, caption, seeds = asked
    arms = [run.arm(text) for text in specs]
    if not arms and maps is None:
        raise UserError(
            'give --strategy, as --strategy "sag:scale=0.75"; `manyheads list --category diffusion` shows them'
        )
    check_out(out)
    if maps is not None:
        check_writable(page, "--page", file=True)
    if source is not None and (not prompts or maps is not None):
        raise UserError("--source goes with the --prompt of its target, and without --maps")
    with shown(as_json) as progress:
        pipe = loading.load(model, device, dtype)
        image = None if source is None or not Path(source).is_file() else Path(source)
        wanted = rows.rows_of(pipe, prompts, classes, None if image else source, seeds)
        if caption is not None and image is None:
            raise UserError("--caption says what the file of --source shows; give --source a file, or leave it away")
        arms, fills = (arms, False) if image is None else run.on_image(arms, image)
        run.check(pipe, arms, settings)
        if image is not None:
            if fills:
                wanted = rows.filled(image, wanted)
            else:
                run.check_caption(arms, caption)
                wanted, path = rows.from_image(pipe, image, wanted, settings.steps, caption or "")
                arms = [run.on_path(each, path) for each in arms]
        watched = words.find(pipe, wanted, maps) if maps is not None else None
        made = run.run(pipe, arms, wanted, settings, progress)
        if image is not None:
            made[0].sources = [rows.shown(image, each.shape) for each in made[0].images]
        if watched is not None:
            _write_maps(page, *words.watch(pipe, watched, wanted, settings), wanted, model)
    facts = run.facts(made, wanted, settings, pipe) | {"model": model, "out": str(out), "command": typed()}
    shown_by.draw(made, wanted, facts, out)
    if as_json:
        print_json(facts)
    else:
        shown_by.print_facts(facts, None if maps is None else page, console())


def _write_maps(path: Path, images: Sequence[Any], maps: Any, rows: Sequence[Row], model: str) -> None:
    from manyheads.report.maps import page
    from manyheads.report.page import write

    labels, facts = [row.label.replace("\n", ", ") for row in rows], {"model": model, "command": " ".join(typed())}
    write(page(images, maps, prompts=labels, facts=facts), path, "--page")
