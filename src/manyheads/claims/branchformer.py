# SPDX-License-Identifier: Apache-2.0
"""Are attention and a convolutional gating MLP, side by side, better than either and as good as a Conformer?

Encoders of one number of parameters, trained by CTC on strings of real spoken digits of four speakers, judged on a
fifth. The Conformer and the Transformer are those of libraries; the cgMLP alone is the same block without attention,
and with a kernel of 1 the gate sees no other frame, which leaves attention beside a plain gated MLP. Two models of
learned weights are also judged without the attention of their upper half: one was trained with branch dropout.

Seen before the sizes were set: one Conformer of 87 thousand parameters, trained 500 steps on strings of three, had a
word error rate of 0.16 on the validation speaker. No other model was judged, none on the test speaker. The cuda size
was cut to half its steps, for its time, when the confusions of the CPU's first trainings had been seen, and was given
six seeds after the CPU's run, whose three could not tell most arms apart. Rule and CPU size have stayed as they were.
"""

from typing import Any

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, lower, no_worse
from manyheads.tasks.speech.digit_strings import DigitStrings

CONFORMER = Arm("conformer", options={"reference": "conformer"})
TRANSFORMER = Arm("transformer", options={"reference": "transformer"})
MARGIN = 0.03  # errors a word that a rival may be ahead


def arms(upper: str) -> tuple[Arm, ...]:
    """All arms; ``upper`` are the layers whose attention is left out."""
    specs = {
        "concat": "", "learned": ":merge=learned", "fixed": ":merge=fixed", "cgMLP alone": ":merge=fixed,share=1",
        "no convolution": ":kernel=1", "additive": ":attention=additive", "dropped": ":merge=learned,drop=0.3",
    }  # fmt: skip
    halves = {"learned, half": ("learned", ":merge=learned"), "dropped, half": ("dropped", ":merge=learned,drop=0.3")}
    return (
        TRANSFORMER, *(Arm(name, f"branchformer{fields}") for name, fields in specs.items()),
        *(Arm(name, f"branchformer{fields},skip={upper}", options={"weights_of": whole})
          for name, (whole, fields) in halves.items()),
    )  # fmt: skip


SMALL: dict[str, Any] = {"layers": 2, "heads": 2, "digits": 2}
SHOWN = ("fixed", "additive")  # arms that no check names; the smaller run goes without them

claim = Claim(
    slug="branchformer",
    statement=(
        "Attention and a cgMLP side by side recognise speech better than a Transformer and than the cgMLP alone and as "
        "well as a Conformer; learned weights do as well as concatenation; with branch dropout one model can be used "
        "with less attention."
    ),
    tier="proxy",
    reported=Reported(
        value="CER of AISHELL dev and test: Branchformer 4.1 and 4.4, Conformer 4.3 and 4.6.",
        setting="24 and 12 layers, 45.4 and 46.3 million parameters, joint CTC and attention, without language model",
        where="arXiv 2207.02971, abstract, for the claim; figures from the authors' recipe (ESPnet pull request 4833)",
    ),
    experiment=Experiment(
        subject="trainable", arms=arms("3-5"), baseline=CONFORMER, equal="parameters", tasks=(DigitStrings(),), seeds=3,
        sizes=Sizes(
            quick={
                **SMALL, "dim": 16, "batch": 4, "steps": 3, "rates": (3e-3,), "samples_judged": 8, "arms": arms("1"),
            },
            cpu={
                **SMALL, "dim": 32, "batch": 8, "steps": 600, "rates": (4e-3,),
                "arms": tuple(arm for arm in arms("1") if arm.name not in SHOWN),
            },
            cuda={
                "dim": 192, "layers": 6, "heads": 4, "batch": 48, "steps": 600, "rates": (1e-3, 2e-3), "digits": 5,
                "seeds": 6,
            },
        ),
    ),
    checks=(
        lower("wer", "concat", than="transformer"),
        lower("wer", "concat", than="cgMLP alone"),
        no_worse("wer", "concat", than="conformer", margin=MARGIN, better="lower"),
        no_worse("wer", "learned", than="concat", margin=MARGIN, better="lower"),
        lower("wer", "dropped, half", than="learned, half"),
        lower("wer", "concat", than="no convolution"),
    ),
    report=("wer", "ctc_nll", "exact", "parameters"),
    caveat="Digits of one unseen speaker, put together from single recordings; CTC alone, without a decoder.",
)  # fmt: skip
