# SPDX-License-Identifier: Apache-2.0
"""Maps of words for the page: where the words of a prompt act while the baseline is made."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from .. import catalog
from ..errors import UserError
from ..integrations import use
from ..models.pipeline import parameters
from ..spec import parse
from .rows import Row
from .run import Settings, generate

__all__ = ["find", "watch"]

_SLUG = "token_maps"


def find(pipe: Any, rows: Sequence[Row], words: str) -> list[dict[str, tuple[int, ...]]]:
    """Places of each word of ``cat+hat`` in the prompt of each row.

    Raises:
        UserError: a prompt lacks a word, or the pipeline has no prompts.
    """
    names = [word.strip() for word in words.split("+")]
    if not all(names):
        raise UserError(f"{words!r}: write words of the prompt joined by +, as --maps cat+hat")
    if rows[0].prompt is None:
        raise UserError(f"{type(pipe).__name__} takes no prompt; leave --maps away")
    return [{name: _places(pipe, row.prompt or "", name) for name in names} for row in rows]


def _places(pipe: Any, prompt: str, word: str) -> tuple[int, ...]:
    if hasattr(pipe, "words"):
        known = pipe.words(prompt)
        if word.lower() not in known:
            raise UserError(f"{word!r} is not in the prompt {prompt!r}; give --maps words of {known}")
        return (known.index(word.lower()),)
    return tuple(_category().places(getattr(pipe, "tokenizer", None), prompt, word))


def _category() -> Any:
    return import_module(catalog.get(_SLUG).module)


def watch(
    pipe: Any, places: Sequence[Mapping[str, Sequence[int]]], rows: Sequence[Row], settings: Settings
) -> tuple[list[Any], Any]:
    """Make every row once more while its words are watched.

    Returns:
        the images, and the maps of the words, a row of each.

    Raises:
        UserError: the denoiser has no attention to words.
    """
    category, takes, found, images = _category(), parameters(pipe), [], []
    for row, named in zip(rows, places, strict=True):
        tokens = sorted({place for known in named.values() for place in known})
        strategy = parse(f"{_SLUG}:tokens={'+'.join(map(str, tokens))}")
        with use(pipe, strategy) as port:
            images.append(generate(pipe, takes, row, settings)[-1])
        found.append(category.maps(port, strategy, words=named))
    return images, _joined(category, found)


def _joined(category: Any, found: Sequence[Any]) -> Any:
    """Maps of several runs as those of one."""
    first = found[0]
    maps = {branch: torch.cat([each.maps[branch] for each in found]) for branch in first.maps}
    layers = {
        branch: {n: torch.cat([each.layers[branch][n] for each in found]) for n in by}
        for branch, by in first.layers.items()
    }
    return category.WordMaps(first.names, first.units, maps, layers, {})
