# SPDX-License-Identifier: Apache-2.0
"""Is a pyramid of reused attention nearer to the uncached video than what else as few FLOPs can be spent on?

``equal_flops`` gives the plain pipeline what the pyramid 2/3/6 costs to spend in other ways: fewer steps, and the
caches of diffusers, each at the dearest of its settings that costs no more. The subject is the shipped Wan, on which
all of them run; on Latte, whose blocks take frames and places in turn, FirstBlockCache and MagCache of diffusers
(0.42) fail on the shapes, and what is left is judged in ``pab.latte``. Wan's attention goes over space and time at once
and counts as spatial. Nothing is trained, so all videos are of one seed and count each.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, higher
from ...tasks.diffusion.equal_flops import FEWER, EqualFlops

PYRAMID = Arm("pyramid", "pab:spatial=2,temporal=3,cross=6,upper=850,lower=150")
UNIFORM = Arm("uniform", "pab:spatial=3,temporal=3,cross=3,upper=850,lower=150")
CACHES = ("first_block", "taylorseer", "fastercache", "magcache")


def rivals(slug: str, subject: str, caches: tuple[str, ...], caveat: str) -> Claim:
    """The claim on one of the models that ship."""
    arm = {"way": "arm"}
    return Claim(
        slug=slug,
        tier="proxy",
        statement=(
            "Videos sampled with the pyramid 2/3/6 are nearer to the uncached ones than those of one interval for all "
            "(3/3/3), and than what fewer steps or diffusers' caches make of as many FLOPs."
        ),
        reported=Reported(
            value="LPIPS, PSNR and SSIM to the uncached videos better than those of T-GATE and Delta-DiT",
            setting="Latte, Open-Sora and Open-Sora-Plan; fewer steps and the caches judged here are not compared",
            where="main table of quality",
        ),
        experiment=Experiment(
            subject=subject, arms=(PYRAMID, UNIFORM), baseline=Arm("plain"), equal="none", seeds=1,
            tasks=(EqualFlops(steps=40, arm="pyramid", caches=caches),),
            sizes=Sizes(
                quick={"samples": 1, "steps": 6, "batch": 1}, cpu={"samples": 16, "batch": 4},
                cuda={"samples": 128, "batch": 4},
            ),
        ),
        checks=(
            higher("psnr", "pyramid", than="uniform", where=arm, margin=0.5),
            *(
                higher("psnr", "pyramid", than="plain", where=arm, than_where={"way": way}, margin=0.5)
                for way in (FEWER, *caches)
            ),
        ),
        caveat=caveat,
    )  # fmt: skip


claim = rivals("pab.rivals", "moving3d", CACHES, "A small Wan of ours; FLOPs, not seconds, are made equal.")
