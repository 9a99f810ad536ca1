# SPDX-License-Identifier: Apache-2.0
"""Is a message that trained cross-attention hides read as surely as that of green lists, at the same cost of quality?

Layers and extractor are trained on a frozen model and judged on texts that it writes behind prompts of a part of the
corpus that no training read. Every arm is set to the same divergence from the plain model, in nats per token, at three
sizes of it; green lists that change with the token before, and one list for all places, are the rivals. Ablations:
training without edits, attention that sees all bits alike, and the layers within blocks.
"""

from typing import Any

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, above, below, higher, lower, no_worse
from ..tasks.text.hidden_message import HiddenMessage

PLAIN = Arm("plain")
BUDGETS = (0.05, 0.15, 0.4)  # nats per token
_TRAINED: dict[str, Any] = {"trained": True, "bits": 8}
_FIXED, _CONTEXT = {"bits": 8, "window": 0}, {"bits": 8, "window": 1}
CURVES = tuple(
    Arm(name, budget=budget, options=options)
    for name, options in (("xattn", _TRAINED), ("green lists", _CONTEXT), ("one green list", _FIXED))
    for budget in BUDGETS
)
PARTS = tuple(
    Arm(name, budget=0.15, options={**_TRAINED, **more})
    for name, more in (
        ("cold", {"temperature": 0.5}), ("no edits", {"edits": False}), ("uniform", {"uniform": True}),
        ("substituted", {"place": "within"}), ("16 bits", {"bits": 16}),
    )
)  # fmt: skip
LONGER = Arm("one green list, 16 bits", budget=0.15, options={**_FIXED, "bits": 16})
EDITED = ("deletion", "insertion", "substitution", "swap", "reorder")
# Five bits of a hundred: of a message of 8 bits, a bit in two and a half messages. Chance is allowed the same.
MARGIN = 0.05
_BITS, _NONE = "bit_accuracy", {"edit": "none"}

claim = Claim(
    slug="xattn_watermark",
    statement=(
        "Cross-attention layers trained for minutes on a frozen model hide 8 bits in 64 tokens, which an extractor "
        "reads from the text alone, after edits too, as surely as green lists at the same divergence from the plain "
        "model; training on edits helps after them, and human texts are not taken for marked ones."
    ),
    tier="proxy",
    reported=Reported(
        value="two ways to add cross-attention that cost the model little; more robust training costs quality; much "
        "choice in a sentence leaves room for the message, little leaves none",
        setting="stablelm-base-alpha-7b",
        where="abstract; no figures were available to us",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", arms=(*CURVES, *PARTS, LONGER), baseline=PLAIN, equal="none",
        tasks=(HiddenMessage(),),
        sizes=Sizes(
            quick={
                "subject": "default", "source": "plays", "texts": 2, "length": 12, "human": 4, "steps": 1, "batch": 2,
                "tokens": 16, "drawn": 2, "tuning": 1, "prompt": 8,
            },
            cpu={
                "subject": "default", "source": "plays", "texts": 24, "length": 48, "human": 200, "steps": 100,
                "batch": 8, "tokens": 40, "drawn": 48, "tuning": 4, "seeds": 1,
            },
            cuda={},
        ),
    ),
    checks=(
        *(above(_BITS, "xattn", 0.5 + MARGIN, at=budget, where=_NONE) for budget in BUDGETS),
        higher(_BITS, "xattn", than="xattn", at=0.4, than_at=0.05, where=_NONE),
        *(above(_BITS, "xattn", 0.5 + MARGIN, at=0.4, where={"edit": edit}) for edit in EDITED),
        above(_BITS, "substituted", 0.5 + MARGIN, at=0.15, where=_NONE),
        *(
            no_worse(_BITS, "xattn", than=rival, margin=MARGIN, better="higher", at=budget, where=_NONE)
            for rival in ("green lists", "one green list") for budget in BUDGETS
        ),
        *(
            no_worse(_BITS, "xattn", than=rival, margin=MARGIN, better="higher", at=0.15, where={"edit": edit})
            for rival in ("green lists", "one green list") for edit in EDITED
        ),
        *(higher(_BITS, "xattn", than="no edits", at=0.15, where={"edit": edit}) for edit in EDITED),
        lower(_BITS, "xattn", than="no edits", at=0.15, where=_NONE),
        higher(_BITS, "xattn", than="uniform", at=0.15, where=_NONE),
        lower(_BITS, "16 bits", than="xattn", at=0.15, where=_NONE),
        lower(_BITS, "cold", than="xattn", at=0.15, where=_NONE),
        # Controls: another text's message is read at chance; 1 % of human texts may seem marked, 3 % would be wrong.
        *(check("other_bits", "xattn", 0.5 + sign * MARGIN, at=0.4) for check, sign in ((below, 1), (above, -1))),
        *(below("false_alarm", arm, 0.03, at=0.4) for arm in ("xattn", "green lists", "one green list")),
        # The same quality by another measure, of the texts themselves.
        *(
            no_worse("token_nll", "xattn", than=rival, margin=0.1, better="lower", at=0.15)
            for rival in ("green lists", "one green list")
        ),
    ),
    report=("divergence", "detected", "prefix_bits", "strength"),
    caveat=(
        "A model of 135 million parameters, layers of one width, and our design where the paper's text says nothing; "
        "on a CPU one of 19 million, trained on code, and a hundred steps. Quality is divergence from the plain model, "
        "not readers' judgement. A paraphrase here is sentences in another order, not other words."
    ),
)  # fmt: skip
