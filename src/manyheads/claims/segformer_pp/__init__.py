# SPDX-License-Identifier: Apache-2.0
"""Does merging patches that are alike around attention keep a dense output, and save seconds where images are large?

A published DINOv2 encoder with its saliency decoder maps photographs of streets, plain and under the paper's presets;
every map is compared with the plain one, photograph by photograph. Beside the presets: the same number of merges at
random, plain downsampling of the photographs, ToMe and average pooling between blocks, and what is new here: a merged
key that counts as many, one matching for four layers, a matching among neighbouring cells. Seconds are judged on a GPU
alone, at sizes from that of the quality on. What the presets do to a SegFormer is judged in
``segformer_pp.segformer``.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, Vision, at_most, higher, lower, no_worse
from ...tasks.vision.encoder_cost import EncoderCost
from ...tasks.vision.saliency import Saliency

MODEL = "dinov2-small-saliency"
PAPER = {
    "hq": "segformer_pp:refuse=never", "fast": "segformer_pp:preset=fast,refuse=never",
    "2x2": "segformer_pp:preset=2x2,refuse=never",
}  # fmt: skip
OWN = {
    "hq, random": "segformer_pp:choose=random,refuse=never", "hq, for 4 layers": "segformer_pp:every=4,refuse=never",
    "hq, nearby": "segformer_pp:reach=1,refuse=never",
    "keys": "segformer_pp:of=keys,ratio=0.6,cell=2,refuse=never",
    "keys, counted": "segformer_pp:of=keys,ratio=0.6,cell=2,proportional=true,refuse=never",
    "keys, random": "segformer_pp:of=keys,ratio=0.6,cell=2,choose=random,refuse=never",
}  # fmt: skip
OTHERS = {
    "tome": "tome", "tome, change": "tome:restore=change", "pooled": "token_pool", "one of 4": "token_pool:how=random",
}  # fmt: skip
ARMS = tuple(Arm(name, spec) for name, spec in (PAPER | OWN | OTHERS).items())
HALF = Arm("downsampled", options={"downsampled": 0.5})
LARGE, LARGEST = {"side": 896}, {"side": 1792}

claim = Claim(
    slug="segformer_pp",
    tier="scaled",
    statement=(
        "Merging four fifths of the queries with those most like them around each attention (hq) keeps a dense output "
        "close to the plain model's, closer than fast and 2x2, and all three far closer than downsampling the image; "
        "it matters that tokens are alike; on a GPU an image of high resolution takes less time."
    ),
    reported=Reported(
        value="SegFormer-B5 without retraining: mIoU 82.39, hq 82.31 at 1.61 times the speed, fast 82.04 at 1.94, 2x2 "
        "81.96 at 1.90, downsampled 77.31 at 6.51",
        setting="MiT-B5, Cityscapes validation at 1024 x 2048",
        where="table of Cityscapes in the README of the released code",
    ),
    experiment=Experiment(
        subject=MODEL, arms=(*ARMS, HALF), equal="none", seeds=1,
        tasks=(Saliency(), EncoderCost(device="cuda")),
        sizes=Sizes(
            quick={"samples": 3}, cpu={"side": 336, "samples": 20},
            cuda={
                "subject": Vision(MODEL, dtype="bfloat16"), "side": 448, "batch": 13, "sides": (448, 896, 1792),
                "encoder_cost.batch": 4, "rounds": 9,
            },
        ),
    ),
    checks=(
        no_worse("overlap", "hq", than="full", margin=0.05, better="higher"),
        higher("overlap", "hq", than="fast"),
        higher("overlap", "fast", than="2x2"),
        *(higher("overlap", name, than="downsampled") for name in PAPER),
        higher("overlap", "hq", than="hq, random"),
        higher("overlap", "keys", than="keys, random"),
        higher("overlap", "keys, counted", than="keys"),
        no_worse("overlap", "hq, for 4 layers", than="hq", margin=0.01, better="higher"),
        no_worse("overlap", "hq, nearby", than="hq", margin=0.01, better="higher"),
        *(higher("overlap", "hq", than=name) for name in ("tome", "pooled", "one of 4")),
        *(lower("seconds", name, than="full", relative=True, where=LARGE) for name in PAPER),
        at_most("seconds", "hq", times=1 / 1.61, than="full", where=LARGEST),
        lower("seconds", "hq, for 4 layers", than="hq", relative=True, where=LARGE),
        lower("seconds", "hq, nearby", than="hq", relative=True, where=LARGEST),
    ),
    caveat=(
        "A ViT, not SegFormer: attention has one width and full keys, as in SegFormer's last stage, so that presets "
        "merge queries in all layers; merging of keys, as in early stages, has arms of its own. The output is a "
        "saliency map and is held against the plain model's, which is harder than against labels: any change counts. "
        "On a CPU photographs have 576 patches, on a GPU 1,024; the decoder was trained on 256, at which the strategy "
        "itself refuses, since merging does not pay. Photographs are of two drives of one car. 2x2 leaves a "
        "quarter of the queries, hq a fifth, downsampling a quarter of everything, ToMe and pooling have budgets of "
        "their own: a GPU's seconds stand beside them, mostly of launches up to 896 pixels."
    ),
)  # fmt: skip
