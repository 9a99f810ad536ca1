# SPDX-License-Identifier: Apache-2.0
"""Can the deepest layers of a language model do without their attention, and what does it save?

Of SmolLM2-135M's 30 layers a quarter or a third lose their attention, their feed-forward part, or all, the deepest
first. Beside them: the same number of layers chosen at random, from the front, by how little they turn the stream, and
by the loss without each; and as many parameters left out in whole blocks. What is judged of the last layer is the
feed-forward part's; the abstract can be read in two ways there.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, at_most, lower, no_worse
from ..experiment.subjects import Convertible
from ..tasks.text.converted_loss import ConvertedLoss
from ..tasks.text.converted_speed import ConvertedSpeed

BASE, ATTENTION, THIRD, MLP, BLOCKS = "the whole model", "attention", "attention, a third", "mlp", "blocks"
FIRST, RANDOM, COSINE, FEWER = "first attention", "random attention", "cosine attention", "blocks, as many parameters"
BY_LOSS, GREEDY = "attention by loss", "attention, greedy"


def last_kept(name: str) -> str:
    """Of the arm that leaves the last layer whole."""
    return f"{name}, last kept"


ARMS = (
    Arm(ATTENTION, "skip_attn:skip=0.25"), Arm(THIRD, "skip_attn:skip=0.33"),
    Arm(MLP, "skip_attn:skip=0.25,part=mlp"), Arm(BLOCKS, "skip_attn:skip=0.25,part=block"),
    Arm(last_kept(ATTENTION), "skip_attn:skip=0.25,keep_last=true"),
    Arm(last_kept(MLP), "skip_attn:skip=0.25,part=mlp,keep_last=true"),
    Arm(last_kept(BLOCKS), "skip_attn:skip=0.25,part=block,keep_last=true"),
    Arm(FIRST, "skip_attn:skip=0.25,choose=first"), Arm(COSINE, "skip_attn:skip=0.25,choose=cosine"),
    Arm(RANDOM, "skip_attn:skip=0.25,choose=random", options={"seeded": True}),
    Arm(FEWER, "skip_attn:skip=0.067,part=block"),
)  # fmt: skip
SEARCHED = (Arm(BY_LOSS, "skip_attn:skip=0.25,choose=loss"), Arm(GREEDY, "skip_attn:skip=0.25,choose=greedy"))

claim = Claim(
    slug="skip_attn",
    tier="scaled",
    statement=(
        "Without the attention of its deepest layers a language model loses little, less than without their "
        "feed-forward parts or other layers' attention, and it writes faster; the last layer's feed-forward part "
        "matters."
    ),
    reported=Reported(
        value="Llama-2-13B without a third of its attention parts: 1.8 % less on average of the OpenLLM benchmark; "
        "one-token generation of Llama-2-7B 21 % faster",
        setting="Llama-2-7B and 13B, the deepest 25, 33 and 50 % of attention, feed-forward parts or blocks left out",
        where="arXiv 2404.05741 and 2407.15516, abstracts",
    ),
    experiment=Experiment(
        subject=Convertible("smollm2-135m-instruct", dtype="float32"), arms=ARMS, baseline=Arm(BASE), equal="none",
        tasks=(ConvertedLoss(), ConvertedSpeed(timed=(BASE, ATTENTION, THIRD, MLP, BLOCKS))),
        sizes=Sizes(
            quick={
                "subject": Convertible("default"), "text": "code", "length": 32, "windows": 2, "sequences": 2,
                "prompt": 32, "written": 4, "rounds": 1,
            },
            cpu={
                "length": 128, "windows": 24, "sequences": 8, "seeds": 6, "prompt": 1024, "written": 12, "rounds": 5,
            },
            cuda={
                "length": 512, "windows": 64, "sequences": 16, "seeds": 8, "prompt": 4096, "written": 64, "rounds": 8,
                "arms": (*ARMS, *SEARCHED),
            },
        ),
    ),
    checks=(
        no_worse("token_nll", ATTENTION, than=BASE, margin=0.1, better="lower"),
        *(lower("token_nll", ATTENTION, than=rival) for rival in (MLP, BLOCKS, FIRST, RANDOM, COSINE, FEWER)),
        lower("token_nll", last_kept(MLP), than=MLP),
        at_most("decode", THIRD, times=1.0, than=BASE),
        at_most("decode", ATTENTION, times=1.0, than=MLP),
        at_most("prefill", THIRD, times=1.0, than=BASE),
    ),
    caveat=(
        "A model of 135 million parameters and 30 layers, by the loss of text and not by answers; a tenth of a nat is "
        "what counts as little. No code was released; the tables were not at hand."
    ),
)  # fmt: skip
