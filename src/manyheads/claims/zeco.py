# SPDX-License-Identifier: Apache-2.0
"""Does a process that shares a sequence of linear attention send one state, however many there are, and lose no time?

Counted by a ledger and a logical clock on 2, 4 and 8 processes: All-Scan against LASP-1's chain, LASP-2's all-gather
and a scan by doubling. Timed on two GPUs against those, an all-to-all of heads, and processes that exchange nothing.
Seen before sizes and checks were set: errors of the tests (1e-14), a quick run's counts, and the fit of the model to
the paper's times (from 32 processes on 5 % off, 13 % where a time is left out of the fit). Below 32 other links count.
After the quick run the checks of modelled times became ratios over five sizes of a state, from differences over three,
and after a full one the bound of a state's worth of bytes 1.001, from 1 + 1e-9, which stored figures do not resolve.
"""

from manyheads.experiment import Arm, Claim, Experiment, Reported, Sizes, at_most, below, higher, lower
from manyheads.tasks.parallel._state_runs import ALL_TO_ALL, ALONE
from manyheads.tasks.parallel.scan_time import ScanTime
from manyheads.tasks.parallel.state_scan import StateScan

ALL_SCAN, LASP1, LASP2, DOUBLING = "All-Scan, 4 pieces", "LASP-1", "LASP-2", "doubling"
ZECO, BEFORE = "All-Scan", "All-Scan, outputs corrected"
COUNTED, TIMED = (ALL_SCAN, LASP1, LASP2, DOUBLING), (ZECO, BEFORE, LASP1, LASP2, ALL_TO_ALL, ALONE)
ARMS = (
    Arm(ALL_SCAN, "zeco:pieces=4"), Arm(LASP1, "zeco:pieces=1,overlap=false"), Arm(LASP2, "zeco:exchange=all_gather"),
    Arm(DOUBLING, "zeco:exchange=doubling"), Arm(ZECO, "zeco"), Arm(BEFORE, "zeco:overlap=true"), Arm(ALL_TO_ALL),
    Arm(ALONE),
)  # fmt: skip
EXACT = 1e-11  # relative, in float64: the same numbers added in another order
FEW, MANY, LARGE = {"processes": 2}, {"processes": 8}, {"processes": 256}
GOAL = 1.8  # times as fast as an all-to-all of heads
BOUND = 1.15  # of processes that exchange nothing: 7.32 ms over 6.39 in the paper, on 8
LENGTHS = (16_384, 32_768, 65_536)

claim = Claim(
    slug="zeco",
    statement=(
        "A process sends one state, however many share the sequence; results are those of one process, and a step "
        "takes little longer than without any exchange, which an all-to-all of heads does not reach."
    ),
    tier="scaled",
    reported=Reported(
        value=(
            "All-Scan takes 2.165 ms where an all-gather takes 8.514 on 256 GPUs; the operator 7.32 ms, LASP-2's 19.4, "
            "without exchange 6.39, on 8; 1.6 times LASP-2's tokens per second on 256"
        ),
        setting="GLA-1B, 32 heads of 128 x 128 channels, 16,384 or 32,768 tokens on each H100, 8 to 256 of them",
        where="arXiv 2507.01004, the tables of collectives, of the operator and of throughput",
    ),
    experiment=Experiment(
        subject="processes", arms=ARMS, baseline=ARMS[0], tasks=(StateScan(only=COUNTED), ScanTime(only=TIMED)),
        equal="none",
        sizes=Sizes(
            quick={"seeds_drawn": 1, "state_scan.steps": 2, "training_processes": 2,
                   "mixers": ("minimax_hybrid:every=0",)},
        ),
    ),
    checks=(
        *(below("error", arm, EXACT) for arm in COUNTED),
        *(below("loss_gap", arm, 1e-8) for arm in COUNTED),
        *(below(x, ALL_SCAN, 1.001, where={"processes": n}) for x in ("volume", "volume_back") for n in (2, 4, 8)),
        higher("volume", LASP2, than=LASP2, where=MANY, than_where=FEW, factor=6.9),
        higher("volume", DOUBLING, than=DOUBLING, where=MANY, than_where=FEW, factor=2.9),
        *(below("steps_error", arm, 1e-9) for arm in COUNTED),
        lower("steps", DOUBLING, than=LASP1, where=MANY),
        *(below("residual", arm, 0.15) for arm in (ALL_SCAN, LASP2)),
        at_most("modelled", ALL_SCAN, times=0.5, than=LASP2, where=LARGE),
        at_most("modelled", DOUBLING, times=0.8, than=ALL_SCAN, where=LARGE),
        *(at_most("step_time", ZECO, times=1 / GOAL, than=ALL_TO_ALL, where={"tokens": n}) for n in LENGTHS),
        *(at_most("step_time", ZECO, times=BOUND, than=ALONE, where={"tokens": n}) for n in LENGTHS),
        *(at_most("step_time", ZECO, times=1.02, than=x, where={"tokens": LENGTHS[0]}) for x in (LASP1, LASP2)),
    ),
    report=("steps", "modelled", "loss", "step_time"),
    caveat=(
        "Modelled times are of a line fitted to the paper's; on two GPUs chain and all-gather send the same, so that "
        "the paper's gain over LASP is in counts and in the model alone. Trained are two layers in float64."
    ),
)  # fmt: skip
