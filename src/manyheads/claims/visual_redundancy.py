# SPDX-License-Identifier: Apache-2.0
"""Does a model that is given fewer, or hides redundant, tokens of an image follow instructions better and still see?

A small model is trained to answer, in the words that an instruction before the picture names, whether objects are
there; no answer stands in a text, so that each needs the instruction and the picture. It is trained once for each
seed, with all 36 tokens of a picture, and judged with a quarter of them, nine: those of VMTC, as many
averaged, downsampled, random, merged by likeness (ToMe), and hidden by attention (FastV); with CMAI, which hides half
of them from each word, and both. VMTC also with random primary tokens, and without merging. Judged behind as much
filler as in training, and behind six times that, where instructions are farther away than any that it was trained on.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, higher, lower, no_worse
from ..tasks.vision.instructed_answers import InstructedAnswers

VMTC = "visual_redundancy:primary=0.2,clusters=0.06,source=patches"
CMAI = "visual_redundancy.cmai"
SPECS = {
    "vmtc": VMTC, "cmai": CMAI, "vmtc + cmai": f"{VMTC} + {CMAI}", "random primary": f"{VMTC},choose=random",
    "primary alone": "visual_redundancy:primary=0.25,source=patches,merge=false", "pooled": "feature_pool",
    "downsampled": "feature_pool:how=first", "random": "feature_pool:how=random", "tome": "feature_pool:how=similar",
    "fastv": "fastv:start=1,keep=0.25",
}  # fmt: skip
RIVALS = ("pooled", "downsampled", "random", "tome", "fastv")
ONCE = ("random primary", "primary alone", "pooled", "random", "tome", "fastv")
NEAR, FAR = {"times": 1}, {"times": 6}
SEES = 0.05  # of answers; a picture that is not seen costs a quarter or more of them

claim = Claim(
    slug="visual_redundancy",
    tier="proxy",
    statement=(
        "With a quarter of the image tokens, those that the tower looks at and clusters of the rest, a model answers "
        "as truly as with all and better than with as many chosen plainly; with them or with CMAI it follows "
        "instructions at least as well, and better where they are far away."
    ),
    reported=Reported(
        value="instruction following rises markedly while VQA-v2, GQA, TextVQA, MME and MMBench are kept; spatial "
        "downsampling raises instruction following and loses understanding",
        setting="LLaVA-1.5, tuned and used with VMTC and CMAI",
        where="abstract",
    ),
    experiment=Experiment(
        subject="trainable", arms=tuple(Arm(name, spec) for name, spec in SPECS.items()), equal="none", seeds=3,
        tasks=(InstructedAnswers(times=(1, 6), near=ONCE),),
        sizes=Sizes(
            quick={"samples": 8, "steps": 4, "batch": 4},
            cpu={"samples": 128, "steps": 1000},
            cuda={"model": "towered", "samples": 256, "steps": 800, "pool": 2048, "layers": 4, "lr": 3e-3, "seeds": 3},
        ),
    ),
    checks=(
        no_worse("content", "vmtc", than="full", where=NEAR, margin=SEES, better="higher"),
        no_worse("content", "cmai", than="full", where=NEAR, margin=SEES, better="higher"),
        *(higher("content", "vmtc", than=other, where=NEAR) for other in RIVALS),
        higher("content", "vmtc", than="random primary", where=NEAR),
        higher("content", "vmtc", than="primary alone", where=NEAR),
        lower("content", "downsampled", than="full", where=NEAR),
        *(no_worse("followed", name, than="full", where=NEAR, margin=0.02, better="higher")
          for name in ("vmtc", "cmai", "vmtc + cmai")),
        *(higher("followed", name, than="full", where=FAR)
          for name in ("vmtc", "cmai", "vmtc + cmai", "downsampled")),
        higher("right", "vmtc + cmai", than="vmtc", where=NEAR),
    ),
    caveat=(
        "On a CPU a tower of one layer, whose class token nothing trains (so that patches weigh patches), on a GPU "
        "DINOv2; a decoder from scratch that answers in one of eight words. Nothing is tuned with the "
        "strategies, as the paper does too. Pictures have 36 patches, LLaVA 576, of which four show objects on "
        "average. The second layer is the last: CMAI and FastV act in one layer alone. Shares are ours; the paper's "
        "are not known. Sizes were chosen after looking at the plain model alone: on 512 pictures, read by DINOv2 "
        "once, it learned pictures by heart."
    ),
)  # fmt: skip
