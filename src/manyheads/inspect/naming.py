# SPDX-License-Identifier: Apache-2.0
"""What is typed after ``--lens`` and ``--role``: short names of lenses, and the tokens that play a part."""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

from ..catalog import nearest
from ..causal_lens import CausalLens
from ..errors import UserError
from ..lens import Lens
from ..spec import Spec, parse, read, split_list

__all__ = ["DEFAULT", "SHORT", "Part", "asks", "check_roles", "parse_lenses", "parse_role", "role_of"]

# A short name stands for these lenses of the catalogue.
SHORT: dict[str, tuple[str, ...]] = {
    "sinks": ("active_dormant",),
    "massive": ("massive_values", "refined_massive_activations"),
    "rhythm": ("reasoning_rhythm",),
    "spans": ("strategy_attention",),
    "heads": ("head_statistics",),
}
DEFAULT = ("sinks", "massive", "rhythm")
_POSITIONS = re.compile(r"\d+-\d+(?:\+\d+-\d+)*")
_NAMING = ("span", "role")  # the field of a lens that says which role it looks at
_SHORTENED = frozenset(slug for slugs in SHORT.values() for slug in slugs if len(slugs) > 1)

Part = list[tuple[int, int]] | str  # spans of token positions, or text to be found


def parse_lenses(texts: Sequence[str]) -> tuple[list[Lens | CausalLens], dict[str, Part]]:
    """Lenses and the roles that are given among their fields, from comma-separated specs.

    ``sinks,spans:system=0-12`` gives the lens ``strategy_attention`` and the role ``system`` of the tokens 0 to 11.

    Raises:
        UserError: an unknown name or field, or a strategy that does not only look.
    """
    lenses: list[Lens | CausalLens] = []
    roles: dict[str, Part] = {}
    for spec in (spec for text in texts for spec in split_list(text)):
        given = read(spec)
        for slug in SHORT.get(given.name, (given.name,)):
            for lens in _made(slug, _items(given, roles)):
                if lens not in lenses:
                    lenses.append(lens)
    if not lenses:
        raise UserError("name at least one lens, such as sinks: `manyheads list --category lenses`")
    return lenses, roles


def check_roles(lenses: Sequence[Lens], known: Iterable[str]) -> None:
    """Raise UserError if a lens looks at tokens of a role that is not ``known``."""
    there = {*known, "bos", "response"}
    for lens in lenses:
        if (name := role_of(lens)) is not None and name not in there:
            raise UserError(
                f"{lens.slug} looks at tokens of the role {name!r}, and none are named: "
                f'add --role {name}=START-END or --role {name}="text of the prompt"'
            )


def asks(lens: Lens | CausalLens) -> bool:
    """Whether ``lens`` is about answers, and without a text asks questions whose answers are known."""
    return isinstance(lens, Lens) and lens.asks


def role_of(lens: Lens) -> str | None:
    """The role whose tokens ``lens`` looks at; None for one that looks at all."""
    return next((name for field in _NAMING if isinstance(name := getattr(lens, field, None), str)), None)


def _items(given: Spec, roles: dict[str, Part]) -> tuple[dict[str, str], list[str]]:
    """The fields that follow a lens, and the names of roles among them, whose tokens are put into ``roles``."""
    name = given.name
    fields = set().union(*(_fields(slug) for slug in SHORT.get(name, (name,))))
    kept, named = {}, []
    for key, value in given.fields.items():
        if key not in fields and _is_place(value):
            roles |= parse_role(f"{key}={value}")
            named.append(key)
        elif key not in fields and name in SHORT:
            raise UserError(f"{name} has no field {key!r}; it has {', '.join(sorted(fields))}")
        else:
            kept[key] = value  # an unknown field is refused by the lens
    return kept, named


def _made(slug: str, given: tuple[dict[str, str], list[str]]) -> list[Any]:
    """The lens with its own fields among those ``given``; one for each role if it looks at one."""
    kept, named = given
    mine = {key: value for key, value in kept.items() if slug not in _SHORTENED or key in _fields(slug)}
    each = [{field: role} for field in _NAMING if field in _fields(slug) for role in named]
    return [parse(Spec(slug, {**mine, **one}).nested) for one in each or [{}]]


def _is_place(value: str) -> bool:
    return bool(_POSITIONS.fullmatch(value)) or (len(value) > 1 and value[0] in "\"'" and value[-1] == value[0])


def _fields(slug: str) -> set[str]:
    """Names of the fields of a lens. Raises UserError where there is no such lens."""
    from .. import catalog

    known = [*SHORT, *(row.slug for row in [*catalog.papers(), *catalog.baselines()] if row.category == "lenses")]
    if slug.partition(".")[0] not in catalog.names():
        close = nearest(slug, known)
        hint = f"did you mean {close[0]}?" if close else f"short names are {', '.join(SHORT)}"
        raise UserError(f"unknown lens {slug!r}: {hint} (`manyheads list --category lenses` has all)")
    cls = catalog.load(slug)
    if not issubclass(cls, Lens | CausalLens):
        raise UserError(f"{slug} acts on the model and does not only look; lenses: `manyheads list --category lenses`")
    return {field.name for field in dataclasses.fields(cls)}


def parse_role(text: str) -> dict[str, Part]:
    """``system=0-12`` or ``system=0-12+40-50``: tokens, the last not included; anything else is text to be found.

    Raises:
        UserError: no name, or a span without tokens.
    """
    name, equals, value = (piece.strip() for piece in text.partition("="))
    if not equals or not value or not re.fullmatch(r"\w+", name):
        raise UserError(f'{text!r} is no role: write NAME=START-END (token positions) or NAME="text of the prompt"')
    if not _POSITIONS.fullmatch(value):
        if re.fullmatch(r"[\d+-]+", value):
            raise UserError(f"{text!r}: write token positions as START-END, such as {name}=0-12")
        if value[0] in "\"'" and value[-1] == value[0] and len(value) > 2:
            value = value[1:-1]
        return {name: value}
    spans = []
    for piece in value.split("+"):
        start, end = map(int, piece.split("-"))
        if start >= end:
            raise UserError(f"{text!r}: {piece} holds no token; END is the first token after the span")
        spans.append((start, end))
    return {name: spans}
