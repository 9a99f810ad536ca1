# SPDX-License-Identifier: Apache-2.0
"""Does a head of a language model rest on the first token, whose value is small, where it has nothing to do?

Looked at is a published model on prose and on code: sinks beside the attention on the second token, the values and the
residual stream of the first token. Heads of the greatest sink are zeroed one by one, and together or turned wholly to
the first token, beside as many of the least sink in the same layers; heads that switch are taken from where they are
active and from where they are dormant. The paper's Bigram-Backcopy, where a small GPT-2 learns to copy with softmax and
with ReLU attention, gives figures and no word.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, above, below, higher, lower
from ..tasks.lenses.bigram_backcopy import BigramBackcopy
from ..tasks.lenses.head_sinks import SECOND, HeadSinks

RELU = "active_dormant.relu_attention"
SOFT = Arm("softmax")
ARMS = (Arm("ReLU", RELU, options={"train": {}}),)
DEEP = (
    Arm("softmax, 3 layers", options={"train": {"layers": 3}}),
    Arm("ReLU, 3 layers", RELU, options={"train": {"layers": 3}}),
    Arm("softmax by SGD, 3 layers", options={"train": {"layers": 3, "optimizer": "sgd", "lr": 0.03}}),
)
DORMANT, ACTIVE = ({"heads": kind} for kind in ("dormant", "active"))
SINKS, REST = ({"heads": heads} for heads in ("greatest sinks", "others"))

claim = Claim(
    slug="active_dormant",
    tier="scaled",
    statement=(
        "In a language model many heads give most of their attention to the first token, whose value is small and "
        "whose residual stream is large; heads that do are missed less than others of their layers, and a head that is "
        "dormant on one kind of text and active on another is missed where it is active."
    ),
    reported=Reported(
        value="in Llama-2-7B, Llama-3.1 and OLMo sinks on the first token, values near 0 and residual peaks of two "
        "orders of magnitude; head 25 of layer 16 of Llama-2-7B is active on GitHub code and dormant on Wikipedia; "
        "zeroing it costs code alone. On Bigram-Backcopy the same with softmax, none of it with ReLU",
        setting="published models as they are; one layer, 256 channels, 10 000 steps of AdamW",
        where="sections on the Bigram-Backcopy task and on pretrained models; their figures",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", baseline=SOFT, arms=ARMS, equal="steps",
        tasks=(BigramBackcopy(), HeadSinks()),
        sizes=Sizes(
            quick={
                "subject": "default", "text": "code", "letters": "code", "windows_of": 3, "tokens": 96, "heads": 2,
                "steps": 150, "batch": 32, "sequences": 64,
            },
            cpu={"windows_of": 12, "tokens": 192, "seeds": 1},
            cuda={
                "arms": (*ARMS, *DEEP), "dim": 128, "length": 128, "batch": 128, "lr": 1e-3, "steps": 1500,
                "windows_of": 48, "tokens": 512, "heads": 24,
            },
        ),
    ),
    checks=(
        above("dormant", "softmax", 0.1),  # a tenth: the paper says many heads, and names no number
        # Ten times: the second token stands at nearly the same place, so that the place alone would make them equal.
        higher("head_sink", "softmax", than="softmax", where={"token": "first"}, than_where={"token": SECOND},
               factor=10.0),
        below("head_drain", "softmax", 0.5, where=SINKS),  # half the others' norm; the paper says near 0
        lower("head_drain", "softmax", than="softmax", where=SINKS, than_where=REST),
        above("residual_peak", "softmax", 10.0),  # an order of magnitude; Llama-2-7B has two
        below("head_worth", "softmax", 0.01, where=DORMANT),  # one head of hundreds costs less than 1 % of perplexity
        *(
            lower("joint_worth", "softmax", than="softmax", where=DORMANT | {"by": by}, than_where=ACTIVE | {"by": by})
            for by in ("zero", "bos")
        ),
        above("switch_worth", "softmax", 0.0),
    ),
    caveat=(
        "The published models are smaller than the paper's. Bigram-Backcopy is trained on models of ours: figures and "
        "no word. Training dynamics of a published model are not looked at."
    ),
)  # fmt: skip
