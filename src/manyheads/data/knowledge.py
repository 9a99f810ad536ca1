# SPDX-License-Identifier: Apache-2.0
"""Questions of one form about what a prompt says and about what a language model knows, with the same answers.

A set has keys and answers that are common knowledge (capitals of countries, opposites of words). The same answers serve
as what is planted: ``{name} lives in Paris.`` is asked for by ``{name} lives in``, as a passkey is; ``The capital of
France is`` asks for the same word from the weights. Grammar comes from BLiMP: a beginning, and the word that may follow
it beside one that may not.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

__all__ = ["GRAMMAR", "NAMES", "SETS", "FactSet", "grammar"]


@dataclass(frozen=True)
class FactSet:
    """Facts and how they are said.

    Attributes:
        facts: key and answer of each; the answers differ in their first letters' tokens in common vocabularies.
        knows: beginnings that the answer follows, with ``{key}``.
        says: likewise of what is planted, with ``{name}``; a planted sentence is it, the answer and a full stop.
    """

    facts: tuple[tuple[str, str], ...]
    knows: tuple[str, ...]
    says: tuple[str, ...]


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((key, answer) for key, answer in (pair.split() for pair in text.split(",")))


SETS = {
    "capitals": FactSet(
        _pairs(
            "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Japan Tokyo, China Beijing, Russia Moscow, "
            "England London, Greece Athens, Egypt Cairo, Austria Vienna, Poland Warsaw, Ireland Dublin, "
            "Portugal Lisbon, Sweden Stockholm, Norway Oslo, Denmark Copenhagen, Finland Helsinki, Turkey Ankara, "
            "Cuba Havana, Peru Lima, Iraq Baghdad, Iran Tehran, Canada Ottawa, Hungary Budapest, Belgium Brussels, "
            "Syria Damascus, Ukraine Kiev, Kenya Nairobi, Afghanistan Kabul"
        ),
        ("The capital of {key} is", "The capital city of {key} is called"),
        ("{name} lives in", "The home town of {name} is"),
    ),
    "opposites": FactSet(
        _pairs(
            "hot cold, big small, up down, left right, black white, day night, rich poor, old young, fast slow, "
            "high low, hard soft, open closed, wet dry, full empty, good bad, light dark, true false, early late, "
            "strong weak, long short, happy sad, clean dirty, war peace, love hate, north south, east west, "
            "male female, inside outside, first last, alive dead"
        ),
        ("The opposite of {key} is", "The antonym of {key} is"),
        ("The secret word of {name} is", "The password that {name} chose is"),
    ),
}  # fmt: skip
NAMES = (
    "Anna Peter Maria Thomas Laura Daniel Sarah Michael Emma David Julia Robert Alice James Helen John Lucy Paul Diana "
    "Mark Clara Simon Nora Frank Rosa George Ruth Henry Eva Martin"
).split()  # fmt: skip
GRAMMAR = (
    "determiner_noun_agreement_1", "anaphor_number_agreement", "irregular_past_participle_verbs",
    "regular_plural_subject_verb_agreement_1",
)  # fmt: skip


def grammar(name: str) -> list[tuple[str, str, str]]:
    """Beginning, word that may follow, and word that may not, of the pairs of one of :data:`GRAMMAR` (BLiMP).

    Raises:
        UserError: the file cannot be had.
    """
    from . import files

    rows = map(json.loads, files.text(f"blimp-{name.replace('_', '-')}").splitlines())
    return [(r["one_prefix_prefix"], r["one_prefix_word_good"], r["one_prefix_word_bad"]) for r in rows]
