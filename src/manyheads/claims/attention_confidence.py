# SPDX-License-Identifier: Apache-2.0
"""Does the confidence of a translation, read off its cross-attention, tell how good the translation is?

A small translation model is trained here on Multi30k, German to English, and translates the test set of 2016. Quality
is chrF with the reference. Beside the confidence stand the log-probability of the translation, its length, the
confidence of attention at random source tokens, and the confidence less each of its parts. Of the two uses in the paper
filtering keeps the better half, and the hybrid takes one of the translations of two systems, of which the weaker is the
same model halfway through its training. The second subject is published: Whisper transcribes digits in noise.
"""

from ..experiment import Arm, Check, Claim, Experiment, Reported, Sizes, above, higher, no_worse
from ..tasks.lenses.spoken_digits import SpokenDigits
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
TEXT, SPEECH = "translated_sentences", "spoken_digits"
# Ten points of chrF above what another caption has: else it has not learned to translate, and nothing can be told.
TRANSLATES = above("chrf_gain", "chance", 10.0)


def of_both(task: str, given: Check | None = None) -> tuple[Check, ...]:
    """What is claimed of any encoder-decoder: the confidence goes with quality, and with more than length."""
    name = f"{task}.goes_with_quality"
    return (
        above(name, "confidence", 0.1, given=given),  # a small correlation; the paper calls its own weak
        above(f"{task}.beyond_length", "confidence", 0.0, given=given),
        *(higher(name, "confidence", than=other, given=given) for other in ("shuffled", "shortness")),
        higher(f"{task}.kept_quality", "confidence", than="chance", given=given),
    )


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
        subject="trainable", baseline=CHANCE, arms=ARMS, equal="none", tasks=(TranslatedSentences(), SpokenDigits()),
        sizes=Sizes(
            quick={
                "seeds": 1, "corpus": "made", "vocab": 400, "dim": 64, "layers": 2, "batch": 32, "steps": 200,
                f"{TEXT}.samples": 24, f"{SPEECH}.samples": 4,
            },
            cpu={
                "seeds": 1, "vocab": 3000, "dim": 128, "layers": 2, "batch": 64, "steps": 1200, "lr": 4e-3,
                f"{TEXT}.samples": 500,
            },
            cuda={f"{SPEECH}.samples": 200},
        ),
    ),
    checks=(
        TRANSLATES,
        *of_both(TEXT, TRANSLATES),
        *(
            no_worse(f"{TEXT}.goes_with_quality", "confidence", than=arm.name, margin=0.02, better="higher",
                     given=TRANSLATES)
            for arm in WITHOUT
        ),
        # A point of chrF: half of what filtering is worth in the paper.
        no_worse(f"{TEXT}.kept_quality", "confidence", than="log-probability", margin=1.0, better="higher",
                 given=TRANSLATES),
        *(higher("hybrid_quality", "confidence", than=other, given=TRANSLATES) for other in ("chance", "later system")),
        *of_both(SPEECH),
    ),
    caveat=(
        "A Transformer of a few million parameters on captions stands for recurrent models of news; quality is chrF, "
        "not human judgement; filtering is judged by what is kept, not by a model trained on it."
    ),
)  # fmt: skip
