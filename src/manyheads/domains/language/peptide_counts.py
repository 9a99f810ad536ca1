# SPDX-License-Identifier: Apache-2.0
"""Peptides by counts of amino acids, which every trained model has to beat.

Of all peptides of the training part, or for six parts in ten of these and for four of the peptides of the ten proteins
that share the most words of four residues with the target (Jaccard).
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...data.proteins import ALPHABET, likeness
from ...errors import UserError
from ...recipe import Procedure

if TYPE_CHECKING:
    import numpy as np

__all__ = ["PeptideCounts"]

_NEAREST, _OF_THEM = 10, 0.4  # proteins, and the weight of their peptides


@dataclass(frozen=True, kw_only=True)
class PeptideCounts(Procedure):
    """How often amino acids are met in peptides.

    Attributes:
        of: ``all`` peptides, or ``near``: also those of proteins that are like the target.
    """

    task: ClassVar[str] = "peptide_binders"

    of: Literal["all", "near"] = field(
        default="near", metadata={"help": "peptides that are counted: all, or more of those of proteins alike"}
    )

    def run(self, task: Any, rng: "np.random.Generator") -> Iterable[tuple[str, str, float]]:
        if not hasattr(task, "said_of"):
            raise UserError(f"peptide_counts: {task.name} has no peptides: give --task peptide_binders")
        trained, samples = task.samples("train"), task.judged("test")
        overall = _shares("".join(sample.target for sample in trained), 1.0)
        proteins = sorted({sample.inputs[0] for sample in trained})
        bound = dict.fromkeys(proteins, "")
        for sample in trained:
            bound[sample.inputs[0]] += sample.target
        alike: Any = [{}] * len(samples)
        if self.of == "near":
            alike = likeness((sample.inputs[0] for sample in samples), proteins)
        said = []
        for sample, near in zip(samples, alike, strict=True):
            first = sorted(near, key=lambda i: (-near[i], i))[:_NEAREST]
            shares = overall
            if first:
                own = _shares("".join(bound[proteins[i]] for i in first), 0.0)
                shares = {a: (1 - _OF_THEM) * overall[a] + _OF_THEM * own[a] for a in ALPHABET}
            said.append(task.said_of(sample, [math.log(shares[letter]) for letter in sample.target]))
        return self.scored(task, samples, said)


def _shares(letters: str, more: float) -> dict[str, float]:
    """Share of each letter of the alphabet, each counted ``more`` times beside."""
    counts = Counter(letters)
    return {a: (counts[a] + more) / (len(letters) + more * len(ALPHABET)) for a in ALPHABET}
