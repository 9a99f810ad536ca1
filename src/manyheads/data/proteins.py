# SPDX-License-Identifier: Apache-2.0
"""Peptides beside the proteins that they bind: PepNN's complexes of the PDB, and the pairs that PepMLM is tested on."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from . import files

__all__ = [
    "ALPHABET", "BEGIN", "END", "FIRST", "MASK", "RESIDUES", "VOCABULARY", "Binding", "likeness", "read_pairs",
    "read_protein", "test_pairs", "training_pairs",
]  # fmt: skip

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
ALPHABET = RESIDUES + "X"  # X: any that is not one of the twenty
BEGIN, END, MASK, FIRST = 1, 2, 3, 4  # tokens: 0 fills up, and from FIRST on are the letters of the alphabet
VOCABULARY = FIRST + len(ALPHABET)
_WORD = 4  # residues in a row, by which two proteins are compared


class Binding(NamedTuple):
    """A peptide and the protein that it binds, as letters of :data:`ALPHABET`; ``cluster`` holds proteins alike."""

    receptor: str
    peptide: str
    cluster: str


def training_pairs() -> list[Binding]:
    """2,828 pairs of PepNN, peptides of 5 to 25 residues, in 653 clusters of proteins.

    Raises:
        UserError: the file cannot be had.
    """
    rows = _rows(files.path("pepnn-train"))
    return [_binding(row["Receptor Sequence"], row["Sequence"], row["Cluster"]) for row in rows]


def test_pairs() -> list[Binding]:
    """The 203 pairs that PepMLM's authors give perplexities of, peptides of 3 to 50 residues; a protein is a cluster,
    by its number.

    Raises:
        UserError: the file cannot be had.
    """
    rows = _rows(files.path("pepmlm-test"))
    number = {protein: i for i, protein in enumerate(dict.fromkeys(row["Receptor Sequence"] for row in rows))}
    return [
        _binding(row["Receptor Sequence"], row["Binder"], f"{number[row['Receptor Sequence']]:03d}") for row in rows
    ]


def read_pairs(path: Path) -> list[Binding]:
    """A file of the user's with the columns receptor and peptide, and cluster where there is one.

    Raises:
        UserError: it cannot be read, or lacks a column.
    """
    try:
        rows = _rows(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read: give a CSV file with the columns receptor and peptide") from error
    if not rows or not {"receptor", "peptide"} <= set(rows[0]):
        raise UserError(f"{path} has no columns receptor and peptide, or no rows")
    found = [_binding(row["receptor"], row["peptide"], row.get("cluster") or row["receptor"]) for row in rows]
    if empty := [i + 2 for i, one in enumerate(found) if not one.receptor or not one.peptide]:
        raise UserError(f"{path}, line {empty[0]}: the receptor or the peptide is empty")
    return found


def read_protein(path: Path) -> str:
    """The first sequence of a FASTA file, or a file of letters alone.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        lines = path.read_text("utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: give a FASTA file of a protein") from error
    heads = [i for i, line in enumerate(lines) if line.startswith(">")]
    first = lines[heads[0] + 1 : heads[1] if len(heads) > 1 else None] if heads else lines
    letters = "".join("".join(first).split()).upper().rstrip("*")
    if not letters or not letters.isascii() or not letters.isalpha():
        raise UserError(f"{path} holds no protein: give a FASTA file, or the letters of its residues")
    return _letters(letters)


def likeness(proteins: Iterable[str], others: Sequence[str]) -> list[dict[int, float]]:
    """For each protein the others that share a word of four residues with it, by number: the words that both have over
    those that either has (Jaccard).
    """
    sizes, where = [], defaultdict(list)
    for i, other in enumerate(others):
        words = _words(other)
        sizes.append(len(words))
        for word in words:
            where[word].append(i)
    found = []
    for protein in proteins:
        words = _words(protein)
        shared = Counter(i for word in words for i in where.get(word, ()))
        found.append({i: n / (len(words) + sizes[i] - n) for i, n in shared.items()})
    return found


def _words(protein: str) -> set[str]:
    return {protein[i : i + _WORD] for i in range(len(protein) - _WORD + 1)}


def _binding(receptor: str, peptide: str, cluster: str) -> Binding:
    return Binding(_letters(receptor.strip().upper()), _letters(peptide.strip().upper()), cluster)


def _letters(protein: str) -> str:
    return "".join(letter if letter in RESIDUES else "X" for letter in protein)


def _rows(path: Path) -> list[Mapping[str, Any]]:
    with path.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))
