# SPDX-License-Identifier: Apache-2.0
"""Are blocks that coarse scores choose, with means of blocks for the rest, the better approximation of attention?

all-MiniLM-L6-v2, a published sentence encoder, reads texts of 512 tokens of the Brown corpus with its attention
replaced in every layer, without training: the distance of its embeddings from the exact ones, and whether the order of
similarities stays. Arms at equal numbers of pairs, 2 or 4 of 16 blocks a row: MRA-2 and MRA-2-s; a window of blocks
alone (as sliding-window encoders have) and with the means; random blocks with the means; the means alone, which is a
low-rank map of attention. The n^2 pairs of means that MRA-2 has beside the blocks are 1/1024 of all.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, higher, lower
from manyheads.tasks.text.embedding_fidelity import EmbeddingFidelity

EXACT = Arm("exact")
KINDS = {
    "mra-2": "mra", "mra-2-s": "mra:sparse=true", "window": "mra:sparse=true,choose=band",
    "window + means": "mra:choose=band", "random + means": "mra:choose=random",
}  # fmt: skip
MEANS = Arm("means", "mra:per_row=0")
ARMS = tuple(
    Arm(f"{name}, {m}", f"{spec}{',' if ':' in spec else ':'}per_row={m}")
    for m in (2, 4)
    for name, spec in KINDS.items()
)

claim = Claim(
    slug="mra",
    statement=(
        "In a published encoder, at equal numbers of pairs and without training, MRA-2 is nearer to exact attention "
        "than a window, random blocks, means of blocks, or its own sparse part alone."
    ),
    tier="scaled",
    reported=Reported(
        value="Outperforms most efficient self-attention proposals and is favourable for short and long sequences.",
        setting="RoBERTa at 512 and 4,096 tokens, Long Range Arena, ImageNet",
        where="arXiv 2207.10284, abstract; its tables were not at hand",
    ),
    experiment=Experiment(
        subject="trainable", arms=(EXACT, *ARMS, MEANS), baseline=EXACT, tasks=(EmbeddingFidelity(),),
        sizes=Sizes(
            quick={"samples": 4, "length": 256},
            cpu={"samples": 48},
            cuda={"samples": 256},
        ),
    ),
    checks=(
        lower("embedding_error", "mra-2, 2", than="window, 2"),
        lower("embedding_error", "mra-2, 2", than="window + means, 2"),
        lower("embedding_error", "mra-2, 2", than="random + means, 2"),
        lower("embedding_error", "mra-2, 2", than="mra-2-s, 2"),
        lower("embedding_error", "mra-2, 2", than="means"),
        lower("embedding_error", "mra-2, 4", than="mra-2, 2"),
        lower("embedding_error", "mra-2, 4", than="window + means, 4"),
        lower("embedding_error", "mra-2, 4", than="mra-2-s, 4"),
        higher("agreement", "mra-2, 4", than="window, 4"),
        higher("agreement", "mra-2, 4", than="window + means, 4"),
    ),
    caveat="The paper trains with it and compares with Nystrom, Linformer and others; here nothing is trained.",
)  # fmt: skip
