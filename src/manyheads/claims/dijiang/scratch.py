# SPDX-License-Identifier: Apache-2.0
"""Are frequency features better than others in a model that is trained from scratch, and do they reach softmax?

Byte language models of one size on WikiText-2: DiJiang's map as the paper has it and as its released code has it,
Performer's random features, elu(x) + 1, and softmax attention, all with rotary positions. Loss is on articles that no
arm has seen.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, lower, no_worse
from manyheads.tasks.training.byte_lm import ByteLM

SOFTMAX = Arm("softmax", "softmax")
PAPER, CODE, FAVOR, ELU = "dijiang", "dijiang, released code", "FAVOR+", "elu + 1"
ARMS = (
    SOFTMAX,
    Arm(PAPER, "dijiang"),
    Arm(CODE, "dijiang:features=dct,decay=true,norm=group"),
    Arm(FAVOR, "dijiang:features=favor"),
    Arm(ELU, "dijiang:features=elu"),
)

claim = Claim(
    slug="dijiang.scratch",
    statement=(
        "Trained from scratch, linear attention over frequency features has a lower loss than over Performer's or "
        "elu(x) + 1, and one not far above that of softmax attention."
    ),
    tier="scaled",
    reported=Reported(
        value="Comparable with the softmax model, and above Performer, cosFormer, Linformer and RetNet",
        setting="Pythia-410M, fine-tuned",
        where="DiJiang, arXiv 2403.19928, table of other linear attention; from scratch the paper reports nothing",
    ),
    experiment=Experiment(
        subject="trainable", arms=ARMS, baseline=SOFTMAX, equal="parameters",
        tasks=(ByteLM(text="wikitext", layers=4, heads=4),),
        sizes=Sizes(
            quick={"steps": 12, "rates": (3e-3,), "samples": 24, "length": 128, "batch": 8, "parameters": 220_000},
            cpu={
                "steps": 120, "tune_steps": 40, "rates": (3e-3, 1e-2), "length": 128, "batch": 8, "seeds": 3,
                "parameters": 220_000,
            },
            cuda={
                "seeds": 5, "steps": 300, "tune_steps": 80, "rates": (1e-3, 3e-3), "samples": 128, "length": 512,
                "batch": 32, "dim": 256, "parameters": 3_300_000,
            },
        ),
    ),
    checks=(
        lower("token_nll", PAPER, than=FAVOR),
        lower("token_nll", PAPER, than=ELU),
        lower("token_nll", CODE, than=FAVOR),
        no_worse("token_nll", PAPER, than="softmax", margin=0.1, better="lower"),
    ),
    report=("tuning_nll", "training_nll"),
    caveat="The paper's claims are of conversion; from scratch is ours, to see the map without what a model knew.",
)  # fmt: skip
