# SPDX-License-Identifier: Apache-2.0
"""Do heads that fine-tuning brought into a chat model's circuit carry what it learned, and is the circuit right?

A published chat model and its copies tuned on worked arithmetic begin to answer the same problems; EAP-IG gives a
circuit for each. On problems that neither saw, the most important emergent heads are zeroed in both models, beside
random heads of the same layers and beside the heads whose weights changed most. Scores are held against exact patching
of single heads, and against EAP, whose one gradient is the corrupted run's; the circuit alone against as many random
edges. Reported are heads by first appearance, ablation by the mean, the most important heads whether new or not, and
the scaling of emergent heads in the base.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, above, higher, lower
from ..tasks.lenses.emergent_heads import EmergentHeads

IG, EAP = Arm("EAP-IG", options={"steps": 5}), Arm("EAP", options={"steps": 0})
CHANGED = Arm("weight change")
TUNED, BASE = {"model": "tuned"}, {"model": "base"}
CHOSEN, RANDOM = {"heads": "chosen", "by": "zero"}, {"heads": "random", "by": "zero"}
LEARNED = lower("answer_nll", "EAP-IG", than="EAP-IG", where=TUNED, than_where=BASE)

claim = Claim(
    slug="thinking_sparks",
    tier="scaled",
    statement=(
        "Zeroing the heads that fine-tuning brought into a chat model's circuit of worked arithmetic costs the "
        "fine-tuned model more than zeroing random heads of the same layers, and more than it costs the model before; "
        "EAP-IG ranks heads nearly as exact patching does, nearer than EAP; the circuit alone keeps more of the "
        "model's answers than as many random edges."
    ),
    reported=Reported(
        value="pass@1 (AIME24, AIME25, GPQA, AMC) of DeepSeek-R1-Distill-Qwen-1.5B 30.0/26.6/18.6/66.2; without the "
        "reasoning heads 26.6/16.6/17.1/59.0, without base heads 30.0/23.3/12.1/53.0; of the 7B model AIME24 rises "
        "without reasoning heads, 40 to 53.3. SFT adds many heads, half of them by step 100, most stay; GRPO few",
        setting="Qwen2.5 and its post-trained variants, 5,000 edges, 100 steps; temperature 0.6, 32k tokens",
        where="tables of ablated heads; figures of cohorts of heads by checkpoint",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", baseline=IG, arms=(EAP, CHANGED), equal="none",
        tasks=(EmergentHeads(),),
        sizes=Sizes(
            quick={
                "subject": "default", "source": "sums", "steps": 6, "batch": 4, "lr": 2e-3, "prompts": 2, "tokens": 6,
                "edges": 60, "patched_edges": 100, "patched": 1, "exact": 6, "heads": 2, "draws": 1, "problems": 4,
            },
            cpu={
                "source": "sums", "steps": 16, "batch": 6, "lr": 1e-4, "prompts": 6, "tokens": 12, "patched": 4,
                "exact": 30, "draws": 3, "problems": 20, "seeds": 1,
            },
            cuda={
                "source": "both", "steps": 150, "batch": 16, "looks": 2, "prompts": 10, "tokens": 24, "patched": 8,
                "exact": 64, "draws": 4, "problems": 64, "solved": 32, "seeds": 3,
            },
        ),
    ),
    checks=(
        LEARNED,
        higher("heads_cost", "EAP-IG", than="EAP-IG", where=TUNED | CHOSEN, than_where=TUNED | RANDOM, given=LEARNED),
        higher("heads_cost", "EAP-IG", than="EAP-IG", where=TUNED | CHOSEN, than_where=BASE | CHOSEN, given=LEARNED),
        higher("heads_cost", "EAP-IG", than="weight change", where=TUNED | CHOSEN, given=LEARNED),
        above("agreement", "EAP-IG", 0.6, where={"score": "magnitude"}),  # .6: the paper names none
        higher("agreement", "EAP-IG", than="EAP", where={"score": "magnitude"}),
        lower("left", "EAP-IG", than="EAP-IG", where={"edges": "circuit"}, than_where={"edges": "random"}),
    ),
    caveat=(
        "The post-trained model is made here, by minutes of supervised fine-tuning of 135 million parameters on short "
        "worked answers: no reasoning model with long traces, and no GRPO. Judged is the loss of right answers; the "
        "share solved is reported."
    ),
)  # fmt: skip
