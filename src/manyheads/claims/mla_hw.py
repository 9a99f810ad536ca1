# SPDX-License-Identifier: Apache-2.0
"""Is latent attention cheaper to decode without expanding its cache, and does a roofline model know when it is not?

The paper simulates accelerators; here the machine at hand is measured, on random tensors of DeepSeek-V3's layer
(``cuda``) or of one with a quarter of its channels and an eighth of its heads. ``full`` is what transformers does: it
expands every latent at every step. ``auto`` names a schedule from peak and bandwidth, measured just before.
"""

from ..experiment import Claim, Experiment, Reported, Sizes, above, at_most, below, lower, over
from ..tasks.kernels.latent_decoding import LatentDecoding
from ..tasks.kernels.latent_schedules import LatentSchedules

# What a tenth stands for: attention over heads moves each of them, over latents one vector that all share; the ratio of
# their bytes at DeepSeek-V3's sizes is 128 * (192 + 128) / 576 = 71, and 16 * (48 + 32) / 144 = 9 at the small ones, to
# which the cost of expanding comes.
_TENTH = 0.1
_DEEPSEEK = (128, 512, 128, 64, 128, 1536)

claim = Claim(
    slug="mla_hw",
    statement=(
        "Decoding with latent attention is at least ten times cheaper absorbed than expanded, and which schedule is "
        "cheaper follows from the peak FLOP/s and the bandwidth of the machine."
    ),
    tier="scaled",
    reported=Reported(
        value="MLA moves decoding towards the compute-bound regime; the schedule should follow bandwidth over compute",
        setting="accelerators simulated with Stream, DeepSeek-V3 sizes, one token decoded",
        where="abstract, and the roofline figures of the comparison of schedules; no table gives seconds",
    ),
    experiment=Experiment(
        subject="machine",
        arms=over({"absorb": "mla_hw:schedule=absorb", "auto": "mla_hw"}),
        tasks=(LatentSchedules(), LatentDecoding()),
        sizes=Sizes(
            quick={"tokens": (256, 1024), "context": 1024, "repeats": 4},
            cpu={"queries": (1, 2, 4, 8, 16, 32, 64, 128, 256), "repeats": 12},
            cuda={
                "sizes": _DEEPSEEK,
                "batches": (1, 8),
                "queries": (1, 2, 4, 8, 16, 32, 64, 256, 1024),
                "tokens": (1024, 4096, 16384),
                "hidden": 7168,
                "batch": 8,
                "context": 16384,
                "repeats": 10,
            },
        ),
        equal="none",
    ),
    checks=(
        at_most("attention", "absorb", times=_TENTH, than="full", where={"queries": 1, "largest": True}),
        # Of 54 shapes nine in ten named right are an interval that begins at 0.8. Beside a crossover both schedules
        # cost the same, and which is named there matters to nobody; regret weighs the misses.
        above("agrees", "auto", 0.8),
        below("regret", "auto", 0.1),
        lower("regret", "auto", than="full"),
        lower("regret", "auto", than="absorb"),
        at_most("step", "auto", times=1.0, than="full"),
    ),
    caveat=(
        "Random weights in a published layer's shapes (a GPU), or a quarter of its channels (a CPU): times are of real "
        "shapes, and quality is not at stake, for all schedules compute the same "
        "(checked before any is timed). The whole model has two layers, so that its embedding weighs more than in "
        "DeepSeek-V3."
    ),
)
