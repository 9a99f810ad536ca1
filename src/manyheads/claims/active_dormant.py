# SPDX-License-Identifier: Apache-2.0
"""Do sinks and drained values grow where a head has nothing to do, and does ReLU attention do without them?

Bigram-Backcopy: the one head of a small GPT-2 has work at the triggers only. It is trained with softmax and with ReLU
attention, equal in steps, sequences and rate; then the head is taken out, or turned wholly to the first token: a
dormant row loses nothing by it, an active one what it copied. Residual peaks of three layers, beside SGD, are figures
of the run on a GPU. The sinks of a published model are looked at on WikiText, and what its heads are worth there.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, above, below, higher, lower
from ..tasks.lenses.bigram_backcopy import BigramBackcopy
from ..tasks.lenses.head_sinks import HeadSinks

RELU = "active_dormant.relu_attention"
SOFT = Arm("softmax")
ARMS = (Arm("ReLU", RELU, options={"train": {}}),)
DEEP = (
    Arm("softmax, 3 layers", options={"train": {"layers": 3}}),
    Arm("ReLU, 3 layers", RELU, options={"train": {"layers": 3}}),
    Arm("softmax by SGD, 3 layers", options={"train": {"layers": 3, "optimizer": "sgd", "lr": 0.03}}),
)
TRIGGERS, OTHERS = ({"rows": rows} for rows in ("triggers", "others"))
SINKS, REST = ({"heads": heads} for heads in ("greatest sinks", "others"))
TURNED = {"head": "turned to the first token"}

claim = Claim(
    slug="active_dormant",
    tier="proxy",
    statement=(
        "A softmax head that has work at triggers only turns to the first token everywhere else, whose value "
        "shrinks, and loses nothing there when it is forced to; with ReLU attention the task is learned as well, "
        "without sink and without drain. In a language model the values of sinks are small, the first token's residual "
        "stream is large, and the more a head is a sink the less it is missed."
    ),
    reported=Reported(
        value="rows off the triggers put nearly all attention on the first token, whose value is near 0; with ReLU "
        "neither; in Llama-2-7B, Llama-3.1 and OLMo the same sinks, drains and residual peaks",
        setting="one layer, 256 channels, 256 letters, 10 000 steps of AdamW; published models as they are",
        where="sections on the Bigram-Backcopy task and on pretrained models; their figures",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", baseline=SOFT, arms=ARMS, equal="steps",
        tasks=(BigramBackcopy(), HeadSinks()),
        sizes=Sizes(
            quick={
                "subject": "default", "text": "code", "letters": "code", "windows_of": 3, "tokens": 96, "heads": 6,
                "steps": 150, "batch": 32, "sequences": 64,
            },
            cpu={"windows_of": 6, "tokens": 192, "heads": 24},
            cuda={
                "arms": (*ARMS, *DEEP), "dim": 128, "length": 128, "batch": 128, "lr": 1e-3, "steps": 1500,
                "windows_of": 16, "tokens": 512, "heads": 48,
            },
        ),
    ),
    checks=(
        below("loss", "softmax", 0.1, where=TRIGGERS),  # both learn to copy: guessing costs 3 nats
        below("loss", "ReLU", 0.1, where=TRIGGERS),
        # More of the head's attention than all other tokens together; and less than a dormant head could have.
        above("sink", "softmax", 0.5, where=OTHERS),
        below("sink", "ReLU", 0.1, where=OTHERS),
        higher("sink", "softmax", than="ReLU", where=OTHERS),
        below("drain", "softmax", 0.6),  # about halfway between the paper's near 0 and the others' norm
        above("drain", "ReLU", 0.8),
        lower("drain", "softmax", than="ReLU"),
        above("added_loss", "softmax", 1.0, where=TRIGGERS | TURNED),
        below("added_loss", "softmax", 0.1, where=OTHERS | TURNED),
        lower("head_drain", "softmax", than="softmax", where=SINKS, than_where=REST),
        above("residual_peak", "softmax", 10.0),  # an order of magnitude; Llama-2-7B has two
        below("sink_and_worth", "softmax", 0.0),
    ),
    caveat="Trained are small models of ours on the paper's own task; the published model is smaller than the paper's.",
)  # fmt: skip
