# SPDX-License-Identifier: Apache-2.0
"""The taxonomy of ``families.toml``: its entries, with the formula that each names."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError
from .base import Family
from .linear import Decay, Mixed, VectorQuantised
from .sparse import LocalGlobal, MultiResolution, Softmax, Sparse
from .stored import Evicted, Latent, Offloaded, Quantised

__all__ = ["Entry", "families", "family", "family_of"]

_KINDS: tuple[type[Family], ...] = (
    Decay, Evicted, Latent, LocalGlobal, Mixed, MultiResolution, Offloaded, Quantised, Softmax, Sparse, VectorQuantised,
)  # fmt: skip
_FORMULAS = {kind.__name__: kind for kind in _KINDS}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One family.

    Attributes:
        name: as ``families.toml`` has it.
        title: in words.
        group: of the survey: dense, sparse, linear or hybrid.
        category: of the catalogue, that its strategies stand in.
        formula: what it costs.
        exactness: ``exact``, ``approximate`` (of a model that was trained with softmax) or ``learned``.
        training: what it needs before use: ``none``, ``calibration``, ``required``.
        decoder: whether a decoder can have it.
        cites: arXiv ids.
        members: slugs of its strategies.
        spec: of the one to try.
    """

    name: str
    title: str
    group: str
    category: str
    formula: Family
    exactness: Literal["exact", "approximate", "learned"]
    training: Literal["none", "calibration", "required"]
    cites: tuple[str, ...]
    members: tuple[str, ...]
    spec: str
    decoder: bool = True


@cache
def families() -> Mapping[str, Entry]:
    """All families by name, as the file has them in order."""
    with Path(__file__).with_name("families.toml").open("rb") as file:
        return {name: _entry(name, row) for name, row in tomllib.load(file).items()}


def family(name: str) -> Entry:
    """The family of that name.

    Raises:
        UserError: there is none.
    """
    if name not in families():
        raise UserError(f"no family {name!r}: there are {', '.join(families())}")
    return families()[name]


def family_of(slug: str) -> Entry | None:
    """The family that a strategy belongs to, also as ``slug.part``; None where it is of none."""
    return next((one for one in families().values() if slug.partition(".")[0] in one.members), None)


def _entry(name: str, row: dict[str, Any]) -> Entry:
    given, parts = row.pop("parameters", {}), row.pop("parts", None)
    formula = _made(row.pop("formula"), given, parts)
    row |= {"cites": tuple(row["cites"]), "members": tuple(row["members"]), "spec": row["spec"].format(**given)}
    return Entry(name=name, formula=formula, **row)


def _made(formula: str, given: dict[str, Any], parts: list[dict[str, Any]] | None = None) -> Family:
    kind = _FORMULAS[formula]
    if parts is not None:
        made = tuple(
            (part["share"], part["length"], _made(part["formula"], part.get("parameters", {}))) for part in parts
        )
        return Mixed(parts=made)
    assert {field.name for field in fields(kind)} >= given.keys(), f"{formula} has no {given}"
    return kind(**given)
