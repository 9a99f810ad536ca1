# SPDX-License-Identifier: Apache-2.0
"""Does the confidence of a translation, read off its cross-attention, tell how good the translation is?

A small translation model is trained here on Multi30k, German to English, and translates the test set of 2016. Quality
is chrF with the reference. Beside the confidence stand the log-probability of the translation, its length, the
confidence of attention at random source tokens, and the confidence less each of its parts. Of the two uses in the paper
filtering keeps the better half, and the hybrid takes one of the translations of two systems, of which the weaker is the
same model halfway through its training.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, above, higher, no_worse
from ..tasks.lenses.translated_sentences import TranslatedSentences

SPEC = "attention_confidence"
CHANCE = Arm("chance", options={"score": "chance"})
PARTS = ("CDP", "AP_in", "AP_out")
WITHOUT = tuple(Arm(f"without {part}", SPEC, options={"without": part}) for part in PARTS)
ARMS = (
    Arm("confidence", SPEC), Arm("confidence, w 2", f"{SPEC}:w=2"), *WITHOUT,
    Arm("shuffled", SPEC, options={"shuffled": True}), Arm("log-probability", options={"score": "likelihood"}),
    Arm("shortness", options={"score": "length"}), Arm("later system", options={"score": "later"}),
)  # fmt: skip
TRANSLATES = above(
    "chrf_gain", "chance", 10.0
)  # points of chrF above what another caption has; else it has not learned

claim = Claim(
    slug="attention_confidence",
    tier="proxy",
    statement=(
        "The confidence goes with the quality of a translation, also at equal length; the half of the translations "
        "that it keeps is better than a random half, and of two systems' translations it takes the better ones."
    ),
    reported=Reported(
        value="filtering a back-translated corpus up to +2.22 BLEU, the hybrid of two systems up to +0.99 BLEU; the "
        "correlation with human judgement is weak",
        setting="recurrent models with attention (Nematus, Neural Monkey), English to and from German and Latvian",
        where="abstract",
    ),
    experiment=Experiment(
        subject="trainable", baseline=CHANCE, arms=ARMS, equal="none", tasks=(TranslatedSentences(),),
        sizes=Sizes(
            quick={
                "corpus": "made", "vocab": 400, "dim": 32, "layers": 2, "batch": 32, "steps": 60, "samples": 24,
                "seeds": 1,
            },
            cpu={"seeds": 1, "vocab": 3000, "dim": 128, "layers": 2, "batch": 64, "steps": 1400, "lr": 4e-3,
                 "samples": 500},
            cuda={},
        ),
    ),
    checks=(
        TRANSLATES,
        # A tenth is what is called a small correlation; the paper has a weak one.
        above("goes_with_quality", "confidence", 0.1, given=TRANSLATES),
        above("beyond_length", "confidence", 0.0, given=TRANSLATES),
        *(
            higher("goes_with_quality", "confidence", than=other, given=TRANSLATES)
            for other in ("shuffled", "shortness")
        ),
        *(
            no_worse("goes_with_quality", "confidence", than=arm.name, margin=0.02, better="higher", given=TRANSLATES)
            for arm in WITHOUT
        ),
        higher("kept_quality", "confidence", than="chance", given=TRANSLATES),
        # A point of chrF: half of what filtering is worth in the paper.
        no_worse("kept_quality", "confidence", than="log-probability", margin=1.0, better="higher", given=TRANSLATES),
        *(
            higher("hybrid_quality", "confidence", than=other, given=TRANSLATES)
            for other in ("chance", "later system")
        ),
    ),
    caveat=(
        "A Transformer of a few million parameters on captions stands for recurrent models of news; quality is chrF, "
        "not human judgement; filtering is judged by what is kept, not by a model trained on it."
    ),
)  # fmt: skip
