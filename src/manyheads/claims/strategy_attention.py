# SPDX-License-Identifier: Apache-2.0
"""Does a model that attends less to its instruction follow it less, turn by turn, and does moving it back help?

Small Llamas of ours learn dialogues of one to four turns with the instruction in front (standard) or next to the last
message (c1_hf), and are judged on up to twenty; c1_hl is a layout that they never saw. The lift, and two tokens of
noise that stand beside the instruction, tell attention to it from the length of the dialogue and from its place.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, above, higher, lower
from ..tasks.lenses.style_dialogue import StyleDialogue

FEW, MANY = {"turns": 1}, {"turns": 20}

claim = Claim(
    slug="strategy_attention",
    tier="proxy",
    statement=(
        "As a dialogue grows, accuracy in following the instruction in front of it falls together with SRA (rank "
        "correlation over turns above 0.7), and the instruction moved next to the last message raises both."
    ),
    reported=Reported(
        value="accuracy and log SRA: standard .594 and -6.92, c1_hl .821 and -6.08, c1_hf .811 and -5.76; Pearson "
        "correlation of SRA with being right .94 (Llama-2) and .8 (Llama-3)",
        setting="Llama-3-8B, emotional-support dialogues with a strategy to follow",
        where="table of accuracy and SRA by layout; figure of SRA by turns",
    ),
    experiment=Experiment(
        subject="trainable", baseline=Arm("standard"), equal="steps",
        arms=tuple(Arm(form, options={"form": form}) for form in ("c1_hf", "c1_hl")),
        tasks=(StyleDialogue(),),
        sizes=Sizes(
            quick={"steps": 200, "words": 3, "turns": (1, 4, 12, 20), "dialogues": 32},
            cuda={"dim": 256, "layers": 4, "steps": 2000, "batch": 128, "words": 10, "dialogues": 512},
        ),
    ),
    checks=(
        above("accuracy", "standard", 0.9, where=FEW),  # it has learned to follow an instruction; guessing gives 1/15
        lower("accuracy", "standard", than="standard", where=MANY, than_where=FEW),
        above("goes_with_accuracy", "standard", 0.7, where={"of": "sra"}),  # below the least that the paper finds
        higher("accuracy", "c1_hf", than="standard", where=MANY),
        higher("sra", "c1_hf", than="standard", where=MANY),
    ),
    caveat="Models of ours and dialogues of tokens; no published model follows strategies, which need a judge to read.",
)  # fmt: skip
