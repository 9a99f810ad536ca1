# SPDX-License-Identifier: Apache-2.0
"""Does attention change little in the middle of sampling, least where the pyramid reuses most, and does that order pay?

Videos of the shipped Latte (8 frames of 16 x 16, 12 attention modules), 40 steps of flow matching with guidance 3.
Change is the mean square of an output's difference from the step before over the mean square of the output. One kind
changes more than another when it is a tenth above it: what is nearer does not tell which of two to use longer. Outputs
are used again at the middle 70 % of the steps; the range begins at a step that 2, 3 and 6 divide, so that all ways of
counting begin alike. The reversed pyramid 6/3/2 runs as many modules as the pyramid 2/3/6; since modules do not cost
the same, 6/3/1 stands beside it: of all reversed sets up to 6 the cheapest that computes at least as many FLOPs of
attention. The best plain baseline is one interval for all, 3/3/3: it computes fewer FLOPs than the pyramid, so a
pyramid that pays has to be nearer to the uncached videos. The paper has no such row; a user who picks a setting needs
it. Nothing is trained, so all videos are of one seed and count each.
"""

from ...experiment import Arm, Claim, Experiment, Reported, Sizes, higher
from ...tasks.diffusion.fidelity import Fidelity
from ...tasks.diffusion.module_change import ModuleChange

SETS = {
    "pyramid": (2, 3, 6), "reversed, equal modules": (6, 3, 2), "reversed, equal FLOPs": (6, 3, 1),
    "uniform": (3, 3, 3), "spatial alone": (3, 1, 1), "temporal alone": (1, 3, 1), "cross alone": (1, 1, 3),
}  # fmt: skip
ARMS = tuple(
    Arm(name, f"pab:spatial={s},temporal={t},cross={c},upper=850,lower=150") for name, (s, t, c) in SETS.items()
)
MIDDLE = {"part": "middle"}
CHANGE = {"metric": "change", "arm": "plain", "than": "plain"}

claim = Claim(
    slug="pab",
    tier="proxy",
    statement=(
        "Attention outputs change less in the middle of sampling than at its ends, most within frames, less over time, "
        "least to the text; and reuse in that order keeps videos nearer to the uncached ones than reversed, at an "
        "equal number of modules computed and at equal FLOPs, and than one interval for all (3/3/3) at fewer FLOPs."
    ),
    reported=Reported(
        value="U-shaped over the steps, flat in the middle 70 %, spatial > temporal > cross; 80.5 s to 9.2 s (8.7x)",
        setting="Latte, Open-Sora, Open-Sora-Plan; the speed on 8 GPUs against one, with sequence parallelism",
        where="abstract and section on attention redundancy; its figure of differences by step",
    ),
    experiment=Experiment(
        subject="moving", arms=ARMS, baseline=Arm("plain"), equal="steps",
        tasks=(ModuleChange(steps=40), Fidelity(steps=40)), seeds=1,
        sizes=Sizes(
            quick={"samples": 2, "arms": ARMS[:4], "batch": 1},
            cpu={
                "module_change.samples": 24, "fidelity.samples": 8, "arms": ARMS[:4], "module_change.batch": 1,
                "fidelity.batch": 4,
            },
            cuda={"samples": 256, "module_change.batch": 1, "fidelity.batch": 4},
        ),
    ),
    checks=(
        *(
            higher(**CHANGE, where={"kind": kind, "part": part}, than_where={"kind": kind, **MIDDLE})
            for kind in ("spatial", "temporal", "cross")
            for part in ("first", "last")
        ),
        *(
            higher(**CHANGE, factor=1.1, where={"kind": more, **MIDDLE}, than_where={"kind": less, **MIDDLE})
            for more, less in (("spatial", "temporal"), ("temporal", "cross"))
        ),
        *(
            higher("psnr", "pyramid", than=other)
            for other in ("reversed, equal modules", "reversed, equal FLOPs", "uniform")
        ),
    ),
    caveat="One small Latte of ours, half trained on eight objects; the speed is in benchmarks/pab.json.",
)  # fmt: skip
