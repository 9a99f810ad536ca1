# SPDX-License-Identifier: Apache-2.0
"""Is a model cut by AMP ahead after adapters have been trained for as many steps?

A model without three tenths of its parameters, the paper's ratio, is trained on text by adapters of rank 8. Beside AMP
stand other scores for the same numbers of heads and neurons, and layers left out. On a GPU the model is SmolLM2-135M
and the text WikiText, on a CPU the shipped model of 19 million parameters and Python's standard library.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, lower
from ...experiment.subjects import Convertible
from ...tasks.text.converted_loss import ConvertedLoss

ADAPTERS = "loss=nll,rank=8"  # as AMP is trained
KEEP, SCORES = 0.7, ("random", "magnitude", "wanda", "taylor")
CUT, AMP, DEPTH, TRAINED = "amp, untrained", "amp", "layers", {"recover": True}
ARMS = (
    Arm(CUT, f"amp:keep={KEEP}"),
    Arm(AMP, f"amp:keep={KEEP}", options=TRAINED),
    Arm(DEPTH, f"minitron:keep={KEEP},axis=layers,correct=0,{ADAPTERS}", options=TRAINED),
    *(
        Arm(
            score, f"structured_pruning:keep={KEEP},axis=heads_neurons,score={score},{ADAPTERS}",
            options=TRAINED | ({"seeded": True} if score == "random" else {}),
        )
        for score in SCORES
    ),
)  # fmt: skip

claim = Claim(
    slug="amp.recovery",
    tier="proxy",
    statement=(
        "Without three tenths of its parameters, and trained by adapters for as many steps, a language model cut by "
        "AMP has a lower loss than one cut by other scores, or of which layers were left out."
    ),
    reported=Reported(
        value="Average of five commonsense tasks up to 1.49 points above the best method before, at 30 % fewer "
        "parameters (ARC-c 44.2, ARC-e 68.2, WinoGrande 61.6, PIQA 76.4)",
        setting="LLaMA-2-7B and Phi, two epochs of LoRA of rank 8 on Alpaca",
        where="AMP, arXiv 2504.21174, abstract and results on LLaMA-2-7B",
    ),
    experiment=Experiment(
        subject=Convertible("smollm2-135m-instruct", dtype="float32"), arms=ARMS, baseline=Arm("the whole model"),
        equal="steps", tasks=(ConvertedLoss(),),
        sizes=Sizes(
            quick={
                "subject": Convertible("default"), "text": "code", "length": 32, "windows": 2, "sequences": 2,
                "steps": 2,
            },
            cpu={
                "subject": Convertible("default"), "text": "code", "length": 64, "windows": 48, "sequences": 16,
                "steps": 20,
            },
            cuda={"length": 512, "windows": 64, "sequences": 64, "steps": 150},
        ),
    ),
    checks=(lower("token_nll", AMP, than=CUT), *(lower("token_nll", AMP, than=rival) for rival in (*SCORES, DEPTH))),
    caveat="Steps, not epochs of Alpaca: what is seen is the beginning of a recovery, in loss and not in answers.",
)  # fmt: skip
