# SPDX-License-Identifier: Apache-2.0
"""Does a model learn more from the same rewards when the tokens that WAAD and FAI name have more of the credit?

SmolLM2 imitates worked sums of three numbers until two responses of five are right, and goes on from there by GRPO on
its own responses: with uniform credit, with half as much again on anchors and the preplan tokens coupled to them, and
with as much more on as many random tokens. On a GPU also by each signal alone, and by entropy.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, above, below, higher
from ...tasks.lenses.rewarded_sums import RewardedSums

BEFORE = "before RL"
JUDGED = tuple(Arm(way, options={"credit": way}) for way in ("uniform", "random", "coupled"))
OTHERS = tuple(Arm(way, options={"credit": way}) for way in ("entropy", "local", "global"))

claim = Claim(
    slug="reasoning_rhythm.credit_assignment",
    tier="proxy",
    statement=(
        "With as many steps and responses, a model trained by GRPO solves more new problems, and more while it is "
        "trained, when coupled preplan and anchor tokens have more of the credit than when all tokens have the same "
        "or when random ones have as much more."
    ),
    reported=Reported(
        value="Countdown 52.6 with uniform credit to 63.1 with coupled; CrossThink-QA 48.0 to 50.1; average of "
        "mathematics 39.4 to 43.2; random and entropy credit about as uniform",
        setting="GRPO of Qwen3 in 500 to 600 steps, batches of 512, Qwen3-8B for mathematics with 1k tokens",
        where="tables of RL results, and the ablation of credits",
    ),
    experiment=Experiment(
        subject="smollm2-135m-instruct", baseline=Arm(BEFORE), arms=(*JUDGED, *OTHERS), equal="steps",
        tasks=(RewardedSums(),),
        sizes=Sizes(
            quick={
                "subject": "default", "arms": JUDGED, "steps": 2, "prompts": 2, "group": 2, "tokens": 16, "largest": 9,
                "problems": 2, "answers": 2, "warm_steps": 2,
            },
            cpu={
                "subject": "default", "arms": JUDGED, "seeds": 1, "steps": 16, "prompts": 4, "tokens": 36, "largest": 9,
                "problems": 32, "warm_steps": 120, "warm_lr": 5e-4, "lr": 2e-5,
            },
            cuda={"tokens": 40},
        ),
    ),
    checks=(
        # There is something to learn: groups are neither all right nor all wrong, and GRPO learns from them.
        above("solved", BEFORE, 0.2),
        below("solved", BEFORE, 0.7),
        higher("solved", "uniform", than=BEFORE),
        *(higher("solved", "coupled", than=other) for other in ("uniform", "random")),
        *(higher("reward", "coupled", than=other) for other in ("uniform", "random")),
    ),
    caveat=(
        "Sums of our own in place of Countdown and mathematics, responses of some 30 tokens in place of thousands, of "
        "which all but the last ten have a FAI, and 30 rollouts of 128 responses in place of 500 of 512; the model has "
        "imitated worked sums first. On a CPU the shipped model, 19 million parameters, one seed and eight rollouts of "
        "32 responses: next to no training."
    ),
)  # fmt: skip
