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

from .options import Device, Json, Seed, console, passive_threads, print_json, quiet_libraries, typed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manyheads.generate.rows import Row

Pipeline = Annotated[
    str, typer.Option(help="Folder of a saved pipeline of diffusers, or one that ships: scenes, unet, moving.")
]
Specs = Annotated[
    list[str] | None,
    typer.Option("--strategy", help='As "sag:scale=0.75"; may repeat, a column each. "A + B" are used together.'),
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="Text; may repeat, a row each.")]
Classes = Annotated[
    list[str] | None, typer.Option("--class", help="Number or label, for class-conditional pipelines; may repeat.")
]
Source = Annotated[
    str | None, typer.Option(help="Source of every prompt's image, as masactrl needs it: its text, or an image file.")
]
Out = Annotated[Path, typer.Option(help="png, jpg, webp, pdf or gif; webp and gif move if the images do.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's.")]
Guidance = Annotated[float | None, typer.Option(help="Scale of guidance. Default: the pipeline's.")]
Seeds = Annotated[str | None, typer.Option(help="Several, as 0,1,2: a row each.")]
Count = Annotated[int | None, typer.Option("--samples", min=1, help="So many seeds, from --seed on.")]
Size = Annotated[str | None, typer.Option(help="Height x width in pixels, as 512x768. Default: the pipeline's.")]
Words = Annotated[
    str | None, typer.Option(help="Words of the prompt, as cat+hat: maps of their attention in the baseline.")
]
Page = Annotated[Path, typer.Option(help="HTML page of the maps.")]


def generate(
    model: Pipeline = "scenes",
    strategy: Specs = None,
    prompt: Prompts = None,
    classes: Classes = None,
    source: Source = None,
    out: Out = Path("grid.png"),
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
    as_json: Json = False,
) -> None:
    """Generate without and with strategies, from the same noise, side by side in one image.

    manyheads generate --strategy sag:scale=0.75 --prompt "apple top left ship" --out grid.png

    manyheads generate --model ./sd3 --strategy sag --strategy "sag + headhunter:heads=3.1" --prompt "a red cat"

    manyheads generate --model ./dit --strategy sag --class 207

    manyheads generate --strategy masactrl:start_layer=2 --source "apple top left ship" --prompt "ghost top left ship"

    manyheads generate --strategy masactrl:start_layer=2 --source photo.png --prompt "ghost top left ship"

    The columns are the baseline, and each strategy with its difference from it. The table shows what each cost.
    """
    passive_threads()
    if find_spec("diffusers") is None:
        raise UserError('this needs diffusers; install it with `pip install "manyheads[diffusion]"`')
    quiet_libraries()
    from manyheads.generate import rows, run, words
    from manyheads.models import pipeline as loading
    from manyheads.report import generate as shown_by
    from manyheads.report.grids import check_out

    arms = [run.arm(text) for text in strategy or []]
    if not arms and maps is None:
        raise UserError(
            'give --strategy, as --strategy "sag:scale=0.75"; `manyheads list --category diffusion` shows them'
        )
    seeds_, pixels = rows.read_seeds(seed or 0, seeds, samples), rows.read_size(size)
    check_out(out)
    if maps is not None:
        check_writable(page, "--page", file=True)
    if source is not None and (not prompt or maps is not None):
        raise UserError("--source goes with the --prompt of its target, and without --maps")
    with shown(as_json) as progress:
        pipe = loading.load(model, device or "cpu", dtype)
        image = None if source is None or not Path(source).is_file() else Path(source)
        wanted = rows.rows_of(pipe, prompt or [], classes or [], None if image else source, seeds_)
        settings = run.Settings(steps, guidance, pixels)
        run.check(pipe, arms, settings)
        if image is not None:
            wanted = rows.from_image(pipe, image, wanted, steps)
        watched = words.find(pipe, wanted, maps) if maps is not None else None
        made = run.run(pipe, arms, wanted, settings, progress)
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
