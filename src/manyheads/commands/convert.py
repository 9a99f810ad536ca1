# SPDX-License-Identifier: Apache-2.0
"""The verb ``manyheads convert``. What it needs is imported when it runs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyheads.errors import UserError
from manyheads.progress import shown

from .options import (
    Device,
    Dtype,
    Json,
    Model,
    Seed,
    TextFiles,
    console,
    load_model,
    passive_threads,
    print_json,
    typed,
    writable,
)  # fmt: skip

if TYPE_CHECKING:
    from manyheads.conversion import EncoderConversion
    from manyheads.converter import Converted, Pictures

_TRAINING = "training"

Spec = Annotated[
    str, typer.Argument(metavar="SPEC", help="Conversion with its fields, as minitron:keep=0.8; see `manyheads list`.")
]
Image = Annotated[
    list[Path] | None,
    typer.Option(help="Image, or folder of PNG and JPEG, for a vision transformer in place of --text; may repeat."),
]
Out = Annotated[Path, typer.Option(help="Folder of the new checkpoint.")]
Recover = Annotated[
    str | None,
    typer.Option(help="Train it afterwards, as 10m (minutes), 2M (tokens) or '700 steps'. \\[default: no training]"),
]
Length = Annotated[int, typer.Option(min=8, help="Tokens of a sequence.")]
Sequences = Annotated[int, typer.Option(min=1, help="Sequences, or images, that activations are gathered on.")]
_IMAGES = (".png", ".jpg", ".jpeg")


def convert(
    spec: Spec,
    out: Out,
    model: Model = None,
    text: TextFiles = None,
    image: Image = None,
    recover: Recover = None,
    length: Length = 512,
    sequences: Sequences = 32,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Make a checkpoint smaller, or otherwise another one, for good.

    One pass over the text says what matters, the model is cut, and with --recover it is trained to say again what it
    said before; a training that was cut off goes on when the command is repeated. Losses are of the last tenth of the
    text, which nothing else reads. Where the config of the stock class can say what is left, the result is a plain
    checkpoint, which transformers loads; else manyheads.models.load loads it, and so do compare and inspect. A vision
    transformer is given images, and its last states on the last tenth of them are compared with those from before.

    gemma_encoder and pooling make an encoder of texts, which reads no text here and is trained on its task afterwards.
    """
    passive_threads()
    from manyheads.data.texts import read, standard_library

    place = _place(out, model)
    from manyheads.conversion import EncoderConversion
    from manyheads.converter import Material, as_conversion, convert_model
    from manyheads.training import Budget

    strategy = as_conversion(spec)
    if isinstance(strategy, EncoderConversion):
        if text or recover or image:
            raise UserError(
                f"{strategy.slug} makes an encoder, which is trained on a task: leave --text, --image and --recover "
                "away"
            )
        _encoder(strategy, place, model, device, dtype, length, seed or 0, as_json)
        return
    if text and image:
        raise UserError("--text is for models that read text, --image for those that read images: give one")
    if recover is not None:
        Budget.parse(recover)
    with shown(as_json) as progress:
        material: Material | Pictures
        if image:
            loaded, tokenizer, material = _seen(image, model, device, dtype)
        else:
            texts = read(text) if text else standard_library()
            loaded, tokenizer = load_model(model, device, dtype, encoders=True)
            material = Material.of(texts, tokenizer, length)
        made = convert_model(
            loaded, strategy, material, recover=recover, sequences=sequences, seed=seed or 0,
            folder=place / _TRAINING, progress=progress,
        )  # fmt: skip
    made.about |= {"model": model or "default", "command": typed()}
    plain = made.save(place, tokenizer)
    following = _following(made, place, plain, recover, bool(image))
    if as_json:
        print_json({**made.document(), "folder": str(place), "plain": plain, "next": following})
    else:
        _print(made, place, plain, following)


def _place(out: Path, model: str | None) -> Path:
    """The folder to write to, which holds no model but of an earlier conversion.

    Raises:
        UserError: it holds another, or the one that is to be converted.
    """
    from manyheads.models import source

    place = writable(out, str(out))
    ours = any((place / name).is_file() for name in ("conversion.json", "surgery.json", "encoder.json"))
    same = model is not None and Path(source(model)).resolve() == place.resolve()
    if same or (not ours and ((place / "config.json").exists() or any(place.glob("*.safetensors")))):
        raise UserError(f"{place} holds a model, and none is written over: give another folder with --out")
    return place


