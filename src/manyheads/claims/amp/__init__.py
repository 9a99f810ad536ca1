# SPDX-License-Identifier: Apache-2.0
"""Do heads and neurons go best by the size of what they add, and is what is left faster?

SmolLM2-135M is cut to eight tenths of its parameters, heads and neurons in one ratio, and nothing is trained. Beside
AMP's scores stand other scores for the same numbers of heads and neurons, the same parameters cut in layers, and AMP
turned round. Two arms of ours are shown and not judged: neurons scored with their output weights, and a refit.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, at_most, lower
from ...experiment.subjects import Convertible
from ...tasks.text.converted_loss import ConvertedLoss
from ...tasks.text.converted_speed import ConvertedSpeed

KEEP, SCORES = 0.8, ("random", "magnitude", "wanda", "taylor")
BASE, AMP, TURNED, MINITRON, DEPTH = "the whole model", "amp", "amp, highest first", "minitron", "layers"
OURS = (
    Arm(AMP, f"amp:keep={KEEP}"),
    Arm("amp, neurons projected", f"amp:keep={KEEP},neurons=projected"),
    Arm("amp, refit", f"amp:keep={KEEP},refit=true"),
    Arm(TURNED, f"amp:keep={KEEP},order=highest"),
)
RIVALS = (
    Arm(MINITRON, f"minitron:keep={KEEP},axis=heads_neurons"),
    Arm(DEPTH, f"minitron:keep={KEEP},axis=layers"),
    *(
        Arm(
            score, f"structured_pruning:keep={KEEP},axis=heads_neurons,score={score}",
            options={"seeded": True} if score == "random" else {},
        )
        for score in SCORES
    ),
)  # fmt: skip

claim = Claim(
    slug="amp",
    tier="scaled",
    statement=(
        "With heads and neurons removed in one ratio by the size of what they add, a language model loses less than "
        "by other scores or with layers removed, at equal parameters, and is faster than before."
    ),
    reported=Reported(
        value="Average of five commonsense tasks up to 1.49 points above the best method before, at 30 % fewer "
        "parameters after two epochs of LoRA (ARC-c 44.2, ARC-e 68.2, WinoGrande 61.6, PIQA 76.4); faster inference",
        setting="LLaMA-2-7B and Phi, 50 calibration prompts of Alpaca",
        where="AMP, arXiv 2504.21174, abstract and results on LLaMA-2-7B",
    ),
    experiment=Experiment(
        subject=Convertible("smollm2-135m-instruct", dtype="float32"), arms=(*OURS, *RIVALS), baseline=Arm(BASE),
        equal="parameters", tasks=(ConvertedLoss(), ConvertedSpeed(timed=(BASE, AMP, DEPTH))),
        sizes=Sizes(
            quick={
                "subject": Convertible("default"), "text": "code", "length": 32, "windows": 2, "sequences": 2,
                "prompt": 32, "written": 4, "rounds": 1,
            },
            cpu={
                "length": 128, "windows": 20, "sequences": 12, "seeds": 5, "prompt": 256, "written": 12, "rounds": 6,
            },
            cuda={
                "length": 512, "windows": 64, "sequences": 64, "seeds": 5, "prompt": 1024, "written": 64, "rounds": 8,
            },
        ),
    ),
    checks=(
        *(lower("token_nll", AMP, than=rival) for rival in (TURNED, *SCORES, MINITRON, DEPTH)),
        at_most("prefill", AMP, times=1.0, than=BASE),
        at_most("decode", AMP, times=1.0, than=BASE),
    ),
    caveat=(
        "A fifth is cut and nothing is trained: the paper's figures are after training. Its rivals LLM-Pruner and "
        "Wanda stand here as scores for the same shape, so that the score alone is judged. Of 9 query heads 6 stay."
    ),
)  # fmt: skip
