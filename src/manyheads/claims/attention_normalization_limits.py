# SPDX-License-Identifier: Apache-2.0
"""What can softmax not tell apart among many keys, are its bounds bounds, and do other normalizers do better?

A published decoder and all-MiniLM-L6-v2 read prose, and rows of their attention are measured by the keys they see;
other normalizers weigh the same logits, and stand in for softmax without training. Decoders with ALiBi, so that
positions are not what fails on long texts, are trained with each on WikiText-2 with pairs to recall.

Margins, from the paper's words and before any full run. "Collapses": less than half, and a quarter of the keys leaves
out less than a twentieth. "1 / T": at a quarter of the temperature twice the norm, where theory has four times.
"""

from typing import Any

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, above, below, higher, lower, no_worse
from ..tasks.lenses.normalization_measures import SHARE, NormalizationMeasures
from ..tasks.text.perplexity import Perplexity
from ..tasks.training.recall_in_text import RecallInText

SLUG = "attention_normalization_limits"
SOFTMAX, SSMAX, ENTMAX, TOP = "softmax", "ssmax", "entmax-1.5", "top-k"
OTHERS, NLL = (SSMAX, ENTMAX, TOP), "recall_in_text.token_nll"


def arms(k: int) -> tuple[Arm, ...]:
    """A normalizer each; ``k`` keys are kept by top-k."""
    specs = {SOFTMAX: "softmax", SSMAX: "ssmax", ENTMAX: "entmax15", TOP: f"topk,k={k}"}
    return tuple(Arm(name, f"{SLUG}:normalizer={spec},position=alibi") for name, spec in specs.items())


MEASURES, READER = "normalization_measures", "minilm"
MOST, FEWEST, LONG = {"keys": "most"}, {"keys": "fewest"}, {"times": 8}
SHARED, ONE, QUARTER = ({"selected": n, **MOST} for n in (SHARE, "1", "L/4"))
SIXTEEN, SPREAD = {"selected": "16", **MOST}, {"selected": f"{SHARE} spread", **MOST}
LEARNED, LOSS = 0.6, 0.02  # values recalled by softmax before others' recall says something; nats/byte
TRAINING: Any = {"layers": 2, "heads": 4, "asked": 5, "weight": 6.0, "times": (1, 4, 8)}

claim = Claim(
    slug=SLUG,
    statement=(
        "What the top N of a softmax row leave out shrinks to nothing as N grows with the length, its bound holds in "
        "every row, at most 70 to 85 % of a top sixteenth is told apart from the rest, gradients grow as temperature "
        "falls; and models trained with other normalizers recall more at eight times their length."
    ),
    tier="scaled",
    reported=Reported(
        value="distance collapses as top-N grows with L, separability saturates at 70 to 85 % a head, gradients grow "
        "as 1 / T; |grad alpha| <= min(1 / (4 T), sqrt 2)",
        setting="GPT-2 as published", where="arXiv 2508.17821, as summaries have it; the text was not at hand",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", arms=arms(32), baseline=arms(32)[0], equal="parameters",
        tasks=(
            NormalizationMeasures(every_row=True),
            NormalizationMeasures(label=READER, encoder="all-minilm-l6-v2", text="brown", tokens=512, fewest=64),
            Perplexity(lengths=(2048,), text="prose"),
            RecallInText(text="wikitext", **TRAINING),
        ),
        sizes=Sizes(
            quick={
                "subject": "default", f"{MEASURES}.tokens": 128, f"{MEASURES}.fewest": 32, "windows_of": 2,
                f"{MEASURES}.text": "code", "perplexity.text": "code", "lengths": (128,), "samples": 2,
                "recall_in_text.samples": 2, "steps": 8, "rates": (4e-3,), "parameters": 130_000, "length": 48,
            },
            cpu={
                f"{MEASURES}.tokens": 2048, "windows_of": 6, "every_row": False, "lengths": (512,),
                "perplexity.samples": 4, "recall_in_text.samples": 64, "judged": 32, "steps": 300, "rates": (4e-3,),
                "parameters": 130_000, "length": 48, "batch": 24,
            },
            cuda={
                "windows_of": 16, "perplexity.samples": 16, "recall_in_text.samples": 192, "judged": 64, "dim": 128,
                "layers": 3, "length": 96, "batch": 64, "steps": 2500, "rates": (3e-3,), "parameters": 700_000,
            },
        ),
    ),
    checks=(
        *(below(f"{of}.tightest", SOFTMAX, 1.001) for of in (MEASURES, READER)),  # rounding of float32
        *(
            lower(f"{of}.distance", SOFTMAX, than=SOFTMAX, where=SHARED, than_where=ONE, factor=0.5)
            for of in (MEASURES, READER)
        ),
        below(f"{MEASURES}.distance", SOFTMAX, 0.05, where=QUARTER),
        higher(f"{MEASURES}.distance", SOFTMAX, than=SOFTMAX, where=SIXTEEN, than_where={**SIXTEEN, **FEWEST}),
        below(f"{MEASURES}.separability", SOFTMAX, 0.85, where=SHARED),
        above(f"{MEASURES}.separability", SOFTMAX, 0.70, where=SHARED),
        higher(f"{MEASURES}.separability", SOFTMAX, than=SOFTMAX, where=SHARED, than_where=SPREAD),
        no_worse(f"{MEASURES}.separability", SOFTMAX, than=SOFTMAX, where=SHARED, than_where={**SHARED, **FEWEST},
                 margin=0.1, better="higher"),
        higher(f"{MEASURES}.sensitivity", SOFTMAX, than=SOFTMAX, where={"temperature": "0.25", **MOST},
               than_where={"temperature": "1", **MOST}, factor=2.0),
        above(f"{MEASURES}.beyond", SOFTMAX, 0.01, where=MOST),
        above("recalled", SOFTMAX, LEARNED, where={"times": 1}),
        *(higher("recalled", x, than=SOFTMAX, where=LONG) for x in OTHERS),
        *(lower(NLL, x, than=SOFTMAX, where=LONG) for x in OTHERS),
        *(no_worse(NLL, x, than=SOFTMAX, where={"times": 1}, margin=LOSS, better="lower") for x in OTHERS),
    ),
    caveat=(
        "Distances are between sums of values, and the ball of separability is our reconstruction. What a normalizer "
        "costs a model that was trained with softmax says nothing of one that is trained with it."
    ),
)  # fmt: skip
