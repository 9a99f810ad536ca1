# SPDX-License-Identifier: Apache-2.0
"""The verb ``manyheads hunt``. What it needs is imported when it runs."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.errors import UserError
from manyheads.files import check_writable, write_atomically
from manyheads.progress import shown

from .options import Device, Json, Seed, console, passive_threads, print_json, quiet_libraries, typed

if TYPE_CHECKING:
    from manyheads.head_selection import HeadSelection
    from manyheads.report.table import Table

Pipeline = Annotated[
    str, typer.Option(help="Folder of a saved pipeline of diffusers, or one that ships: scenes, unet, moving.")
]
Goal = Annotated[
    str,
    typer.Option(
        "--for",
        help="What to choose for: brightness, contrast, saturation, warmth, edges (--for=-edges for the less), "
        "likelihood or a word of a shipped pipeline, or module:function(images, prompts).",
    ),
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="Text; may repeat. Taken in turn.")]
Images = Annotated[int, typer.Option(min=1, help="Made for every head, always from the same noise.")]
Rounds = Annotated[int, typer.Option(min=1, help="Rounds of the search; paper: 1 for quality, 5 for a style.")]
Top = Annotated[int, typer.Option(min=1, help="Heads kept in a round; paper: 24 for quality, 3 for a style.")]
Spec = Annotated[str, typer.Option("--strategy", help="Scale, strength and perturbation; its heads are the start.")]
Candidates = Annotated[str | None, typer.Option(help="Heads to try, as 3.1+4.2. \\[default: all]")]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: the pipeline's.")]
State = Annotated[
    Path | None, typer.Option("--state", help="JSON file that the search is kept in and goes on from when cut off.")
]


def hunt(
    goal: Goal,
    model: Pipeline = "scenes",
    prompt: Prompts = None,
    images: Images = 5,
    rounds: Rounds = 5,
    top: Top = 3,
    strategy: Spec = "headhunter:scale=3,strength=1",
    candidates: Candidates = None,
    steps: Steps = None,
    guidance: Annotated[float, typer.Option(help="Scale of guidance; the paper searches without, 1.")] = 1.0,
    seed: Seed = None,
    state: State = None,
    device: Device = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: fits the device.")] = None,
    as_json: Json = False,
) -> None:
    """Choose the attention heads whose perturbation gives a style, by HeadHunter's search.

    manyheads hunt --for edges --images 8 --rounds 1

    manyheads hunt --for warmth --model ./sd3 --prompt "an old harbour" --prompt "a cat asleep" --state warm.json

    manyheads hunt --for mine:score --model ./sd3 --prompt "a red cat"

    What is printed last is the strategy to use, as `manyheads generate --strategy` takes it.
    """
    passive_threads()
    if find_spec("diffusers") is None:
        raise UserError('this needs diffusers; install it with `pip install "manyheads[diffusion]"`')
    quiet_libraries()
    from manyheads.head_selection import select_heads
    from manyheads.models import pipeline as loading
    from manyheads.report.table import print_lines, print_table

    if ":" in goal:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` has it: the function may lie beside
    kept: dict[str, Any] = {}
    if state is not None:
        check_writable(state, "--state", file=True)
        kept = _read(state)
    with shown(as_json) as progress:

        def told(done: int, total: int) -> None:
            if state is not None:
                write_atomically(state, json.dumps(kept))
            progress(done, total, f"heads for {goal}")

        found = select_heads(
            loading.load(model, device or "cpu", dtype), goal, prompts=prompt or [], images=images, rounds=rounds,
            top=top, strategy=strategy, candidates=candidates.split("+") if candidates else (), seed=seed or 0,
            steps=steps, guidance=guidance, progress=told, state=kept,
        )  # fmt: skip
    if as_json:
        print_json({
            "strategy": found.strategy.spec, "heads": list(found.strategy.heads), "plain": found.plain,
            "found": found.found, "rounds": found.rounds, "table": found.table.to_dict(), "command": typed(),
        })  # fmt: skip
        return
    screen = console(100)
    print_table(_table(found, goal), screen)
    lines = [
        f"{goal} without guidance {found.plain:.4g}, with the heads found {found.found:.4g}, on the {images} images "
        "that they were chosen by: other images gain less",
        found.strategy.spec,
    ]
    print_lines(lines, screen)


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no state of a search ({error}); delete it to start anew") from error
    if not isinstance(kept, dict):
        raise UserError(f"{path} is no state of a search; delete it to start anew")
    return kept


def _table(found: HeadSelection, goal: str) -> Table:
    """The best heads of the first round, each alone."""
    from manyheads.report.table import Column, Table

    made = found.table
    low, high = made.interval()
    rows = [
        [name, f"{made.mean[head]:.4g}", f"{low[head]:.4g} to {high[head]:.4g}" if len(made.values) > 1 else "",
         "chosen" if name in found.strategy.heads else ""]
        for head, name in zip(made.top(10), made.names(made.top(10)), strict=True)
    ]  # fmt: skip
    columns = [Column("head", text=True), Column(goal), Column("95 % over images"), Column("", text=True)]
    return Table(columns, rows, title=f"the best of {len(found.rounds[0])} heads, each alone", repeats=True)
