# SPDX-License-Identifier: Apache-2.0
"""Does a learned gain and offset on the phase, per head and plane, make a better language model than RoPE?

Byte language models of one size, trained from scratch on WikiText-2 and judged on the last bytes of stretches of
articles that none has seen, at the trained length and at twice that. Arms: RoPE; ComplexFormer started at RoPE
(delta = 1) and as the released code starts it (delta normal); and RoPE with a learned factor on every frequency, which
is the cheaper way to give heads positions of their own. What the phases cost in training is reported. The paper was
withdrawn and gives no figure that we could find.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, lower, no_worse
from manyheads.tasks.training.byte_lm import ByteLM
from manyheads.tasks.training.mixer_speed import MixerSpeed

ROPE = Arm("rope", "softmax")
ONE, NORMAL, LEARNED = "complexformer", "complexformer, start normal", "rope, learned frequencies"
ARMS = (
    ROPE,
    Arm(ONE, "complexformer"),
    Arm(NORMAL, "complexformer:start=normal"),
    Arm(LEARNED, "softmax:learned=true"),
)
# What twice the trained length may cost, nats: no figure of the paper's is at hand; a hundredth of a nat is what seeds
# of one arm differ by.
MARGIN = 0.01

claim = Claim(
    slug="complexformer",
    statement=(
        "With the same parameters and training, ComplexFormer has a lower loss than RoPE at the trained length and no "
        "higher one at twice that."
    ),
    tier="scaled",
    reported=Reported(
        value="Lower generation perplexity and better long-context coherence than RoPE; no figure was found.",
        setting="not known; the paper has been withdrawn",
        where="arXiv 2505.10222, abstract",
    ),
    experiment=Experiment(
        subject="trainable", arms=ARMS, baseline=ROPE, equal="parameters",
        tasks=(ByteLM(text="wikitext", times=(1, 2), judged=32), MixerSpeed(times=(1, 4), only=("rope", ONE))),
        sizes=Sizes(
            quick={"steps": 60, "rates": (4e-3,), "parameters": 170_000, "mixer_speed.parameters": 0},
            cpu={
                "steps": 240, "tune_steps": 60, "samples": 192, "parameters": 170_000, "mixer_speed.parameters": 0,
            },
            cuda={
                "seeds": 8, "length": 256, "batch": 64, "dim": 256, "heads": 4, "steps": 500, "tune_steps": 150,
                "rates": (1e-3, 3e-3), "samples": 384, "judged": 128, "tokens": 65_536, "parameters": 2_500_000,
                "mixer_speed.parameters": 0,
            },
        ),
    ),
    checks=(
        lower("token_nll", ONE, than="rope", where={"times": 1}),
        no_worse("token_nll", ONE, than="rope", where={"times": 2}, margin=MARGIN, better="lower"),
        lower("token_nll", NORMAL, than="rope", where={"times": 1}),
        no_worse("token_nll", NORMAL, than="rope", where={"times": 2}, margin=MARGIN, better="lower"),
        lower("token_nll", ONE, than=LEARNED, where={"times": 1}),
    ),
    report=("token_time", "tuning_nll"),
    caveat=(
        'The auxiliary "PCL" loss is left out: neither the abstract nor the released attention describes it, and the '
        "paper itself has been withdrawn. At CPU size the models are hardly trained: read the run on a GPU."
    ),
)  # fmt: skip
