# SPDX-License-Identifier: Apache-2.0
"""Can made-up answers be told by uncertainty and attention, and do the bounds and thresholds keep what they promise?

A published chat model answers questions whose answers are known: sums, gaps in articles of Wikipedia, and facts that a
context plants, changes or leaves out. The paper has no experiments; what is checked are the parts of the workflow that
it proposes. The risk of 0.4 was chosen on other questions: of a model of this size two answers of three are wrong.
After the first run, in which a classifier of the heads told wrong answers by far the best, what it might know of the
question alone was taken from it: beside it stands the level, and pairs of one level are judged too.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, above, below, higher, lower
from ..tasks.lenses.abstention import Abstention

ALL, LEVEL = {"kind": "all"}, {"kind": "one level"}
TASK = Abstention()
CHANCE, MARGIN = 0.5, 0.05
CONTROLLED = {"rule": "controlled"}
CHOSEN = {"rule": "chosen", "form": "kl"}

claim = Claim(
    slug="hallucination_risk",
    tier="scaled",
    statement=(
        "Entropy and attention to the source each tell made-up answers from right ones, attention adds to what the "
        "logits say, and thresholds and PAC-Bayes bounds calibrated on a few hundred answers keep their guarantees."
    ),
    reported=Reported(
        value="no figures: definitions, generalisation bounds, and a workflow of uncertainty, an attention check, "
        "verification and abstention",
        setting="theory and survey of large language models",
        where="abstract; the rest could not be read",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", baseline=Arm("entropy"), equal="none",
        arms=tuple(map(Arm, (
            "log-probability", "source mass", "lookback", "uncertainty", "attention", "both", "level", "random",
            "shuffled",
        ))),
        tasks=(TASK,),
        seeds=5,
        sizes=Sizes(
            quick={"subject": "default", "questions": 60, "kinds": ("arithmetic", "facts"), "splits": 10, "draws": 20},
            cpu={"questions": 200},
            cuda={"questions": 280, "splits": 200, "draws": 1000},
        ),
    ),
    checks=(
        *(
            above("auroc", arm, CHANCE, where=ALL, margin=MARGIN)
            for arm in ("entropy", "log-probability", "source mass", "lookback", "attention")
        ),
        *(higher("auroc", "both", than=arm, where=ALL, margin=0.02) for arm in ("entropy", "uncertainty", "level")),
        above("auroc", "attention", CHANCE, where=LEVEL, margin=MARGIN),
        *(higher("auroc", "both", than=arm, where=LEVEL, margin=0.02) for arm in ("entropy", "uncertainty")),
        *(below("auroc", arm, CHANCE + 2 * MARGIN, where=ALL) for arm in ("random", "shuffled")),
        below("answered_risk", "both", TASK.risk),
        above("answered", "both", 0.1),
        higher("answered", "both", than="entropy"),
        above("risk_kept", "both", 1 - TASK.delta, where=CONTROLLED),
        lower("risk_kept", "both", than="both", where={"rule": "plain"}, than_where=CONTROLLED),
        below("false_alarm", "both", TASK.alarm + MARGIN),
        above("bound_holds", "entropy", 1 - TASK.bound_delta, where=CHOSEN),
        lower("bound", "entropy", than="entropy", where=CHOSEN, than_where={"rule": "chosen", "form": "mcallester"}),
    ),
    caveat=(
        "A model of 135 million parameters, one-word answers that code can judge, and the attention of whole answers; "
        "semantic entropy and verification against a knowledge base are left out. The guarantees are checked on "
        "draws from the model's own answers, whose risk is then known."
    ),
)  # fmt: skip
