# SPDX-License-Identifier: Apache-2.0
"""The verb ``manyheads recommend``. What it needs is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.errors import UserError
from manyheads.files import check_writable, write_asked

from .options import Json, console, print_json, typed

if TYPE_CHECKING:
    from manyheads.costs import Setting

Tokens = Annotated[int, typer.Option("--length", min=1, help="Tokens of a row.")]
CardName = Annotated[str, typer.Option("--card", help="h100, a100, cpu, ...; this: measured here, in seconds.")]
Sized = Annotated[
    str | None, typer.Option("--model", help="Folder or hub name, for its sizes. \\[default: Llama-3-8B's]")
]
Picture = Annotated[Path | None, typer.Option("--out", help="Write the page here (.html), or its picture (.svg).")]
_LLAMA = {"layers": 32, "heads": 32, "kv_heads": 8, "head_dim": 128, "parameters": 8_030_261_248}


def recommend(
    length: Tokens = 65536,
    card_name: CardName = "h100",
    model: Sized = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    prefill: Annotated[bool, typer.Option("--prefill", help="Time of reading the prompt. The default.")] = False,
    decode: Annotated[bool, typer.Option("--decode", help="Time of one more token of each row.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Time of a forward and backward pass.")] = False,
    encoder: Annotated[bool, typer.Option("--encoder", help="Attention from both sides.")] = False,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Only what a trained model can have without training.")
    ] = False,
    out: Picture = None,
    as_json: Json = False,
) -> None:
    """Which family of attention at my length, on my card: predicted times, bytes and state, the fastest first.

    manyheads recommend --length 65536 --card h100

    manyheads recommend --length 200000 --card rtx4090 --decode --pretrained

    manyheads recommend --card this --model ./my_model --train --out families.html
    """
    from manyheads.costs import Layer, Setting, card, ranked

    asked = [what for what, given in (("prefill", prefill), ("decode", decode), ("train", train)) if given]
    if len(asked) > 1:
        raise UserError(f"give one of --{' and --'.join(asked)}")
    if encoder and decode:
        raise UserError("an encoder reads whole sequences: --encoder goes with --prefill or --train")
    if out is not None:
        if out.suffix not in (".html", ".svg"):
            raise UserError(f"--out is a page (.html) or a picture (.svg), not {out}")
        check_writable(out, "--out", file=True)
    sizes = dict(_LLAMA) if model is None else _sizes(model)
    place = card(card_name)
    if not place.fused and not place.measured:
        place = card(card_name, 4)
    layer = Layer(
        length=length, batch=batch, heads=sizes["heads"], kv_heads=sizes["kv_heads"], head_dim=sizes["head_dim"],
        itemsize=2 if place.fused else 4, causal=not encoder,
    )  # fmt: skip
    setting = Setting(
        layer=layer, card=place, what=asked[0] if asked else "prefill",  # type: ignore[arg-type]
        layers=sizes["layers"], parameters=sizes["parameters"], pretrained=pretrained,
    )  # fmt: skip
    found = ranked(setting)
    if out is not None:
        _write(out, setting, found)
    if as_json:
        print_json({"setting": _said(setting), "families": [one.row() for one in found], "command": typed()})
        return
    from manyheads.report.recommend import table
    from manyheads.report.table import print_lines, print_table

    screen = console(170)
    print_table(table(found, setting), screen)
    speed = "measured here" if place.measured else "from its data sheet"
    lines = [f"predicted by a roofline, {place.name} {speed}; how far off it is: docs/which_family.md"]
    lines += [f"written: {out}"] if out is not None else []
    print_lines(lines, screen)


def _write(out: Path, setting: Setting, found: list[Any]) -> None:
    from manyheads.environment import environment
    from manyheads.report import recommend as report
    from manyheads.report.page import write

    if out.suffix == ".svg":
        write_asked(out, report.curves(setting))
        return
    write(report.page(found, setting, {"command": typed(), "environment": environment()}), out)


def _sizes(model: str) -> dict[str, int]:
    """Sizes of a model, by its config; its parameters are counted without making them."""
    from manyheads import models

    config = models.config(model)
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    return {
        "layers": int(text.num_hidden_layers),
        "heads": heads,
        "kv_heads": int(getattr(text, "num_key_value_heads", None) or heads),
        "head_dim": int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        "parameters": models.count_parameters(config),
    }


def _said(setting: Setting) -> dict[str, Any]:
    """What was asked for, in plain values."""
    import dataclasses

    platform = setting.card.platform
    return {
        "layer": dataclasses.asdict(setting.layer), "layers": setting.layers, "parameters": setting.parameters,
        "what": setting.what, "pretrained": setting.pretrained,
        "card": {
            "name": setting.card.name, "memory": setting.card.memory, "measured": setting.card.measured,
            "flop_s": platform.peak_flops, "bytes_s": platform.bandwidth,
        },
    }  # fmt: skip
