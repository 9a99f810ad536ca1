# SPDX-License-Identifier: Apache-2.0
"""Do workers that see each other's tokens work out more sums in as many steps as one worker, or a batch that votes?

SmolLM2 is asked for lists of sums that are easily divided. Each worker writes as many tokens as the one of the
baseline; a batch that knows nothing of each other, whose answers are counted, writes as many tokens altogether as the
workers. One worker with four times the tokens says what there is to win. Without sight workers are told of each other
and see nobody; untold they see each other and are told nothing. What the cache is, whoever collaborates, is judged in
``hogwild.shared_cache``.
"""

from ...experiment import Arm, CausalLM, Claim, Experiment, Reported, Sizes, higher, lower
from ...tasks.text.shared_sums import SharedSums

_SAMPLED = "told=false,temperature=0.7,finish=1"
ARMS = (
    Arm("alone, four times the tokens", options={"times": 4}),
    Arm("workers, 2", "hogwild:finish=1"),
    Arm("workers", "hogwild:workers=4,finish=1"),
    Arm("workers, contiguous", "hogwild:workers=4,layout=contiguous,finish=1"),
    Arm("workers, interleaved", "hogwild:workers=4,layout=interleaved,finish=1"),
    Arm("without sight", "hogwild:workers=4,others=false,finish=1"),
    Arm("untold", f"hogwild:workers=4,{_SAMPLED}"),
    Arm("batch that votes", f"hogwild:workers=4,others=false,{_SAMPLED}"),
)
FEW = tuple(arm for arm in ARMS if arm.name in (
    "alone, four times the tokens", "workers", "without sight", "batch that votes",
))  # fmt: skip
ROOM = higher("solved", "alone, four times the tokens", than="full", margin=0.05)  # more tokens help at all

claim = Claim(
    slug="hogwild",
    tier="scaled",
    statement=(
        "Four workers that are told of each other and see each other's tokens work out more sums than one does in as "
        "many steps, than they do without seeing each other, and than an independent batch of as many tokens whose "
        "answers are counted; and they repeat each other's work less than workers without sight."
    ),
    reported=Reported(
        value="more accuracy at equal numbers of steps than one thread on LIMO, on sets of independent problems and "
        "others; a single thread of QwQ reaches 89.65 % at 16,384 tokens",
        setting="QwQ-32B and others, two workers and more, combined layout, without fine-tuning",
        where="figures of accuracy by steps; the paper could be read in part, its code in full",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", arms=ARMS, equal="steps", tasks=(SharedSums(),),
        sizes=Sizes(
            quick={"subject": "default", "arms": FEW, "lists": 1, "sums": 2, "tokens": 8},
            cpu={"subject": CausalLM("smollm2-135m-instruct", dtype="float32"), "arms": FEW, "lists": 6, "tokens": 30},
            cuda={"lists": 20},
        ),
    ),
    checks=(
        ROOM,
        *(
            higher("solved", "workers", than=other, margin=0.02, given=ROOM)
            for other in ("full", "without sight", "batch that votes")
        ),
        lower("repeated", "workers", than="without sight", margin=0.02),
    ),
    caveat=(
        "A model of 135 million parameters, far below those for which the paper finds collaboration; sums of two "
        "numbers below ten, in lists behind a worked one, stand in for problems with parts. Where more tokens do not "
        "help one worker either, there is nothing to win, and the comparison says nothing. A first run, on sums of two "
        "digits, was stopped after four lists, of which the baseline solved next to nothing."
    ),
)  # fmt: skip
