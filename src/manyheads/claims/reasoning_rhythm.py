# SPDX-License-Identifier: Apache-2.0
"""Does WAAD mark where a model plans, and FAI what it comes back to, in a language where both are known, and in text?

Small Llamas of ours learn a language of phrases: WAAD should be high in rows that generate the head of a phrase, and
the tenth of the tokens with the greatest FAI should hold the values that are looked up later. Beside them stand the
entropy of the prediction, and as many tokens drawn blindly. In a published model on WikiText predictions at peaks of
WAAD should be less sure, and peaks of FAI come at or soon after them. The credit for RL is not trained with here.
"""

import math

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, above, below, higher
from ..tasks.lenses.peaks_in_text import PeaksInText
from ..tasks.lenses.phrase_language import PhraseLanguage

BLIND = Arm("blind draws")
VALUES = 16  # that may be looked up

claim = Claim(
    slug="reasoning_rhythm",
    tier="proxy",
    statement=(
        "In a language of phrases WAAD marks the rows that generate the head of a phrase (AUROC above 0.8) and FAI "
        "finds definitions that are looked up later more often than chance; in a language model predictions at peaks "
        "of WAAD have more entropy than others, and peaks of FAI follow them more often than other tokens do."
    ),
    reported=Reported(
        value="entropy 0.361 at peaks of WAAD against 0.239 at random tokens; peaks of FAI follow those of WAAD in "
        "52.5 % against 36.9 %; with coupled credit Qwen3-8B gains 3.8 points on average over GRPO (39.4 to 43.2)",
        setting="Qwen3 on its own reasoning traces",
        where="analysis of WAAD and FAI, its tables of entropy and of coupling; table of RL results",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", baseline=BLIND, equal="none",
        arms=tuple(Arm(name, options={"score": name.lower()}) for name in ("WAAD", "FAI", "entropy")),
        tasks=(PhraseLanguage(), PeaksInText()),
        sizes=Sizes(
            quick={
                "subject": "default", "text": "code", "steps": 60, "dim": 64, "sequences": 32, "windows_of": 4,
                "tokens": 192,
            },
            cpu={"windows_of": 24, "tokens": 384},
            cuda={
                "dim": 256, "layers": 4, "steps": 3000, "batch": 64, "sequences": 512, "windows_of": 128,
                "tokens": 1024,
            },
        ),
    ),
    checks=(
        below("lookup_loss", "blind draws", math.log(VALUES) / 2),  # it has learned to look up: half of guessing
        above("head_auroc", "WAAD", 0.8),
        higher("definitions_found", "FAI", than="blind draws"),
        higher("peak_entropy", "WAAD", than="blind draws"),
        higher("follows_waad", "FAI", than="blind draws"),
    ),
    caveat="The language and its models are ours; the published model reads text, and writes no reasoning of its own.",
)  # fmt: skip
