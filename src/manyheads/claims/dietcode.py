# SPDX-License-Identifier: Apache-2.0
"""Is code search as good when a model reads the statements and words of a function that attention calls important?

Docstrings of the standard library seek their functions by embeddings of MiniLM, and by the mean states of SmolLM2, both
as published. Functions are cut to three fifths of their tokens, the paper's headline, and to three tenths. Weights are
of each model's own attention on functions of other files. Beside it, at as many tokens: truncation, random statements,
random words, SlimCode's rules (which need no model), words alone without choosing statements, statements by what all of
their words weigh, and the same weights dealt anew, which says whether attention matters. Seconds include the cutting.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, at_most, higher, no_worse, over
from ..tasks.text.code_search import CodeSearch

MOST, LESS = 0.6, 0.3
SPECS = {
    "dietcode": "dietcode", "statements by tokens": "dietcode:value=tokens", "words alone": "dietcode:statements=false",
    "random statements": "dietcode:choose=random", "random words": "dietcode:choose=random,statements=false",
    "truncated": "dietcode:choose=first", "slimcode": "slimcode",
}  # fmt: skip
DEALT = tuple(Arm("dealt anew", "dietcode", budget, options={"shuffled": True}) for budget in (MOST, LESS))
RANK, RANK_LM = "minilm.reciprocal_rank", "smollm2.reciprocal_rank"
ON_LM = ("dietcode", "random statements", "truncated", "slimcode")
CONTROLS = ("truncated", "random statements", "random words", "dealt anew")

claim = Claim(
    slug="dietcode",
    tier="scaled",
    statement=(
        "Cut to three fifths of their tokens by attention, functions are found about as well as whole ones, better "
        "than truncated or randomly cut ones, and take less time; it matters that weights are of attention, and that "
        "statements are chosen before words."
    ),
    reported=Reported(
        value="comparable results with 40 % less computation in fine-tuning and testing; the SlimCode paper has 9.46 % "
        "more MRR than DietCode",
        setting="CodeBERT and CodeT5 fine-tuned on CodeSearchNet, Java and Python, removal of 10 to 50 %",
        where="abstract; abstract of arXiv 2405.11196",
    ),
    experiment=Experiment(
        subject="trainable", arms=(*over(SPECS, (MOST, LESS)), *DEALT), equal="slots", seeds=1,
        tasks=(
            CodeSearch(label="minilm"),
            CodeSearch(
                label="smollm2", model="smollm2-135m-instruct",
                only=("full", *(f"{name}:budget={MOST}" for name in ON_LM)),
            ),
        ),
        sizes=Sizes(
            quick={"samples": 4, "learned": 2, "longest": 90},
            cpu={
                "longest": 180, "minilm.samples": 300, "minilm.learned": 120, "smollm2.samples": 60,
                "smollm2.learned": 20, "smollm2.per_file": 2,
            },
            cuda={"samples": 450, "batch": 50},
        ),
    ),
    checks=(
        # 0.03: an answer in thirty that goes from the first place to nowhere.
        no_worse(RANK, "dietcode", than="full", at=MOST, than_at=None, margin=0.03, better="higher"),
        no_worse(RANK_LM, "dietcode", than="full", at=MOST, than_at=None, margin=0.03, better="higher"),
        *(higher(RANK, "dietcode", than=other, at=budget) for budget in (MOST, LESS) for other in CONTROLS),
        *(higher(RANK_LM, "dietcode", than=other, at=MOST) for other in ON_LM[1:3]),
        *(higher(RANK, "dietcode", than="words alone", at=budget) for budget in (MOST, LESS)),
        no_worse(RANK, "dietcode", than="slimcode", at=MOST, margin=0.03, better="higher"),
        *(higher(RANK, "slimcode", than="dietcode", at=budget) for budget in (MOST, LESS)),
        *(at_most(f"{model}.seconds", "dietcode", times=0.8, than="full", at=MOST, than_at=None)
          for model in ("minilm", "smollm2")),
    ),
    caveat=(
        "Nothing is fine-tuned: MiniLM was trained to embed sentences and SmolLM2 to predict text, neither on pairs of "
        "docstrings and code alone, and they read cut programs as they come; the paper fine-tunes on cut ones. A few "
        "hundred functions of one library are the gallery, names included; those of one file are one context. Weights "
        "of a causal model are relative to even attention, which still favours what comes late."
    ),
)  # fmt: skip
