# SPDX-License-Identifier: Apache-2.0
"""What does sharing a prompt by anchors and passing move and compute, and is it faster?

Processes that do it count bytes. Times are of a GPU alone that computes the share of the last host of eight, or of the
one before it if that takes longer, in layers of Llama-3-8B's shape; all-gathers are modelled and added. A ring stands
beside it as an even share of the time of one process, with all its messages hidden: no ring is faster. Two GPUs are
measured as they are. On a GPU more prompts are counted than on a CPU, whose four left two counts undecided: numbers of
hosts differ more than prompts do.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, at_most
from ...tasks.parallel.passing_cost import PassingCost
from ...tasks.parallel.prefill_time import PrefillTime

WHOLE, RING, STAR, APB, ALL = "one process", "ring", "star attention", "apb", "apb, all passed"
NO_ANCHOR = "apb, without anchor"

claim = Claim(
    slug="apb.prefill",
    statement=(
        "Hosts that share a prompt by anchors and compressed blocks receive an eighth of a ring's keys and values, "
        "compute less attention than those of Star Attention, and are done before both."
    ),
    tier="scaled",
    reported=Reported(
        value="9.2, 4.2 and 1.6 times faster prefill than FlashAttention, RingAttention and Star Attention",
        setting="Llama-3.1-8B and three others; 8 A800, 128K tokens",
        where="APB, arXiv 2502.12085, abstract",
    ),
    experiment=Experiment(
        subject="processes",
        baseline=Arm(WHOLE),
        equal="none",
        seeds=1,
        arms=(
            Arm(RING, options={"ring": True}),
            Arm(STAR, "apb:anchor=1.0,passed=0,asked=false"),
            Arm(APB, "apb"),
            Arm("apb, retained by key norms", "apb:scorer=knorm"),
            Arm(NO_ANCHOR, "apb:anchor=0"),
            Arm(ALL, "apb:passed=1.0"),
        ),
        tasks=(PassingCost(), PrefillTime(), PrefillTime(label="two_gpus", gpus=2, timed=(65_536,))),
        sizes=Sizes(
            quick={"processes": (2,), "tokens": (1024, 2048), "prefill_time.timed": (8192,), "rounds": 2},
            cpu={"tokens": (6144, 8192)},
            cuda={"tokens": (6144, 8192, 12_288, 16_384)},
        ),
    ),
    checks=(
        at_most("passed", APB, times=0.126, than=RING),
        # With the query's outputs, which are merged in float32.
        at_most("received", APB, times=0.5, than=RING),
        at_most("pairs", APB, times=1.0, than=STAR),
        at_most("pairs", APB, times=0.5, than=WHOLE),
        *(at_most("prefill_time.prefill", APB, times=1.0, than=other) for other in (STAR, RING)),
        at_most("prefill_time.prefill", APB, times=1 / 8, than=WHOLE),
        at_most("two_gpus.prefill", APB, times=1.0, than=WHOLE),
    ),
    caveat=(
        "Four layers without embeddings' head, random weights: prefill's ratios are of layers alone. Exchanges between "
        "eight GPUs are modelled. On a CPU nothing is timed."
    ),
)
