# SPDX-License-Identifier: Apache-2.0
"""Does a model tell the order of a film's frames better with a time in RoPE and with a mask by frames?

Films of one object a frame, every frame an image of a LLaVA prompt, and of pairs of objects whether the first comes
before the second. All arms train on the same films for as many steps: the model as it is, both of the paper's changes,
and each alone. At CPU size the model is small and from scratch, on a GPU it is DINOv2 and SmolLM2 with a new projector,
of which attention is trained too.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, higher
from manyheads.tasks.vision.frame_order import FrameOrder

PLAIN, BOTH, TIME, MASK = "plain", "tc_llava", "time alone", "frame mask alone"
BASE = Arm(PLAIN, "tc_llava:gamma=0,mask=causal")
ARMS = (
    BASE, Arm(BOTH, "tc_llava"), Arm(TIME, "tc_llava:mask=causal"), Arm(MASK, "tc_llava:gamma=0"),
)  # fmt: skip
# What another arm may be ahead by: no figure of the paper's was at hand; a hundredth of the pairs.
MARGIN = 0.01

claim = Claim(
    slug="tc_llava",
    statement=(
        "Trained alike, a model orders frames better with temporal-aware dual RoPE and the frame-wise block causal "
        "mask than without, and each of the two helps."
    ),
    tier="proxy",
    reported=Reported(
        value="A new state of the art on several benchmarks of video understanding, with fine-tuning alone.",
        setting="LLaVA on video, of several frames",
        where="arXiv 2409.03206, abstract; its tables were not at hand",
    ),
    experiment=Experiment(
        subject="trainable", arms=ARMS, baseline=BASE, equal="steps",
        tasks=(FrameOrder(),),
        sizes=Sizes(
            quick={"steps": 3, "samples": 8, "layers": 1},
            cpu={"steps": 700, "samples": 192},
            cuda={
                "model": "joined", "cell": 2, "frames": 8, "steps": 800, "lr": 2e-3, "slower": 0.25, "samples": 256,
                "asked": 8, "pool": 4096, "align": 300,
            },
        ),
    ),
    checks=(
        higher("ordered", BOTH, than=PLAIN, margin=MARGIN),
        higher("ordered", TIME, than=PLAIN, margin=MARGIN),
        higher("ordered", MASK, than=PLAIN, margin=MARGIN),
        higher("ordered", BOTH, than=TIME, margin=MARGIN),
        higher("ordered", BOTH, than=MASK, margin=MARGIN),
    ),
    caveat=(
        "Films are made up: emoji before one photograph, 4 frames of 2 x 2 patches (CPU) or 8 of 4 x 4. The paper "
        "fine-tunes a 7B model on real video, here attention behind a projector that knows the words of patches; "
        "its rule for the time of text was not at hand. The learning rate was "
        "looked for with the plain model alone. Whether questions about a single frame suffer is not measured. At "
        "CPU size one seed of three is still learning under every arm, so that seeds differ more than arms."
    ),
)  # fmt: skip
