# SPDX-License-Identifier: Apache-2.0
"""Do activations on a little text say what a language model can do without?

SmolLM2-135M is cut to nine tenths of its parameters, of its neurons alone, of its width and neurons in one ratio, and
of its layers, by the activations of a few windows of text, and nothing is trained. Beside each stand the same sizes cut
at random, by the norms of weights, and by weights times activations (Wanda's score, added up).
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, lower
from ...experiment.subjects import Convertible
from ...tasks.text.converted_loss import ConvertedLoss

KEEP, AXES, SCORES = 0.9, ("neurons", "both", "layers"), ("random", "magnitude", "wanda")


def name(way: str, axis: str) -> str:
    """Of an arm."""
    return f"{way}, {axis}"


BASE = Arm("the whole model")
OURS = tuple(Arm(name("minitron", axis), f"minitron:keep={KEEP},axis={axis}") for axis in AXES)
RIVALS = tuple(
    Arm(
        name(score, axis), f"structured_pruning:keep={KEEP},axis={axis},score={score}",
        options={"seeded": True} if score == "random" else {},
    )
    for axis in AXES
    for score in SCORES
)  # fmt: skip
BY_LOSS = Arm("minitron by loss, layers", f"minitron:keep={KEEP},axis=layers,depth=loss")

claim = Claim(
    slug="minitron",
    tier="scaled",
    statement=(
        "Cut in one shot by activations on a small text, a language model loses less than cut at random, by the norms "
        "of its weights, or by weights times activations, at equal parameters; cutting width and neurons costs less "
        "than cutting layers."
    ),
    reported=Reported(
        value="Before any training the loss of the width-pruned model is lower than that of the depth-pruned one, and "
        "stays so; MMLU after training 60.5 (width) and 58.7 (depth) of 65.3",
        setting="Llama-3.1-8B to 4B, 1,024 calibration samples, distilled on 94 billion tokens",
        where="Minitron, arXiv 2408.11796, section 4 (width against depth) and Table 1",
    ),
    experiment=Experiment(
        subject=Convertible("smollm2-135m-instruct", dtype="float32"), arms=(*OURS, *RIVALS), baseline=BASE,
        equal="parameters", tasks=(ConvertedLoss(),),
        sizes=Sizes(
            quick={"subject": Convertible("default"), "text": "code", "length": 32, "windows": 2, "sequences": 2},
            cpu={"length": 128, "windows": 12, "sequences": 8},
            cuda={"length": 512, "windows": 64, "sequences": 64, "arms": (*OURS, *RIVALS, BY_LOSS)},
        ),
    ),
    checks=(
        *(
            lower("token_nll", name("minitron", axis), than=name(score, axis))
            for axis in ("neurons", "both")
            for score in SCORES
        ),
        lower("token_nll", name("minitron", "layers"), than=name("random", "layers")),
        lower("token_nll", name("minitron", "neurons"), than=name("minitron", "layers")),
        lower("token_nll", name("minitron", "both"), than=name("minitron", "layers")),
    ),
    caveat=(
        "The paper has no baselines at equal parameters before training; those here are ours. A tenth is cut, not a "
        "half: without training a half leaves nothing to compare. What training makes of it is the claim "
        "minitron.recovery."
    ),
)  # fmt: skip
