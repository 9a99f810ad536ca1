# SPDX-License-Identifier: Apache-2.0
"""Does a cost model of the families of attention say what they cost?

The survey orders methods and claims nothing of its own. Checked is what this library adds to its taxonomy: formulas of
FLOPs, bytes and state for each family, and a roofline with what was measured of the machine just before (product rate,
bandwidth of copies by size, launch). Held against it are operators of the library on random tensors. Controls: the
model without bytes, without FLOPs, without launches, with one bandwidth for all sizes, and with families exchanged.
That one bandwidth misses a CPU's caches and new pages by a factor of ten was seen in a quick run, before the rule.
"""

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, above, below, higher, lower
from ..tasks.kernels.family_counts import FamilyCounts
from ..tasks.kernels.family_times import FamilyTimes

# A factor of two, as log2: what decides between families that are several times apart, and what a length is doubled by.
_TWICE = 1.0
ROOFLINE = Arm("roofline")
CONTROLS = (
    Arm("FLOPs alone", options={"only": "FLOPs"}),
    Arm("bytes alone", options={"only": "bytes"}),
    Arm("no launches", options={"without": "launches"}),
    Arm("one bandwidth", options={"without": "caches"}),
    Arm("shuffled", options={"shuffled": True}),
)

claim = Claim(
    slug="efficient_attention_survey",
    statement=(
        "A roofline over formulas of FLOPs and bytes for each family of attention, calibrated by copies and one "
        "product, predicts times and crossovers of the library's operators within a factor of two, and their order."
    ),
    tier="scaled",
    reported=Reported(
        value="A taxonomy of linear, sparse and hybrid attention, with their complexities; no measurement of its own",
        setting="a survey",
        where="arXiv 2507.19595, abstract",
    ),
    experiment=Experiment(
        subject="machine", arms=(ROOFLINE, *CONTROLS), baseline=ROOFLINE, tasks=(FamilyCounts(), FamilyTimes()),
        sizes=Sizes(
            quick={"family_counts.lengths": (600,), "family_times.lengths": (256, 512), "held": (512, 2048),
                   "repeats": 2},
            cpu={"repeats": 12},
            cuda={"family_times.lengths": (1024, 2048, 4096, 8192, 16384, 32768), "heads": 16, "channels": 128,
                  "held": (4096, 16384, 65536, 262144)},
        ),
        equal="none",
    ),
    checks=(
        below("flops", "roofline", 0.05),
        below("state", "roofline", 1e-9),
        below("reading", "roofline", _TWICE),
        below("token", "roofline", _TWICE),
        below("crossover", "roofline", _TWICE),
        above("rank", "roofline", 0.7),
        lower("reading", "roofline", than="FLOPs alone"),
        lower("token", "roofline", than="FLOPs alone"),
        lower("reading", "roofline", than="bytes alone"),
        lower("token", "roofline", than="bytes alone"),
        lower("reading", "roofline", than="one bandwidth"),
        lower("token", "roofline", than="one bandwidth"),
        lower("token", "roofline", than="no launches"),
        lower("reading", "roofline", than="shuffled"),
        lower("token", "roofline", than="shuffled"),
        higher("rank", "roofline", than="shuffled"),
    ),
    caveat=(
        "Random tensors in one layer's shapes; choices that depend on the numbers (blocks, codewords) fall as they do "
        "there. Decoding is of one row. A crossover is that with full attention, where the lengths measured show one; "
        "two that agree beyond them count nothing. Times are the shortest of several in turns; on a CPU they are the "
        "processor's, of one thread, as other processes of a busy machine doubled the wall's several times over."
    ),
)  # fmt: skip
