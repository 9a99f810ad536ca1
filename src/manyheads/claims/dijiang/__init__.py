# SPDX-License-Identifier: Apache-2.0
"""Does a trained model whose attention is made linear recover better with frequency features than with others?

Attention of a trained model is replaced by linear attention over a feature map, everything else stays, and all is
trained for the same number of steps on text: DiJiang's map as the paper has it (``wdct``), its released code (``dct``,
decay, GroupNorm and a gate), Performer's random features (FAVOR+), and elu(x) + 1. Judged is the loss on text that was
held out; the model before is the baseline. On a GPU it is SmolLM2-135M on WikiText, on a CPU the shipped model of 19
million parameters on Python's standard library.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, lower, no_worse
from ...experiment.subjects import Convertible
from ...tasks.text.converted_loss import ConvertedLoss

LR = 1e-3
TRAINED = {"recover": True}
BASE, CUT = Arm("softmax, as trained"), "dijiang, untrained"
PAPER, CODE, FAVOR, ELU = "dijiang", "dijiang, released code", "FAVOR+", "elu + 1"
SPECS = {PAPER: "", CODE: ",features=dct,decay=true,norm=group", FAVOR: ",features=favor", ELU: ",features=elu"}
ARMS = (
    Arm(CUT, "dijiang"),
    *(Arm(name, f"dijiang:lr={LR}{more}", options=TRAINED) for name, more in SPECS.items()),
)  # fmt: skip

claim = Claim(
    slug="dijiang",
    tier="proxy",
    statement=(
        "After as many steps of training a model made linear by frequency features has a lower loss than one made "
        "linear by Performer's or by elu(x) + 1, and one not far above the softmax model's."
    ),
    reported=Reported(
        value="Pythia-410M: mean accuracy 0.4567 (softmax model 0.454), Performer 0.4183, cosFormer 0.4047, RetNet "
        "0.3843 at the same budget; a sixteenth of the training",
        setting="Pythia 70M to 2.8B and LLaMA2-7B, fine-tuned on 40 billion tokens",
        where="DiJiang, arXiv 2403.19928, abstract; tables of Pythia and of other linear attention",
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
                "subject": Convertible("default"), "text": "code", "length": 64, "windows": 48, "sequences": 2,
                "steps": 30, "seeds": 2,
            },
            cuda={"length": 512, "windows": 64, "sequences": 2, "steps": 250},
        ),
    ),
    checks=(
        lower("token_nll", PAPER, than=CUT),
        lower("token_nll", PAPER, than=FAVOR),
        lower("token_nll", PAPER, than=ELU),
        lower("token_nll", CODE, than=FAVOR),
        no_worse("token_nll", PAPER, than=BASE.name, margin=0.1, better="lower"),
    ),
    caveat=(
        "Thousands of tokens, not billions: what is seen is the beginning of a recovery, in which a module that was "
        "not there before, the gate and norm of the released code, counts against it. FAVOR+ and elu + 1 have the "
        "denominator and projections of DiJiang, and differ from it in the map alone."
    ),
)  # fmt: skip
