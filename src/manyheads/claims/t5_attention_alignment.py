# SPDX-License-Identifier: Apache-2.0
"""Does a temperature that keeps attention as peaked as in training let a model read longer inputs?

No T5 weights are at hand, so that the paper's own models are untested. Two subjects stand for them:

- Decoders with T5's position bias, trained from scratch on contexts of T bytes of WikiText-2 with key-value pairs in
  half of them, read stretches of up to 8 T of other articles: the loss on the last bytes, and the values recalled.
- all-MiniLM-L6-v2, a published encoder trained on 256 tokens, reads texts of 512 of the Brown corpus: whether a passage
  finds its own text, in which it stands among filler.

Temperatures are calibrated on other texts, one for the model and length: by entropy, by P_max, by the closed form for
normal logits, by the log-n rule, or left at 1. RoPE models are the control.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, below, higher, lower
from manyheads.tasks.text.passage_among_filler import PassageAmongFiller
from manyheads.tasks.training.recall_in_text import RecallInText

T5 = Arm("t5", "softmax:position=t5")
ROPE = Arm("rope", "softmax")
READER = Arm("minilm", options={"reader": True})
LONG, LONGER = {"times": 4}, {"times": 8}


def aligned(base: Arm, align: str) -> Arm:
    """The weights of ``base`` under a temperature."""
    own = {"reader": True} if base is READER else {"weights_of": base.name, "calibrated": "t5_attention_alignment"}
    return Arm(f"{base.name}, {align}", base.spec, options={**own, "align": align})


RULES = ("entropy", "pmax", "gaussian", "logn")
ARMS = (*(aligned(base, rule) for base in (T5, ROPE, READER) for rule in RULES), ROPE, READER)

claim = Claim(
    slug="t5_attention_alignment",
    statement=(
        "Attention disperses on texts longer than in training, and a model whose attention is aligned by entropy or by "
        "P_max, without training, predicts and retrieves better there."
    ),
    tier="scaled",
    reported=Reported(
        value="Better language modelling, retrieval, multi-document question answering and code completion.",
        setting="T5 and Flan-T5, beyond 512 tokens, without fine-tuning",
        where="arXiv 2311.00684, abstract; its figures were not at hand",
    ),
    experiment=Experiment(
        subject="trainable", arms=ARMS, baseline=T5, equal="parameters",
        tasks=(
            RecallInText(text="wikitext", times=(1, 2, 4, 8), judged=32, length=128, only=("t5", "rope")),
            PassageAmongFiller(),
        ),
        sizes=Sizes(
            quick={
                "steps": 10, "rates": (4e-3,), "recall_in_text.samples": 2, "parameters": 170_000, "batch": 8,
                "passage_among_filler.samples": 4,
                "arms": (*(aligned(base, rule) for base in (T5, READER) for rule in RULES[:2] + RULES[3:]), READER),
            },
            cpu={
                "steps": 300, "tune_steps": 60, "recall_in_text.samples": 32, "parameters": 170_000, "batch": 16,
                "recall_in_text.length": 64, "passage_among_filler.samples": 64,
            },
            cuda={
                "seeds": 6, "dim": 192, "heads": 4, "recall_in_text.length": 256, "batch": 64, "pairs": 6, "keys": 24,
                "asked": 8, "weight": 6.0, "steps": 1500, "rates": (2e-3, 5e-3), "recall_in_text.samples": 96,
                "judged": 64, "parameters": 1_450_000,
            },
        ),
    ),
    checks=(
        below("recall_in_text.temperature", "t5, entropy", 1.0),
        below("recall_in_text.temperature", "t5, pmax", 1.0),
        lower("token_nll", "t5, entropy", than="t5", where=LONGER),
        lower("token_nll", "t5, pmax", than="t5", where=LONGER),
        lower("token_nll", "t5, pmax", than="t5, logn", where=LONGER),
        higher("recalled", "t5, entropy", than="t5", where=LONG),
        higher("recalled", "t5, pmax", than="t5", where=LONG),
        higher("reciprocal_rank", "minilm, entropy", than="minilm"),
        higher("reciprocal_rank", "minilm, pmax", than="minilm"),
        higher("reciprocal_rank", "minilm, pmax", than="minilm, logn"),
    ),
    report=("recall_in_text.tuning_nll", "passage_among_filler.temperature"),
    caveat=(
        "In the paper the encoder of T5 is aligned; here a decoder with T5's bias, and an encoder with positions. At "
        "CPU size the decoders have hardly learned (2.5 nats/byte), and what is said of them says little."
    ),
)  # fmt: skip
