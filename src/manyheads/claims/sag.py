# SPDX-License-Identifier: Apache-2.0
"""Does blurring what self-attention looks at guide samples without a condition, and better than blurring elsewhere?

The shipped UNet of scenes, given no caption, noise prediction with DDIM; the map is that of its middle block, as in the
paper. Every guided arm has its own scale, the best of the same three by FD-small on other noise. Blur of sigma 1,
kernel 9, clean samples clipped to the range of pixels. Steps are equal; guidance calls the model twice in each.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, lower
from ..tasks.diffusion.scene_quality import SceneQuality

MASKS = {"attention": "attended", "all": "everywhere", "random": "at random", "inverted": "elsewhere"}


def arms(scales: tuple[float, ...]) -> tuple[Arm, ...]:
    """A guided arm for each place that is blurred."""
    return tuple(
        Arm(f"blur {where}", f"sag:mask={mask},sigma=1.0,kernel=9,clip=true", options={"tune": {"scale": scales}})
        for mask, where in MASKS.items()
    )


claim = Claim(
    slug="sag",
    tier="proxy",
    statement=(
        "Without a condition, guidance away from a sample blurred where self-attention looks brings samples closer to "
        "real ones than no guidance does, and than guidance by the same blur everywhere or at random places."
    ),
    reported=Reported(
        value="FID 26.21 falls to 20.08 (s = 0.8); on ImageNet 128 further than with blur everywhere, at random, or of "
        "low frequencies",
        setting="ADM, ImageNet 256, unconditional",
        where="table of unconditional generation; table of masking strategies",
    ),
    experiment=Experiment(
        subject="unet", arms=arms((0.1, 0.3, 1.0)), baseline=Arm("no guidance"), equal="steps",
        tasks=(SceneQuality(steps=10, guidance=1.0, conditioned=False, batch=64),),
        sizes=Sizes(
            quick={"samples": 48, "steps": 5, "arms": arms((0.3,))},
            cpu={"samples": 160, "searched": 96}, cuda={"samples": 512, "searched": 256, "steps": 20},
        ),
    ),
    checks=tuple(
        lower("fd_small", "blur attended", than=other) for other in ("no guidance", "blur everywhere", "blur at random")
    ),
    caveat="A small UNet of ours whose own FD-small is poor (26.8).",
)  # fmt: skip
