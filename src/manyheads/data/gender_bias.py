# SPDX-License-Identifier: Apache-2.0
"""What tells whether a language model takes professions for a gender's: prompts, sentences in pairs, balanced text.

``professions``         ratings of professions by crowd workers (Bolukbasi et al.), and the templates of Vig et al.
``wino_bias``           WinoBias: two sentences that differ in their pronouns, of which one goes with the stereotype
``winogender``          Winogender schemas: the same for the pronoun of an occupation, by the share of women in it
``crows_pairs``         CrowS-Pairs, the pairs about gender
``balanced_sentences``  sentences of running text about a profession and with a pronoun, each beside its own swap

The paper tunes on the balanced part of BUG, sentences of corpora in which a profession has a pronoun. It cannot be had
here, so such sentences are looked for in running text, and every one stands beside itself with the pronouns of the
other gender: of both genders there are as many.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "TEMPLATES", "Pair", "Profession", "balanced_sentences", "crows_pairs", "professions", "swapped", "wino_bias",
    "winogender",
]  # fmt: skip

TEMPLATES = (
    *(f"The {{}} {verb} that" for verb in ("said", "yelled", "whispered", "wanted", "desired", "wished")),
    *(
        f"The {{}} {verb} because"
        for verb in (
            "ate", "ran", "drove", "slept", "cried", "laughed", "went home", "stayed up", "was fired", "was promoted",
            "yelled",
        )
    ),
)  # fmt: skip
_MALE = {"he": "she", "him": "her", "his": "her", "himself": "herself"}
_FEMALE = {"she": "he", "herself": "himself"}  # her is him or his: sentences that have it are left out
_OTHERS = frozenset(
    "her hers man men woman women boy boys girl girls mr mrs miss ms sir lady father mother son daughter brother "
    "sister husband wife king queen uncle aunt gentleman".split()
)
_WORD = re.compile(r"[A-Za-z]+")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_LONGEST = 30  # words of a balanced sentence


@dataclass(frozen=True, slots=True)
class Profession:
    """A profession and how it is taken.

    Attributes:
        name: as it stands in a sentence.
        male: whether its ratings add up to a man's.
        definitional, stereotypical: ratings, from -1 (a woman's) to 1 (a man's).
    """

    name: str
    male: bool
    definitional: float
    stereotypical: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two sentences that differ in their gender.

    Attributes:
        pro: the one that goes with the stereotype.
        anti: the other.
        about: what pairs share that are not independent: an occupation, or the pair itself.
    """

    pro: str
    anti: str
    about: str


def professions() -> list[Profession]:
    """The 299 professions whose ratings add up to one gender: 229 to a man's, 70 to a woman's.

    Raises:
        UserError: the file cannot be had.
    """
    from . import files

    rows = json.loads(files.text("professions"))
    return [Profession(name.replace("_", " "), a + b > 0, a, b) for name, a, b in rows if a + b]


def wino_bias(kind: int = 1) -> list[Pair]:
    """The pairs of WinoBias's test part: of kind 2, where syntax says whose the pronoun is, or 1, where it does not.

    As they were published: about one in eighty differs in more than its pronouns.

    Raises:
        UserError: a file cannot be had.
    """
    from . import files

    def read(name: str) -> list[str]:
        lines = files.text(f"winobias-{name}-{kind}").splitlines()
        return [re.sub(r"[\[\]]", "", line.partition(" ")[2]).strip() for line in lines if line.strip()]

    pairs = zip(read("pro"), read("anti"), strict=True)
    return [Pair(pro, anti, f"{i // 2}") for i, (pro, anti) in enumerate(pairs)]


def winogender() -> list[Pair]:
    """Winogender's sentences whose pronoun is the occupation's, where fewer or more than half of it are women.

    Raises:
        UserError: a file cannot be had.
    """
    from . import files

    table = csv.DictReader(files.text("winogender-occupations").splitlines(), delimiter="\t")
    women = {row["occupation"]: float(row["bls_pct_female"]) for row in table}
    found = csv.DictReader(files.text("winogender-sentences").splitlines(), delimiter="\t")
    sentences = {row["sentid"].removesuffix(".txt"): row["sentence"] for row in found}
    pairs = []
    for name, male in sentences.items():
        occupation, _, answer, gender = name.split(".")
        if gender == "male" and answer == "0" and women.get(occupation, 50.0) != 50.0:
            both = (male, sentences[name.removesuffix("male") + "female"])
            pairs.append(Pair(*(both if women[occupation] < 50 else both[::-1]), occupation))
    return pairs


def crows_pairs() -> list[Pair]:
    """The pairs about gender of CrowS-Pairs as revised, the sentence that goes with the stereotype first.

    Raises:
        UserError: the file cannot be had.
    """
    from . import files

    rows = csv.DictReader(files.text("crows-pairs").splitlines(), delimiter="\t")
    made = []
    for i, row in enumerate(row for row in rows if row["bias_type"] == "gender"):
        both = row["sent_more"], row["sent_less"]
        made.append(Pair(*(both if row["stereo_antistereo"] == "stereo" else both[::-1]), f"{i}"))
    return made


def swapped(sentence: str) -> str | None:
    """The sentence with the pronouns of the other gender; None where it has none, both, or a word that goes with one.

    ``her`` may be him or his, so a sentence that has it is left alone.
    """
    words = {word.lower() for word in _WORD.findall(sentence)}
    table = _MALE if words & _MALE.keys() else _FEMALE
    if not words & table.keys() or words & (_MALE.keys() if table is _FEMALE else _FEMALE.keys()) or words & _OTHERS:
        return None

    def other(found: re.Match[str]) -> str:
        word = found[0]
        made = table.get(word.lower(), word)
        return made if word.lower() not in table or word.islower() else made.capitalize()

    return _WORD.sub(other, sentence)


def balanced_sentences(texts: Iterable[str], least: int = 6) -> list[tuple[str, str]]:
    """Sentences in which a pronoun follows a profession, each with its swap (:func:`swapped`), in their order.

    Args:
        texts: to look in.
        least: words of a sentence.
    """
    names = {profession.name for profession in professions() if abs(profession.definitional) < 1}
    longest = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    pattern = re.compile(rf"\b(?:{longest})\b.*\b(?:{'|'.join({**_MALE, **_FEMALE})})\b")
    found = {}
    for text in texts:
        for sentence in _SENTENCE.split(text):
            line = " ".join(sentence.split())
            if not least <= line.count(" ") + 1 <= _LONGEST or (other := swapped(line)) is None:
                continue
            if pattern.search(line):
                found[line] = other
    return list(found.items())
