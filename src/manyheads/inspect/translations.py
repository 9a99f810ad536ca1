# SPDX-License-Identifier: Apache-2.0
"""Sentences as prompts of a model that translates: it says its own translation, or reads one that is given."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..lens import device_of
from .signals import Signal

__all__ = ["LONGEST", "read_translations"]

LONGEST = 128  # tokens that a model says of its own


def read_translations(path: str | Path, model: Any, tokenizer: Any, most: int | None = None) -> list[Signal]:
    """A file with a sentence a line, or a sentence, a tab and its translation, which is then not made but read.

    A row of attention is that of the token before, and so named after what it predicts: ``words``. The token that ends
    a translation is among them.

    Args:
        path: of the file, UTF-8.
        model: an encoder-decoder of transformers with a head over the vocabulary.
        tokenizer: of both languages.
        most: sentences; all when None.

    Raises:
        UserError: no such file, no text, or nothing in it.
    """
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except FileNotFoundError:
        raise UserError(f"no such file: {path}; --translate takes a file with a sentence a line") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error}); --translate takes a sentence a line") from None
    pairs = [line.partition("\t")[::2] for line in lines if line.strip()][:most]
    if not pairs:
        raise UserError(f"{path} has no sentence; write one a line")
    made = []
    for source, target in pairs:
        ids = tokenizer(source)["input_ids"]
        given = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        said = _read(target, model, tokenizer) if target.strip() else _said(given, model)
        text = tokenizer.decode(said[1:], skip_special_tokens=True).strip()
        words, pieces = ([tokenizer.decode([i]).strip() for i in row] for row in (said[1:], ids))
        read = said[:-1]
        made.append(Signal(
            read, f"{source} → {text}", values={**given, "decoder_input_ids": torch.tensor([read])}, words=words,
            labels=[tokenizer.decode([i]) for i in read], pieces=pieces, frames=len(ids), heard=len(ids),
            digest=hashlib.sha256(f"{source}\t{target}".encode()).hexdigest(),
        ))  # fmt: skip
    return made


def _said(given: dict[str, torch.Tensor], model: Any) -> list[int]:
    """What the model says, with the token that a decoder begins with."""
    place = device_of(model)
    with torch.inference_mode():
        ids: list[int] = model.generate(
            **{name: x.to(place) for name, x in given.items()}, do_sample=False, num_beams=1, max_new_tokens=LONGEST,
        )[0].tolist()  # fmt: skip
    return ids


def _read(target: str, model: Any, tokenizer: Any) -> list[int]:
    start = getattr(model.config, "decoder_start_token_id", None)
    if start is None:
        raise UserError(f"{type(model).__name__} names no decoder_start_token_id; leave the translations away")
    return [int(start), *tokenizer(text_target=target)["input_ids"]]
