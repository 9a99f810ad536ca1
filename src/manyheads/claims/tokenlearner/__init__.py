# SPDX-License-Identifier: Apache-2.0
"""Do eight learned tokens tell photographs apart as 64 patches do, in less time, and better than tokens not learned?

A ViT of 6 blocks is trained from scratch on CIFAR-10 under every arm, with equal steps, batches and first weights. From
the middle on it has 8 tokens instead of 64 patches: learned by either version of the maps; means of cells; a patch of
each cell at random; merged by ToMe in the first half. A fuser restores the patches behind every block. The control
"first half alone" is a model without the blocks that work on few tokens: if it does as well, they do nothing. Seconds
are of inference; on a CPU they are the processor's. The learning rate was looked for with the plain model alone.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, above, at_most, higher, lower, no_worse
from ...tasks.vision.picture_classes import PictureClasses
from ...tasks.vision.picture_cost import PictureCost

FULL, HALF = "64 patches", "first half alone"
LEARNED, FIRST, FUSED = "learned", "learned, version 1", "learned and fused"
POOLED, RANDOM, MERGED = "pooled", "random", "tome"
BASE = Arm(FULL)
ARMS = (
    BASE, Arm(LEARNED, "tokenlearner"), Arm(FIRST, "tokenlearner:version=1"), Arm(FUSED, "tokenlearner:fuse=true"),
    Arm(POOLED, "token_pool:cell=4,across=2,layers=2"), Arm(RANDOM, "token_pool:cell=4,across=2,layers=2,how=random"),
    Arm(MERGED, "tome:share=0.5,layers=0-2"), Arm(HALF, options={"layers": 3}),
)  # fmt: skip
TAUGHT = above("accuracy", FULL, 0.2)  # twice a guess, or nothing is told

claim = Claim(
    slug="tokenlearner",
    tier="scaled",
    statement=(
        "A ViT with 8 learned tokens from its middle on classifies photographs as well as with all 64 patches, in two "
        "thirds of the time or less, and better than with 8 tokens that are pooled, drawn or merged."
    ),
    reported=Reported(
        value="Comparable results to the state of the art on ImageNet at half of the computation or less.",
        setting="ViT-S to L with 8 or 16 tokens, pre-trained on JFT; TokenLearner in the middle or at three quarters",
        where="arXiv 2106.11297, abstract; its tables were not at hand",
    ),
    experiment=Experiment(
        subject="trainable", arms=ARMS, baseline=BASE, equal="steps", tasks=(PictureClasses(), PictureCost()),
        sizes=Sizes(
            quick={"steps": 3, "samples": 20, "dim": 16, "picture_cost.at_once": 2, "rounds": 2},
            cpu={"steps": 300, "batch": 16, "samples": 1000, "lr": 5e-4},
            cuda={
                "dim": 192, "heads": 6, "batch": 128, "steps": 400, "lr": 5e-4, "samples": 2000,
                "picture_cost.at_once": 512, "rounds": 15,
            },
        ),
    ),
    checks=(
        no_worse("accuracy", LEARNED, than=FULL, margin=0.02, better="higher", given=TAUGHT),
        no_worse("accuracy", FUSED, than=FULL, margin=0.02, better="higher", given=TAUGHT),
        lower("seconds", LEARNED, than=FULL, relative=True),
        at_most("seconds", LEARNED, times=2 / 3, than=FULL),
        *(higher("accuracy", LEARNED, than=name, given=TAUGHT) for name in (POOLED, RANDOM, MERGED, HALF, FIRST)),
    ),
    report=("training_loss",),
    caveat=(
        "Photographs of 32 pixels, a ViT of 64 channels that reads 4,800 of them (CPU), no pre-training: models "
        "are in the midst of learning, and three seeds see differences of several hundredths at best. A class token "
        "reads the tokens, where the released model has their mean. ToMe has fewer tokens in the first half already, "
        "so that it takes less time. With half of 6 blocks on 8 tokens the count of products falls to 0.57."
    ),
)  # fmt: skip