def _seen(image: list[Path], model: str | None, device: str | None, dtype: str | None) -> tuple[Any, Any, Pictures]:
    """A vision transformer, its image processor, and images as it is given them.

    Raises:
        UserError: no model is named, or it reads something else; or images are too few, or none.
    """
    from manyheads import models
    from manyheads.converter import Pictures
    from manyheads.inspect.signals import read_images

    if model is None:
        raise UserError("the shipped model reads text: name a vision transformer with --model")
    loaded, processor = models.load_vision(model, device or "cpu", models.named_dtype(dtype))
    files = [
        file
        for path in image
        for file in (sorted(p for p in path.iterdir() if p.suffix.lower() in _IMAGES) if path.is_dir() else [path])
    ]
    return loaded, processor, Pictures.of([x.values["pixel_values"][0] for x in read_images(files, loaded, processor)])


def _encoder(
    strategy: EncoderConversion, place: Path, model: str | None, device: str | None, dtype: str | None, length: int,
    seed: int, as_json: bool,
) -> None:  # fmt: skip
    """Make an encoder of texts, save it, and say how it is read and trained."""
    import torch

    from manyheads.converter import encoder_of
    from manyheads.integrations.bidirectional import is_bidirectional

    with shown(as_json):
        loaded, tokenizer = load_model(model, device, dtype)
        torch.manual_seed(seed)
        made = encoder_of(loaded, tokenizer, strategy, length=length)
        made.save(place, {"spec": strategy.spec, "model": model or "default", "command": typed()})
    count = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in (("model", made.model), ("pooler", made.pooler))
    }
    own = ", trust_remote_code=True" if made.pooler.standard is None else ""
    following = [
        f"python -m manyheads.recipes.text_encoder --encoder {place} --train FILE --out trained",
        f"manyheads.models.text_encoder.TextEncoder.load('{place}').encode(texts)",
        f"SentenceTransformer('{place}'{own}).encode(texts)",
    ]
    sees = is_bidirectional(made.model)
    if as_json:
        print_json({
            "spec": strategy.spec, "folder": str(place), "parameters": count, "bidirectional": sees, "next": following,
        })  # fmt: skip
        return
    out = console()
    out.print(
        f"{place}: an encoder of texts, {count['model']:,} parameters and {count['pooler']:,} of its pooler",
        markup=False,
    )
    out.print(f"  tokens see {'both sides' if sees else 'what is before them'}; nothing is trained yet", markup=False)
    for line in following:
        out.print(f"  {line}", markup=False)


def _following(made: Converted, place: Path, plain: bool, recover: str | None, images: bool = False) -> list[str]:
    """Commands that make sense next."""
    from manyheads.integrations.site_search import find_sites

    words = made.measure == "nats/token"
    where = shlex.quote(str(place))
    seen = bool(find_sites(made.model))  # linear attention is none that a strategy acts on
    verbs = [f"manyheads compare --model {where}"] if words and seen else []
    verbs += [f"manyheads inspect --model {where}{' --image FILE' if images else ''}"] if seen else []
    stock, load = ("AutoModelForCausalLM", "load") if words else ("AutoModel", "load_reader")
    load = "load_vision" if images else load
    loads = f"{stock}.from_pretrained('{place}')" if plain else f"manyheads.models.{load}('{place}')"
    again = [] if recover or not made.compared else ["the same command with --recover 10m trains it"]
    return [*verbs, loads, *again]


def _print(made: Converted, place: Path, plain: bool, following: list[str]) -> None:
    from rich.table import Table

    table = Table("", "before", "after", "", title=made.spec, title_justify="left", box=None, pad_edge=False)
    for name, (before, after) in (("parameters", made.parameters), ("bytes", made.bytes)):
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}")
    own = made.losses
    for stage in ("after surgery", "after recovery"):
        if stage in own:
            table.add_row(
                f"{made.measure}, {stage}", f"{own['before']:.4f}", f"{own[stage]:.4f}",
                f"{own[stage] - own['before']:+.4f}",
            )  # fmt: skip
    shown_on = console()
    shown_on.print(table)
    if not made.compared:
        shown_on.print("its states are of another width, so that they have no distance from the model's")
    what = "a plain checkpoint of transformers" if plain else "weights beside their plan: stock transformers refuses it"
    shown_on.print(f"\n{place}: {what}", markup=False)
    for line in following:
        shown_on.print(f"  {line}", markup=False)
