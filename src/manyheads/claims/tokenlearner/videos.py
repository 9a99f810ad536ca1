# SPDX-License-Identifier: Apache-2.0
"""Do a few learned tokens of every frame tell films apart as all patches do, in less time?

A ViViT of 6 blocks, with joint attention over space and time, is trained from scratch on films of an emoji that moves
before a moving photograph; a class is the emoji and its direction, which no single frame says. From the middle on each
of 4 pairs of frames has 2 tokens instead of 16 patches: learned, means of cells, a patch of each cell at random. The
control "first half alone" is a model without the blocks that work on few tokens. Seconds are of inference; on a CPU
they are the processor's. The learning rate was looked for with the plain model alone.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, above, at_most, higher, lower, no_worse
from ...tasks.vision.picture_classes import PictureClasses
from ...tasks.vision.picture_cost import PictureCost

FULL, LEARNED, POOLED, RANDOM, HALF = "64 patches", "learned", "pooled", "random", "first half alone"
BASE = Arm(FULL)
ARMS = (
    BASE, Arm(LEARNED, "tokenlearner:tokens=2"), Arm(POOLED, "token_pool:cell=4,across=2,layers=2"),
    Arm(RANDOM, "token_pool:cell=4,across=2,layers=2,how=random"), Arm(HALF, options={"layers": 3}),
)  # fmt: skip
TAUGHT = above("accuracy", FULL, 0.1)  # three times a guess, or nothing is told

claim = Claim(
    slug="tokenlearner.videos",
    tier="scaled",
    statement=(
        "A ViViT with 2 learned tokens for each pair of frames from its middle on classifies films as well as with all "
        "patches, in two thirds of the time or less, and better than with as many that are pooled or drawn."
    ),
    reported=Reported(
        value="State of the art on Kinetics-400, Kinetics-600, Charades and AViD, at less computation.",
        setting="ViViT-L with TokenLearner, 8 or 16 tokens a frame",
        where="arXiv 2106.11297, abstract; its tables were not at hand",
    ),
    experiment=Experiment(
        subject="trainable", arms=ARMS, baseline=BASE, equal="steps",
        tasks=(PictureClasses(of="films"), PictureCost(of="films")),
        sizes=Sizes(
            quick={"steps": 3, "samples": 20, "dim": 16, "picture_cost.at_once": 2, "rounds": 2},
            cpu={"steps": 300, "batch": 16, "samples": 1000, "lr": 1e-3},
            cuda={
                "dim": 192, "heads": 6, "batch": 128, "steps": 400, "lr": 5e-4, "samples": 2000,
                "picture_cost.at_once": 512, "rounds": 15,
            },
        ),
    ),
    checks=(
        no_worse("accuracy", LEARNED, than=FULL, margin=0.02, better="higher", given=TAUGHT),
        lower("seconds", LEARNED, than=FULL, relative=True),
        at_most("seconds", LEARNED, times=2 / 3, than=FULL),
        *(higher("accuracy", LEARNED, than=name, given=TAUGHT) for name in (POOLED, RANDOM, HALF)),
    ),
    report=("training_loss",),
    caveat=(
        "Films of 8 frames of 16 pixels, a ViViT of 64 channels, no pre-training: at CPU size the model is in the "
        "midst of learning. Each frame pair has 16 patches, of which 2 tokens are an eighth, as in the claim on "
        "photographs; the paper has 8 or 16 tokens of 196 patches or more."
    ),
)  # fmt: skip
