# SPDX-License-Identifier: Apache-2.0
"""Does a model that is trained with images numbered in rings see more, make up less, and see alike all over the image?

Pictures of known objects in known cells, and questions behind filler whether an object is there; half of those asked
for are absent. All arms train on the same texts for as many steps: raster order, which is the model as it is; rings;
each of their two parts without the other; and raster order from the end, for which any other order but rings would do
as well. At CPU size the model is small and from scratch, on a GPU it is DINOv2 and SmolLM2 with a new projector, of
which attention is trained too. Each is also judged behind three times the filler that it was trained with.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, higher, lower
from manyheads.tasks.vision.object_presence import ObjectPresence

RASTER, RINGS, REVERSE = "raster", "concentric", "reverse raster"
POSITIONS, MASK = "ring positions alone", "ring mask alone"
BASE = Arm(RASTER, "concentric_attention:positions=raster,mask=raster")
ARMS = (
    BASE, Arm(RINGS, "concentric_attention"),
    Arm(POSITIONS, "concentric_attention:mask=raster"), Arm(MASK, "concentric_attention:positions=raster"),
    Arm(REVERSE, "concentric_attention:positions=reverse,mask=reverse"),
)  # fmt: skip
NEAR, FAR = {"times": 1}, {"times": 3}
# What another arm may be ahead by: the paper gains 6 to 8 points of accuracy on POPE; a hundredth is nothing beside it.
MARGIN = 0.01

claim = Claim(
    slug="concentric_attention",
    statement=(
        "Trained alike, a model with concentric positions and mask answers better whether an object is there than "
        "in raster order, makes up fewer, and sees the upper and the lower half of a picture more alike."
    ),
    tier="proxy",
    reported=Reported(
        value="POPE accuracy 81.4 to 86.9 (COCO), 79.1 to 87.0 (A-OKVQA), 79.0 to 85.7 (GQA); F1 79.7 to 85.5 on COCO.",
        setting="LLaVA-1.5-7B, trained on 558 thousand and 665 thousand samples with and without it",
        where="Concentric Causal Attention, NeurIPS 2024, tables on POPE",
    ),
    experiment=Experiment(
        subject="trainable", arms=ARMS, baseline=BASE, equal="steps",
        tasks=(ObjectPresence(asked=8, times=(1, 3)),),
        sizes=Sizes(
            quick={"steps": 3, "samples": 8, "layers": 1, "grid": 3},
            cpu={"steps": 400, "samples": 192},
            cuda={
                "model": "joined", "cell": 2, "filler": 112, "steps": 600, "lr": 2e-3, "slower": 0.25, "samples": 256,
                "pool": 4096, "align": 300,
            },
        ),
    ),
    checks=(
        higher("right", RINGS, than=RASTER, where=NEAR, margin=MARGIN),
        higher("right", RINGS, than=RASTER, where=FAR, margin=MARGIN),
        lower("hallucinated", RINGS, than=RASTER, where=NEAR, margin=MARGIN),
        lower("hallucinated", RINGS, than=RASTER, where=FAR, margin=MARGIN),
        lower("half_gap", RINGS, than=RASTER, where=NEAR, margin=MARGIN),
        higher("f1", RINGS, than=RASTER, where=NEAR, margin=MARGIN),
        higher("right", RINGS, than=REVERSE, where=NEAR, margin=MARGIN),
        higher("right", RINGS, than=POSITIONS, where=NEAR, margin=MARGIN),
        higher("right", RINGS, than=MASK, where=NEAR, margin=MARGIN),
    ),
    caveat=(
        "Pictures are made up: up to eight emoji before a photograph, on 6 x 6 (CPU) or 12 x 12 patches where LLaVA "
        "has 24 x 24, so that raster order puts them less far away. The small model has a RoPE base of 100, at which "
        "distance matters over so few tokens. The learning rate was looked for with raster order alone. The tower is "
        "DINOv2, not CLIP; the paper trains all of a language model, here its attention, from a projector that has "
        "learned the words of patches without any order. At CPU size models are in the "
        "midst of learning, which raster order does sooner, and seeds differ by much: read the run on a GPU."
    ),
)  # fmt: skip
