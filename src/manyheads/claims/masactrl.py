# SPDX-License-Identifier: Apache-2.0
"""Does a target that reads its source's keys and values late keep the source's looks and its own layout?

The shipped MMDiT of scenes (six blocks of joint attention, which the paper does not treat: what is exchanged is the
image tokens'). The paper's S = 4 of 50 steps and L = 10 of 16 blocks are here step 1 of 12 and block 4 of 6. Masks need
cross-attention of its own and are not measured.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, higher, no_worse
from ..tasks.diffusion.kept_background import KeptBackground

LATE, COPY = "step 1, block 4", "step 0, block 0"
ARMS = tuple(
    Arm(name, f"masactrl:{fields}")
    for name, fields in {
        LATE: "start_step=1,start_layer=4", COPY: "start_step=0,start_layer=0",
        "step 1, block 0": "start_step=1,start_layer=0", "step 0, block 4": "start_step=0,start_layer=4",
        "step 4, block 4": "start_step=4,start_layer=4", "step 4, block 0": "start_step=4,start_layer=0",
        f"{LATE}, union": "start_step=1,start_layer=4,union=true",
    }.items()
)  # fmt: skip

claim = Claim(
    slug="masactrl",
    tier="proxy",
    statement=(
        "Mutual self-attention from an early step on, in late blocks, keeps more of the source picture than its noise "
        "and caption alone do, while the object still moves to where the target's caption says; in all blocks from the "
        "first step on it copies the source."
    ),
    reported=Reported(
        value="no figures: pictures of edits; S = 4 of 50 steps, L = 10 of 16 blocks",
        setting="Stable Diffusion 1.4, prompts and real images",
        where="figures of results and of the ablation over S and L",
    ),
    experiment=Experiment(
        subject="scenes", arms=ARMS, baseline=Arm("no control"), equal="steps", tasks=(KeptBackground(batch=32),),
        sizes=Sizes(quick={"samples": 16, "arms": ARMS[:2]}, cpu={"samples": 192}, cuda={"samples": 768, "batch": 64}),
        seeds=1,  # nothing is trained or searched: pictures are what differs
    ),
    checks=(
        higher("kept", LATE, than="no control"),
        no_worse("place", LATE, than="no control", margin=0.1, better="higher"),  # one edit in ten at most is lost
        higher("place", LATE, than=COPY),
    ),
    caveat="A small MMDiT of ours, which puts nine of ten objects right by itself.",
)  # fmt: skip
