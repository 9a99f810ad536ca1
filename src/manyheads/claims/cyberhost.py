# SPDX-License-Identifier: Apache-2.0
"""Are hands of an audio-driven video drawn better with region codebook attention than with as many plain parameters?

Denoisers of small avatars, trained from scratch on the same clips, of which every part is known: what a signal and a
reference image ask for is one video. The plain denoiser and what is left of region codebook attention without one of
its parts get a wider feed-forward part, so that all have as many parameters, and as many steps. Two arms are no models:
the right video, which says how exactly keypoints are read off, and the reference as every frame, which the plain
denoiser has to be better than for anything to be told of keypoints. All arms have the paper's priors but the one that
has none.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, above, higher, lower, no_worse
from manyheads.tasks.training.avatar_video import AvatarVideo

SPEC = "cyberhost:spatial=32,temporal=16"
PLAIN, WHOLE, NO_CODES, NO_CROPS = "plain", "region codebooks", "without codebooks", "without crops"
NO_MASK, NO_PRIORS, LEARNED = "without mask", "without priors", "codes not orthogonal"
STILL, TRUTH = "reference unmoved", "the right video"
PRIORS = ("movement", "clarity", "pose", "local")
BASE = Arm(PLAIN, options={"fitted": SPEC})
ARMS = (
    BASE, Arm(WHOLE, SPEC), Arm(NO_CODES, f"{SPEC},codebook=false", options={"fitted": SPEC}),
    Arm(NO_CROPS, f"{SPEC},identity=false", options={"fitted": SPEC}),
    Arm(NO_MASK, f"{SPEC},mask=false", options={"fitted": SPEC}),
    Arm(NO_PRIORS, SPEC, options={"without": PRIORS}),
    Arm(STILL, options={"copies": "reference"}), Arm(TRUTH, options={"copies": "truth"}),
)  # fmt: skip
MORE = (
    Arm(LEARNED, f"{SPEC},orthogonal=false"),
    *(Arm(f"without {p}", SPEC, options={"without": (p,)}) for p in PRIORS),
)
# A two-hundredth of an intensity and a twentieth of a pixel: of what keypoints can be read to, a quarter.
PIXEL, POINT = 0.005, 0.05
MOVES = lower("hand_keypoints", PLAIN, than=STILL)

claim = Claim(
    slug="cyberhost",
    statement=(
        "Trained alike and with as many parameters, a denoiser of avatars with region codebook attention draws hands "
        "nearer to what the signal asks for than a plain one, and than without codebooks, crops, mask or priors."
    ),
    tier="proxy",
    reported=Reported(
        value="FID 32.97 and FVD 555.8; without motion codebooks 37.80 and 643.9, and confidence of hands' keypoints "
        "0.859 beside 0.884; without identity descriptors similarity of faces 0.422 beside 0.514.",
        setting="audio-driven bodies, trained on 200 hours of video",
        where="Ablation table of arXiv 2409.01876, as notes of others have it; its text was not at hand",
    ),
    experiment=Experiment(
        subject="trainable", arms=ARMS, baseline=BASE, equal="steps", tasks=(AvatarVideo(),),
        sizes=Sizes(
            quick={"steps": 3, "samples": 4, "layers": 1, "denoising": 2, "frames": 2, "batch": 2},
            cpu={"steps": 350, "samples": 64, "layers": 1, "rates": (6e-3,)},
            cuda={
                "arms": (*ARMS, *MORE), "dim": 96, "heads": 4, "layers": 4, "frames": 8, "batch": 32, "steps": 400,
                "rates": (2e-3,), "samples": 128, "denoising": 16,
            },
        ),
    ),
    checks=(
        MOVES,
        *(
            lower("hand_keypoints", WHOLE, than=other, margin=POINT, given=MOVES)
            for other in (PLAIN, NO_CODES, NO_CROPS, NO_MASK, NO_PRIORS)
        ),
        *(
            lower("hand_rmse", WHOLE, than=other, margin=PIXEL)
            for other in (PLAIN, NO_CODES, NO_CROPS, NO_MASK, NO_PRIORS, STILL)
        ),
        lower("face_rmse", WHOLE, than=PLAIN, margin=PIXEL), lower("face_rmse", WHOLE, than=NO_CROPS, margin=PIXEL),
        no_worse("rest_rmse", WHOLE, than=PLAIN, margin=PIXEL, better="lower"),
        above("mask_iou", WHOLE, 0.5), higher("mask_iou", WHOLE, than=NO_PRIORS),
    ),
    report=("training_loss", "parameters"),
    caveat=(
        "Avatars of 16 pixels that a formula draws, moved by two numbers a frame, denoised in pixels by a small Wan "
        "from scratch; the paper trains a UNet of latents on 200 hours of people, with audio features, a second "
        "network for the reference and ArcFace for faces. Fréchet distances say what is like real videos; here "
        "distances to the one right video do. At CPU size training ends long before it is done: the plain denoiser "
        "puts hands no nearer than the reference left unmoved, so that comparisons of keypoints tell nothing there."
    ),
)  # fmt: skip
