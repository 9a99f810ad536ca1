# SPDX-License-Identifier: Apache-2.0
"""Peptides that bind a protein, whose sequence alone is given: the loss of known ones, and new ones to be tried."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch

from ...attention.masks import padded
from ...data.proteins import (
    ALPHABET,
    BEGIN,
    END,
    FIRST,
    MASK,
    Binding,
    likeness,
    read_pairs,
    read_protein,
    test_pairs,
    training_pairs,
)  # fmt: skip
from ...errors import UserError
from ...recipe import Batch, Part, Sample
from .._field import parted
from ._binding_task import BindingTask

__all__ = ["PeptideBinders"]

_CLUSTERS = 10  # of so many one validates


@dataclass(frozen=True, kw_only=True)
class PeptideBinders(BindingTask):
    """Trained on complexes of PepNN (PDB), judged on the 203 pairs that PepMLM's authors publish perplexities of.

    Clusters of proteins are dealt out: of the training pairs one cluster in ten validates, and pairs of a protein that
    is judged are left out. More than half of the test pairs' proteins are still like one that was trained on, so that
    ``far_nll`` is of the others. A loss is of all residues of a peptide together, as a model gives them before it has
    seen one (masked models), or each after those before it (the reference); 20 amino acids at random are ``ln 20``.
    X stands for what is none of them. Of a protein the first ``room`` residues are read.

    The reference is a Transformer that reads a protein from both sides and continues it with the peptide from left to
    right.
    """

    files: ClassVar[tuple[str, ...]] = ("pepnn-train",)
    takes: ClassVar[str] = (
        "a folder with pairs.csv, which has the columns receptor and peptide, amino acids in one letter each, and "
        "cluster where proteins are alike"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.room, self.length, self.tried) < 1:
            raise UserError("room, length and tried count, 1 or more")

    @classmethod
    def read(cls, folder: Path | None) -> Sequence[Sample]:
        if folder is None:
            tested = test_pairs()
            known = {pair.receptor for pair in tested}
            trained = [pair for pair in training_pairs() if pair.receptor not in known]
            order = sorted({pair.cluster for pair in trained}, key=_hash)
            home: dict[str, Part] = {
                name: "validation" if i % _CLUSTERS == 0 else "train" for i, name in enumerate(order)
            }
            pairs = [(home[pair.cluster], pair) for pair in trained] + [("test", pair) for pair in tested]
        else:
            own = read_pairs(folder / "pairs.csv")
            home = parted([pair.cluster for pair in own])
            pairs = [(home[pair.cluster], pair) for pair in own]
        return _samples(pairs)

    @classmethod
    def open(cls, path: Path) -> Sample:
        return Sample(path.name, "", "test", (read_protein(path),))

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """``tokens``, ``mask`` and ``binder [B, T]``: begin, protein, peptide, end; ``binder`` is True at the peptide,
        which is ``length`` masks where there is none.
        """
        rows, where = [], []
        for sample in samples:
            protein = [FIRST + ALPHABET.index(letter) for letter in sample.inputs[0][: self.room]]
            target = [MASK] * self.length if sample.target is None else _tokens(sample.target)
            rows.append(torch.tensor([BEGIN, *protein, *target, END]))
            where.append(torch.tensor([False] * (1 + len(protein)) + [True] * len(target) + [False]))
        tokens, mask = padded(rows)
        batch = {"tokens": tokens, "mask": mask, "binder": padded(where)[0]}
        if any(sample.target is None for sample in samples):
            return batch
        return {**batch, "targets": [sample.target for sample in samples]}


def _tokens(peptide: str) -> list[int]:
    return [FIRST + ALPHABET.index(letter) for letter in peptide]


def _samples(pairs: Sequence[tuple[Part, Binding]]) -> list[Sample]:
    """Samples in an order that says nothing; ``near``: the highest likeness to a protein of the training part."""
    seen = sorted({pair.receptor for part, pair in pairs if part == "train"})
    judged = sorted({pair.receptor for part, pair in pairs if part != "train"})
    near = {one: max(found.values(), default=0.0) for one, found in zip(judged, likeness(judged, seen), strict=True)}
    found = [
        Sample(
            f"{part} {i:06d}", f"{part} {pair.cluster}" if part == "test" else pair.cluster, part, (pair.receptor,),
            pair.peptide, {"near": near.get(pair.receptor, 1.0), "context": f"{part} {pair.cluster}"},
        )
        for i, (part, pair) in enumerate(pairs)
    ]  # fmt: skip
    return sorted(found, key=lambda sample: _hash(sample.name))


@lru_cache(maxsize=100_000)
def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
