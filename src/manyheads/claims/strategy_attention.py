# SPDX-License-Identifier: Apache-2.0
"""Does a chat model that attends less to its instruction follow it less, turn by turn, and do other layouts help?

A published chat model reads real dialogues of emotional support under instructions whose following code can tell, in
the system message with the whole history as turns (standard), and at the greatest length with the history in the system
message, before the instruction (c1_hf) or after it (c1_hl). What is followed is told by the likelihood of replies of
one meaning; greedy replies of a model of this size all but never obey beyond the first turn.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, above, higher, lower
from ..tasks.lenses.instructed_replies import InstructedReplies

TURNS = (1, 3, 6)
FORMS = ("c1_hf", "c1_hl")
FEW, MANY = {"turns": TURNS[0]}, {"turns": TURNS[-1]}

claim = Claim(
    slug="strategy_attention",
    tier="scaled",
    statement=(
        "As a dialogue grows, an instruction in front of it is followed less and attended to less, being right goes "
        "with SRA, and the history put into the system message beside the instruction raises both."
    ),
    reported=Reported(
        value="accuracy and log SRA: standard .594 and -6.92, c1_hl .821 and -6.08, c1_hf .811 and -5.76; Pearson "
        "correlation of SRA with being right .94 (Llama-2) and .8 (Llama-3)",
        setting="Llama-3-8B, emotional-support dialogues with a strategy to follow",
        where="table of accuracy and SRA by layout; figure of SRA by turns",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", baseline=Arm("standard"), equal="none",
        arms=tuple(Arm(form, options={"form": form}) for form in FORMS),
        tasks=(InstructedReplies(turns=TURNS),),
        sizes=Sizes(
            quick={"subject": "default", "source": "made", "samples": 2, "reply": 4},
            cpu={"samples": 12},
            cuda={"samples": 24, "reply": 16},
        ),
    ),
    checks=(
        lower("accuracy", "standard", than="standard", where=MANY, than_where=FEW),
        lower("sra", "standard", than="standard", where=MANY, than_where=FEW),
        above("goes_with_accuracy", "standard", 0.0, where={"of": "sra", "over": "all"}),
        *(higher(metric, form, than="standard", where=MANY) for metric in ("accuracy", "sra") for form in FORMS),
    ),
    caveat=(
        "Instructions are four forms of writing, not strategies of support, which need a judge to read; what is "
        "followed is told by likelihoods. SRA falls with length even where attention is uniform: the lift and the "
        "correlation within one length and instruction stand beside it."
    ),
)  # fmt: skip
