# SPDX-License-Identifier: Apache-2.0
"""The text that names a strategy, and lists of such texts, as they are typed.

    list    = spec {"," spec}             together = spec {" + " spec}
    spec    = name [":" fields | "(" fields ")"]
    fields  = field "=" value {"," field "=" value}

A value is any text whose parentheses match, so that a spec can be the value of a field:
``graphkv:base=snapkv(window_size=16),budget=0.25``. Numbers of layers or positions are written ``0-3+7``, and the parts
of any other tuple ``0.8+0.7``: commas already part the fields.
"""

import dataclasses
import difflib
import re
from dataclasses import dataclass, replace
from typing import Any, TypeVar, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from . import catalog
from .errors import UserError
from .strategy import Cache, Layers, Strategy

__all__ = [
    "Spec", "fill", "numbers", "parse", "protecting", "read", "split_list", "split_outside", "split_together",
    "told_by_spec",
]  # fmt: skip

Made = TypeVar("Made")


@dataclass(frozen=True)
class Spec:
    """A spec taken apart; nothing is known yet of the name and its fields.

    Attributes:
        name: of the strategy.
        fields: texts of the values by name, in the order given.
    """

    name: str
    fields: dict[str, str]

    @property
    def text(self) -> str:
        """The spec as it is written by itself: ``name:field=value``."""
        inside = ",".join(f"{name}={value}" for name, value in self.fields.items())
        return f"{self.name}:{inside}" if inside else self.name

    @property
    def nested(self) -> str:
        """The spec as it is written where it is itself a value: ``name(field=value)``."""
        inside = ",".join(f"{name}={value}" for name, value in self.fields.items())
        return f"{self.name}({inside})" if inside else self.name


def split_outside(text: str) -> list[str]:
    """Pieces of ``text`` between commas that stand outside parentheses, stripped, empty ones left out.

    Raises:
        UserError: parentheses that do not match.
    """
    pieces, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += letter
    if depth:
        raise UserError(f"{text!r}: parentheses do not match")
    return [piece.strip() for piece in pieces if piece.strip()]


def split_list(text: str) -> list[str]:
    """Split ``a,b:x=1,y=2,c`` into specs: a piece that reads ``name=value`` goes on with the spec before it."""
    specs: list[str] = []
    for piece in split_outside(text):
        if specs and re.match(r"\w+\s*=", piece):
            specs[-1] += ("," if ":" in specs[-1] else ":") + piece
        else:
            specs.append(piece)
    return specs


def split_together(text: str) -> list[str]:
    """Specs that are joined by `` + ``: strategies that are used together.

    Raises:
        UserError: nothing stands on one side of it.
    """
    specs = [part.strip() for part in text.split(" + ")]
    if not all(specs):
        raise UserError(f"{text!r}: write a strategy on either side of +")
    return specs


def numbers(text: str) -> tuple[int, ...]:
    """``"0-3+7"`` -> ``(0, 1, 2, 3, 7)``: commas already part the fields of a spec.

    Raises:
        UserError: the text is something else, or a range runs down.
    """
    found: list[int] = []
    for part in text.split("+"):
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        if not first.isdecimal() or (dash and not (last.isdecimal() and int(last) >= int(first))):
            raise UserError(f"{text!r} are no numbers: write them as 0-3+7")
        found.extend(range(int(first), int(last or first) + 1))
    return tuple(found)


def read(text: str) -> Spec:
    """Take a spec apart.

    Raises:
        UserError: parentheses that do not match, a field without a value, or one that is given twice.
    """
    match = re.fullmatch(r"\s*([^:(]*)(?:\((.*)\)|:(.*))?\s*", text, re.DOTALL)
    if match is None:
        raise UserError(f"{text!r} is no spec: write slug:field=value,field=value")
    fields: dict[str, str] = {}
    for item in split_outside(match[2] or match[3] or ""):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise UserError(f"{text!r}: write {item!r} as field=value")
        if name in fields:
            raise UserError(f"{text!r}: {name!r} is given twice")
        fields[name] = value
    return Spec(match[1].strip(), fields)


def parse(spec: str | Strategy) -> Strategy:
    """Build a strategy from ``slug:field=value,field=value``; a strategy is returned as it is.

    ``slug(field=value,field=value)`` means the same. The slug ``auto`` stands for the cache strategy that we
    recommend; ``slug.part`` for one of several strategies of a paper.

    Raises:
        UserError: unknown slug or field (with the nearest names), or a value that the field refuses.
    """
    if isinstance(spec, Strategy):
        return spec
    given = read(spec)
    slug = catalog.RECOMMENDED if given.name == "auto" else given.name
    return fill(catalog.load(slug), replace(given, name=slug))


def told_by_spec(strategy: Strategy) -> bool:
    """Whether any process can make this strategy of its spec alone."""
    try:
        return parse(strategy.spec) == strategy
    except UserError:
        return False


def protecting(spec: str, protect: str) -> str:
    """``spec``, which may name several strategies, with ``protect`` for the one that keeps the cache.

    Raises:
        UserError: none does that may drop something, or it cannot hold to that.
    """
    made = [parse(part) for part in split_together(spec)]
    if not any(isinstance(strategy, Cache) for strategy in made):
        raise UserError(f"{spec} drops nothing from a cache, so that --protect means nothing there: leave one away")
    for strategy in made:
        if isinstance(strategy, Cache):
            strategy.protecting(protect)
    given = [read(part) for part in split_together(spec)]
    return " + ".join(
        replace(one, fields={**one.fields, "protect": protect}).text if isinstance(strategy, Cache) else one.text
        for one, strategy in zip(given, made, strict=True)
    )


def fill(cls: type[Made], given: Spec) -> Made:
    """Build a dataclass from the fields of a spec, which its annotations read and check.

    Raises:
        UserError: unknown field (with the nearest name), or a value that the field refuses.
    """
    name, known = given.name, {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls, include_extras=True)
    values: dict[str, Any] = {}
    value: Any
    for field, text in given.fields.items():
        if field not in known:
            near = difflib.get_close_matches(field, known, 1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"{name} has no field {field!r}; {hint}it has {', '.join(sorted(known))}")
        hint, value = hints[field], text
        try:
            if hint == Layers:
                value = numbers(text)
            elif get_origin(hint) is tuple:
                value = tuple(part for part in text.split("+") if part)
            values[field] = TypeAdapter(hint).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UserError(f"{name}: {field}={text}: {reason}") from None
        except ValueError as error:
            raise UserError(f"{name}: {field}={text}: {error}") from None
    return cls(**values)
