# SPDX-License-Identifier: Apache-2.0
"""What does distillation make of a pruned model, in as many steps for every way to prune and to train?

A model cut to eight tenths of its parameters is trained for the same number of steps: by the teacher's predictions, the
teacher corrected on the text first (a fifth of the steps) or not, or by the text alone. Beside it: the same sizes cut
otherwise and distilled, and the model cut and left alone. On a GPU the model is SmolLM2-135M and the text WikiText, on
a CPU the shipped model of 19 million parameters and Python's standard library.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, lower
from ...experiment.subjects import Convertible
from ...tasks.text.converted_loss import ConvertedLoss

KEEP, SCORES = 0.8, ("random", "magnitude", "wanda")
TRAINED = {"recover": True}
BASE, CUT = Arm("the whole model"), "minitron, untrained"
MINITRON, PLAIN, TEXT, DEPTH = "minitron", "teacher not corrected", "trained on the text alone", "minitron, layers"
ARMS = (
    Arm(CUT, f"minitron:keep={KEEP}"),
    Arm(MINITRON, f"minitron:keep={KEEP}", options=TRAINED),
    Arm(PLAIN, f"minitron:keep={KEEP},correct=0", options=TRAINED),
    Arm(TEXT, f"minitron:keep={KEEP},loss=nll", options=TRAINED),
    Arm(DEPTH, f"minitron:keep={KEEP},axis=layers", options=TRAINED),
    *(
        Arm(
            score, f"structured_pruning:keep={KEEP},score={score}",
            options=TRAINED | ({"seeded": True} if score == "random" else {}),
        )
        for score in SCORES
    ),
)  # fmt: skip

claim = Claim(
    slug="minitron.recovery",
    tier="proxy",
    statement=(
        "After as many steps of training a model pruned by activations and distilled from a corrected teacher has a "
        "lower loss than one pruned otherwise, one trained on the text alone, one whose teacher was not corrected, and "
        "one pruned in depth."
    ),
    reported=Reported(
        value="Teacher correction lowers the student's validation loss by over 6 %; distillation beats training on the "
        "text at equal tokens; MMLU 60.5 (width) and 58.7 (depth)",
        setting="Llama-3.1-8B to 4B on 94 billion tokens, Mistral-NeMo-12B to 8B on 380 billion",
        where="Minitron, arXiv 2408.11796, Table 1, Figures 3 and 5; section 4",
    ),
    experiment=Experiment(
        subject=Convertible("smollm2-135m-instruct", dtype="float32"), arms=ARMS, baseline=BASE, equal="steps",
        tasks=(ConvertedLoss(),),
        sizes=Sizes(
            quick={
                "subject": Convertible("default"), "text": "code", "length": 32, "windows": 2, "sequences": 2,
                "steps": 2,
            },
            cpu={
                "subject": Convertible("default"), "text": "code", "length": 64, "windows": 48, "sequences": 16,
                "steps": 10,
            },
            cuda={"length": 512, "windows": 64, "sequences": 64, "steps": 100},
        ),
    ),
    checks=(
        lower("token_nll", MINITRON, than=CUT),
        *(lower("token_nll", PLAIN, than=score) for score in SCORES),
        lower("token_nll", MINITRON, than=PLAIN),
        lower("token_nll", PLAIN, than=TEXT),
        lower("token_nll", MINITRON, than=DEPTH),
    ),
    caveat=(
        "Steps, not billions of tokens: what is seen is the beginning of a recovery. A model of that size from scratch "
        "is no rival in so few steps and is left out. The correction takes a fifth of the steps, which the student "
        "then has fewer of."
    ),
)  # fmt: skip
