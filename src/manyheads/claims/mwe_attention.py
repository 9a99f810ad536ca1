# SPDX-License-Identifier: Apache-2.0
"""Does a translation model attend to a multi-word expression as a whole, more than to other pairs of words?

A small translation model is trained here on Multi30k, English to German. Expressions (fire hydrant, wedding cake) are
n-grams of high PMI with the German n-gram or compound that goes with each; beside them stand literal n-grams (green
bench) of as many words and about the same frequency, and for the rows of an expression another place of its sentence.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, higher
from ..tasks.lenses.matched_expressions import MatchedExpressions

LITERAL, MINE, ELSEWHERE = Arm("literal pairs"), Arm("expressions"), Arm("elsewhere")
ALIGNED = higher("focus", "expressions", than="elsewhere")  # else its attention aligns nothing, and nothing can be told

claim = Claim(
    slug="mwe_attention",
    tier="proxy",
    statement=(
        "The words of a multi-word expression are attended to together: its attention is spread more evenly over its "
        "words than that of literal pairs of words of equal frequency, and alike from each word of its translation."
    ),
    reported=Reported(
        value="pictures of attention in which the words of an expression are aligned with all of its translation; "
        "expressions added to the training data: up to +0.99 BLEU",
        setting="English to Latvian and Czech, WMT17 data, Neural Monkey",
        where="abstract, and the section on alignments; its figures were not at hand",
    ),
    experiment=Experiment(
        subject="trainable", baseline=LITERAL, arms=(MINE, ELSEWHERE), equal="none", tasks=(MatchedExpressions(),),
        sizes=Sizes(
            quick={
                "seeds": 1, "corpus": "made", "holds": 1.0, "loose": 0.5, "vocab": 400, "dim": 32, "layers": 2,
                "batch": 32, "steps": 60, "samples": 24,
            },
            cpu={"seeds": 1, "vocab": 3000, "dim": 128, "layers": 2, "batch": 64, "steps": 800, "lr": 4e-3},
            cuda={"samples": 400},
        ),
    ),
    checks=(
        ALIGNED,
        higher("evenness", "expressions", than="literal pairs", given=ALIGNED),
        higher("block", "expressions", than="literal pairs", given=ALIGNED),
        higher("spread", "expressions", than="literal pairs", given=ALIGNED),
    ),
    caveat=(
        "The paper shows pictures; the measures are ours. Expressions are collocations by PMI in place of tagged "
        "patterns, and literal pairs are few: samples are of sentences that the model was trained on. They are matched "
        "by words, not by tokens. What expressions added to the training data are worth is not measured."
    ),
)  # fmt: skip
