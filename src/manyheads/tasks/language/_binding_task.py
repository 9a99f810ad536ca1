# SPDX-License-Identifier: Apache-2.0
"""Base of tasks of peptides that bind a protein: models, the loss, what is said of a protein, and its scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...data.proteins import ALPHABET, FIRST, RESIDUES
from ...experiment import Metric
from ...recipe import Batch, Picture, Sample
from .._field import FieldTask
from ._residues import Continued, Masked, MaskedResidues

__all__ = ["NEAR", "Binders", "BindingTask", "residue_log_probs"]

NEAR = 0.3  # of likeness to a protein that was trained on, from which a test protein is no new one


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
class BindingTask(FieldTask):
    """``inputs`` are a protein, a tuple of one text, ``target`` is a peptide; ``about["near"]`` is the likeness of the
    protein to the nearest that was trained on.

    Attributes:
        room: residues of a protein that are read.
        length: of new peptides.
        tried: new peptides for a file of the user's.
    """

    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("nll", "held-out loss", "nats/residue", what="mean over the residues of a peptide"),
        Metric(
            "far_nll", "held-out loss, new proteins", "nats/residue",
            what=f"of proteins that share less than {NEAR:.0%} of their words of four residues with any trained on",
        ),
    )  # fmt: skip
    references: ClassVar[tuple[str, ...]] = ("continued",)

    dim: int = 128
    room: int = 500
    length: int = 15
    tried: int = 4

    def masked(self, read: nn.Module, top: int) -> nn.Module:
        """A model that fills in masks: ``read(tokens [B, T], mask) -> [B, T, VOCABULARY]``; see :class:`Masked`."""
        return Masked(read, top)

    def said_of(self, sample: Sample, log_probs: Sequence[float]) -> Binders:
        """What is said of the peptide of a sample, by the logarithms of the probabilities of its residues."""
        return Binders(peptide=sample.target, log_probs=tuple(log_probs))

    def around(self, blocks: Sequence[nn.Module]) -> nn.Module:
        return Masked(MaskedResidues(blocks, self.dim))

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
            found if sample.about["near"] < NEAR else {"nll": found["nll"]}
            for sample, found in zip(samples, each, strict=True)
        ]

    def truth(self, sample: Sample) -> Binders:
        return Binders(peptide=sample.target, log_probs=(0.0,) * len(sample.target))

    def pictures(self, samples: Sequence[Sample], said: Sequence[Binders]) -> Sequence[Picture]:
        """The loss of each peptide, by how near its protein is to one that was trained on."""
        edges = (0.0, 0.1, NEAR, 0.6, 0.9)
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
