# SPDX-License-Identifier: Apache-2.0
"""Does a graph drawn from a frozen layer's attention make a better adapter than one that sees each token alone?

Adapters of equal size are trained on a frozen model to read worked problems of GSM8K, and judged by the loss of answers
to problems that none has met: Sparse-GIN as the paper says; as the released code has it, where only self-loops are
left; the same network without a graph; the same weights at random earlier tokens; and LoRA on all linear layers, the
rival of the paper. Lambda is reported by depth.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, lower, no_worse
from ...tasks.text.adapted_loss import AdaptedLoss

FROZEN = Arm("frozen")
KINDS = ("intended", "released", "bottleneck", "random", "lora")
# Nats per token, a hundredth of the perplexity: no figure of the paper's; less would decide nothing for a user.
MARGIN = 0.01

claim = Claim(
    slug="graph_gin_attention.adapter",
    statement=(
        "On held-out worked answers Sparse-GIN as intended has a lower loss than LoRA, than a bottleneck adapter and "
        "than random edges at equal parameters; as released, where tokens exchange nothing, it is no better than the "
        "bottleneck."
    ),
    tier="scaled",
    reported=Reported(
        value="lower training loss and validation perplexity than LoRA with as many trained parameters; lambda grows "
        "with depth",
        setting="Llama-3.2-3B-Instruct on ORCA math word problems, logic and biology text, 1,000 and more steps",
        where="figures of loss and perplexity; the released code, by which its edges are self-loops alone",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", arms=tuple(Arm(kind, options={"kind": kind}) for kind in KINDS),
        baseline=FROZEN, equal="none", tasks=(AdaptedLoss(),),
        sizes=Sizes(
            quick={
                "subject": "default", "source": "sums", "steps": 2, "batch": 2, "length": 48, "problems": 8,
                "tuning": 4, "rates": (1e-3,), "width": 32,
            },
            cpu={
                "subject": "default", "steps": 40, "batch": 2, "length": 64, "problems": 48, "tuning": 24,
                "rates": (3e-3,), "width": 64,
            },
            cuda={"steps": 240, "problems": 240, "tuning": 60},
        ),
    ),
    checks=(
        lower("token_nll", "intended", than="bottleneck"),
        lower("token_nll", "intended", than="released"),
        lower("token_nll", "intended", than="random"),
        lower("token_nll", "intended", than="lora"),
        no_worse("token_nll", "bottleneck", than="released", margin=MARGIN, better="lower"),
        *(lower("token_nll", kind, than="frozen") for kind in ("bottleneck", "lora")),
    ),
    report=("scale", "tuning_nll"),
    caveat=(
        "A model of 135 million parameters, on a CPU one of 19 million that was trained on code, and a thousand "
        "problems of GSM8K's test part; trained on 5,000 tokens at one rate on a CPU, on half a million at the "
        "better of two on a GPU."
    ),
)  # fmt: skip
