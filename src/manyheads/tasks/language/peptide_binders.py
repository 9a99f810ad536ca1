# SPDX-License-Identifier: Apache-2.0
"""Peptides that bind a protein, whose sequence alone is given: the loss of known ones, and new ones to be tried."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...attention.masks import padded
from ...data.proteins import ALPHABET, RESIDUES, Binding, likeness, read_pairs, read_protein, test_pairs, training_pairs
from ...errors import UserError
from ...experiment import Metric
from ...recipe import Batch, Part, Picture, Sample
from .._field import FieldTask, parted
from ._residues import BEGIN, END, FIRST, MASK, VOCABULARY, Continued, MaskedResidues

__all__ = ["Binders", "PeptideBinders"]

_NEAR = 0.3  # of likeness to a protein that was trained on, from which a test protein is no new one
_CLUSTERS = 10  # every so manieth validates


@dataclass(frozen=True)
class Binders:
    """What a model says of a protein.

    Attributes:
        peptides: new ones, the most likely first; empty where one was given.
        perplexities: of these, as the model ranks them.
        peptide: that was given, None where there is none.
        log_probs: of its residues.
    """

    peptides: tuple[str, ...] = ()
    perplexities: tuple[float, ...] = ()
    peptide: str | None = None
    log_probs: tuple[float, ...] = ()

    def __str__(self) -> str:
        if self.peptide is not None:
            return f"{self.peptide}, perplexity {math.exp(-sum(self.log_probs) / max(1, len(self.log_probs))):.2f}"
        each = zip(self.peptides, self.perplexities, strict=True)
        return "; ".join(f"{peptide}, perplexity {value:.2f}" for peptide, value in each)


@dataclass(frozen=True, kw_only=True)
class PeptideBinders(FieldTask):
    """Trained on complexes of PepNN (PDB), judged on the 203 pairs that PepMLM's authors publish perplexities of.

    Clusters of proteins are dealt out: of the training pairs one cluster in ten validates, and pairs of a protein that
    is judged are left out. Two in three proteins of the test pairs are still like one that was trained on, so that
    ``far_nll`` is of the others. A loss is of all residues of a peptide together, as a model gives them before it has
    seen one (masked models), or each after those before it (the reference); 20 amino acids at random are ``ln 20``.
    X stands for what is none of them. Of a protein the first ``room`` residues are read.

    The reference is a Transformer that reads a protein from both sides and continues it with the peptide from left to
    right.

    Attributes:
        room: residues of a protein that are read.
        length: of new peptides.
        tried: new peptides for a file of the user's.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("nll", "held-out loss", "nats/residue", what="mean over the residues of a peptide"),
        Metric(
            "far_nll", "held-out loss, new proteins", "nats/residue",
            what=f"of proteins that share less than {_NEAR:.0%} of their words of four residues with any trained on",
        ),
    )  # fmt: skip
    files: ClassVar[tuple[str, ...]] = ("pepnn-train",)
    takes: ClassVar[str] = (
        "a folder with pairs.csv, which has the columns receptor and peptide, amino acids in one letter each, and "
        "cluster where proteins are alike"
    )
    references: ClassVar[tuple[str, ...]] = ("continued",)

    dim: int = 128
    room: int = 500
    length: int = 15
    tried: int = 4

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

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        return MaskedResidues(blocks, self.dim)

    def reference(self, width: int, kind: str = "") -> nn.Module:
        return Continued(self.dim, self.layers, self.heads, width, self.dropout)

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """Of the residues of all peptides; ``model.logits(batch) -> [B, T, VOCABULARY]``."""
        return -residue_log_probs(model, batch)[batch["binder"]].mean()

    def predict(self, model: Any, batch: Batch) -> list[Binders]:
        if "targets" in batch:
            logs = residue_log_probs(model, batch)
            return [
                Binders(peptide=peptide, log_probs=tuple(row[there].tolist()))
                for peptide, row, there in zip(batch["targets"], logs.cpu(), batch["binder"].cpu(), strict=True)
            ]
        return [
            self.designed(model, {key: x[i : i + 1] for key, x in batch.items()}) for i in range(len(batch["mask"]))
        ]

    def designed(self, model: Any, batch: Batch) -> Binders:
        """New peptides for one protein, the lowest perplexity first; ``model.draw`` and ``model.perplexity``."""
        made = {}
        for turn in range(self.tried):
            tokens = model.draw(batch, torch.Generator().manual_seed(turn))
            there = batch["binder"][0]
            text = "".join(ALPHABET[int(token) - FIRST] for token in tokens[0, there])
            made[text] = model.perplexity({**batch, "tokens": tokens})
        order = sorted(made, key=lambda text: (made[text], text))
        return Binders(tuple(order), tuple(made[text] for text in order))

    def score(self, sample: Sample, said: Binders) -> Mapping[str, float]:
        if said.peptide == sample.target:
            nll = -sum(said.log_probs) / max(1, len(said.log_probs))
        else:  # what was said of another peptide tells nothing of this one
            nll = math.log(len(RESIDUES))
        return {"nll": nll, "far_nll": nll}

    def scores(self, samples: Sequence[Sample], said: Sequence[Binders]) -> list[Mapping[str, float]]:
        each = [self.score(sample, one) for sample, one in zip(samples, said, strict=True)]
        return [
            found if sample.about["near"] < _NEAR else {"nll": found["nll"]}
            for sample, found in zip(samples, each, strict=True)
        ]

    def truth(self, sample: Sample) -> Binders:
        return Binders(peptide=sample.target, log_probs=(0.0,) * len(sample.target))

    def context(self, sample: Sample) -> str:
        return sample.group

    def pictures(self, samples: Sequence[Sample], said: Sequence[Binders]) -> Sequence[Picture]:
        """The loss of each peptide, by how near its protein is to one that was trained on."""
        edges = (0.0, 0.1, _NEAR, 0.6, 0.9)
        rows: list[list[float]] = []
        for low, high in zip(edges, (*edges[1:], 1.01), strict=True):
            found = [
                self.score(sample, one)["nll"]
                for sample, one in zip(samples, said, strict=True)
                if low <= sample.about["near"] < high
            ]
            rows.append([sum(found) / len(found) if found else math.nan])
        values = [[row[0] for row in rows]]
        columns = [f"{low:g}" for low in edges]
        return (Picture("loss by likeness", ["nats a residue"], columns, values, ("loss", "likeness, from")),)


def residue_log_probs(model: Any, batch: Batch) -> Tensor:
    """``[B, T]`` float32: of the token that stands at each place of a peptide, by ``model.logits(batch)``."""
    logs: Tensor = model.logits(batch).float().log_softmax(-1)
    return logs.gather(-1, batch["tokens"][..., None])[..., 0]


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
            pair.peptide, {"near": near.get(pair.receptor, 1.0)},
        )
        for i, (part, pair) in enumerate(pairs)
    ]  # fmt: skip
    return sorted(found, key=lambda sample: _hash(sample.name))


@lru_cache(maxsize=100_000)
def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


assert len(ALPHABET) + FIRST == VOCABULARY
