# SPDX-License-Identifier: Apache-2.0
"""Does a protein language model that fills in masked peptides behind a protein learn which peptides bind it?

The paper's own test pairs, more than half of whose proteins are like one that is trained on; "new" are the others.
"with another protein" is the same weights, each peptide behind the protein of another one: what the model has learned
of proteins is what it loses by that. Counts of amino acids need no network. ESM-2's 650 million parameters and what
they have learned before are not here; "after proteins" learns proteins alone for as many steps before.

Sizes, arms and checks were set before the first run; of the CPU's size it was known that a step takes half a second
on a busy machine. The tier was "scaled" in that run; a small encoder stands in for ESM-2, so that it is a proxy.
"""

from typing import Any

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, lower, no_worse
from manyheads.tasks.language.peptide_binders import PeptideBinders

OWN, LEARNED = "PepMLM", "after proteins"
OTHER = Arm("with another protein", "pepmlm:receptor=other", options={"weights_of": OWN})
CONTINUED = Arm("left to right", options={"reference": "continued"})
ARMS = (
    Arm(OWN, "pepmlm"), OTHER, Arm("no protein", "pepmlm:receptor=none"),
    Arm("masks anywhere", "pepmlm:masks=anywhere"), Arm("counts", "peptide_counts:of=all"),
    Arm("counts, near proteins", "peptide_counts"), Arm(LEARNED, "pepmlm:before=1"),
)  # fmt: skip
MARGIN = 0.02  # nats a residue that a rival may be ahead
SMALL: dict[str, Any] = {"samples_judged": 203}

claim = Claim(
    slug="pepmlm",
    statement=(
        "A model that fills in a fully masked peptide behind a protein finds known binders likelier with their own "
        "protein than with another one, than a model without proteins, than counts of amino acids, and than masks "
        "anywhere; it is no worse than writing them from left to right."
    ),
    tier="proxy",
    reported=Reported(
        value=(
            "Perplexities of known binders of 203 proteins: median 9.3 (2.2 nats a residue), of generated ones 3.4; "
            "38 % of these hits by AlphaFold against 29 % of RFdiffusion's, from memory."
        ),
        setting="ESM-2 650M, PepNN and Propedia, each residue masked by itself",
        where="arXiv 2310.03842, abstract; perplexities as the authors' repository has them",
    ),
    experiment=Experiment(
        subject="trainable", arms=ARMS, baseline=CONTINUED, equal="parameters", seeds=2,
        tasks=(PeptideBinders(),),
        sizes=Sizes(
            quick={
                **SMALL, "dim": 16, "layers": 1, "heads": 2, "batch": 4, "steps": 3, "rates": (3e-3,), "room": 60,
                "samples_judged": 8, "seeds": 1,
            },
            cpu={
                **SMALL, "dim": 64, "layers": 2, "heads": 4, "batch": 16, "steps": 100, "rates": (2e-3,), "room": 256,
            },
            cuda={
                **SMALL, "dim": 256, "layers": 6, "heads": 8, "batch": 64, "steps": 600, "rates": (3e-4, 1e-3),
            },
        ),
    ),
    checks=(
        lower("nll", OWN, than=OTHER.name),
        lower("far_nll", OWN, than=OTHER.name),
        *(lower("nll", OWN, than=name) for name in ("no protein", "masks anywhere", "counts", "counts, near proteins")),
        no_worse("nll", OWN, than=CONTINUED.name, margin=MARGIN, better="lower"),
        lower("nll", LEARNED, than=OWN),
    ),
    report=("nll", "far_nll", "parameters"),
    caveat=(
        "Small encoders from scratch on 2,700 pairs: what ESM-2 knows of proteins is missing. Losses are of whole "
        "masked peptides, which is harder than the paper's perplexity of one residue at a time. Nothing is folded."
    ),
)  # fmt: skip
