# SPDX-License-Identifier: Apache-2.0
"""Is a denoiser that edits 3D objects better shown the source as tokens beside its own, or by a cross-attention?

Editors of voxel objects, trained from scratch as rectified flows on the same programmatic edits: add, delete, hollow,
grow, each with one exact result. Objects that are judged were never trained on. Beside the two ways of the paper the
source as further channels, which is the strongest fair rival, for here source and target lie on one grid; an editor
that never sees the source; and an arm that leaves every object as it is. Attention to the source adds parameters, so
there is a second with as many as all others; it computes fewer tokens, so on a GPU there is a third with twice the
steps.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, higher, lower, no_worse
from manyheads.tasks.training.voxel_edit import VoxelEdit
from manyheads.tasks.training.voxel_edit_cost import VoxelEditCost

NONE, TOKENS, SAME, CHANNELS = "no source", "tokens", "tokens, same time", "channels"
CROSS, EQUAL, LONGER = "cross-attention", "cross-attention, as many parameters", "cross-attention, twice the steps"
COPIED = "source unchanged"
BASE = Arm(NONE)
ARMS = (
    BASE, Arm(TOKENS, "native3d_edit"), Arm(CROSS, "native3d_edit.cross_attention"),
    Arm(EQUAL, "native3d_edit.cross_attention", options={"fitted": True}), Arm(CHANNELS, "native3d_edit.channels"),
    Arm(SAME, "native3d_edit:time=same"), Arm(COPIED, options={"copies": True}),
)  # fmt: skip
# No figure of the paper's tells the two ways apart (three pictures do): two points of an IoU or a share of edits.
POINTS = 0.02

claim = Claim(
    slug="native3d_edit",
    statement=(
        "Trained alike, a denoiser that is shown the source as tokens of its own sequence edits objects better than "
        "with a zero-initialised cross-attention to it, with fewer parameters or as many, and keeps the rest better."
    ),
    tier="proxy",
    reported=Reported(
        value="Token concatenation is more parameter-efficient and better than cross-attention (three pictures); "
        "FID 91.9 beside 126.2 of the best other method.",
        setting="TRELLIS, fine-tuned on 110,000 triplets of source, instruction and target",
        where="Submission to ICLR 2026 (withdrawn), as notes of others have it; its text was not at hand",
    ),
    experiment=Experiment(
        subject="trainable", arms=ARMS, baseline=BASE, equal="steps", tasks=(VoxelEdit(), VoxelEditCost()),
        sizes=Sizes(
            quick={"steps": 4, "samples": 8, "layers": 1, "dim": 24, "denoising": 2, "edits": 2, "rounds": 2},
            cpu={"steps": 500, "samples": 96, "layers": 2, "rates": (3e-3, 6e-3), "tune_steps": 120},
            cuda={
                "arms": (*ARMS, Arm(LONGER, "native3d_edit.cross_attention", options={"times": 2})),
                "side": 16, "dim": 192, "heads": 4, "layers": 6, "batch": 48, "steps": 600, "rates": (1e-3, 2e-3),
                "tune_steps": 100, "samples": 256, "denoising": 20, "rounds": 8,
            },
        ),
    ),
    checks=(
        *(higher("edited_iou", TOKENS, than=other, margin=POINTS) for other in (CROSS, EQUAL, NONE)),
        *(higher("kept_iou", TOKENS, than=other, margin=POINTS) for other in (CROSS, EQUAL, NONE)),
        lower("kept_chamfer", TOKENS, than=CROSS), lower("kept_chamfer", TOKENS, than=EQUAL),
        *(higher("followed", TOKENS, than=other, margin=POINTS) for other in (CROSS, EQUAL, COPIED)),
        *(
            no_worse(metric, TOKENS, than=CHANNELS, margin=POINTS, better="higher")
            for metric in ("edited_iou", "kept_iou", "followed")
        ),
        higher("edited_iou", TOKENS, than=SAME), higher("kept_iou", TOKENS, than=SAME),
    ),
    report=("parameters", "exact", "attention_flops", "flops", "seconds", "training_loss"),
    caveat=(
        "Objects are boxes and ellipsoids on 8 voxels a side (16 on a GPU), denoised themselves and not as latents, by "
        "a small Wan from scratch; four instructions, each one token. The paper fine-tunes a trained generator in two "
        "stages. Source and target lie on one grid, which is what channels need and tokens do not. At CPU size "
        "training ends long before it is done: no arm follows instructions that change few voxels (add, hollow)."
    ),
)  # fmt: skip
