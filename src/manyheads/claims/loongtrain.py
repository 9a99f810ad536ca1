# SPDX-License-Identifier: Apache-2.0
"""Does a grid of heads and context send less than a ring or an all-to-all alone, and is attention computed once?

Bytes are counted in processes of one machine that count as two, in float64; they are those of any device. Tests of the
same code (exactness, formula, calls, bytes of checkpointing) had been seen before the sizes were set, and which arm
sends less had been worked out from the formulas; bytes by arm, held memory and modelled times had not been seen. Times
of a step are measured on GPUs alone, for the report; nothing is claimed of them, since two GPUs have no second link.
A double ring, which is LoongTrain's too, sends less between machines than the grid; no check compares the two.
"""

from typing import Any

from ..experiment import Arm, Claim, Experiment, Reported, Sizes, at_most, below, lower
from ..tasks.parallel.two_dimensional import TwoDimensional

RING, DOUBLE, TWO, CONTEXT, ALL = "ring", "double ring", "heads 2", "heads 2, context first", "heads alone"
EXACT, ONCE = 1e-12, 1.001  # float64, added in another order; calls of attention
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
LARGE = {"vocab_size": 50_304, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10,
         "num_attention_heads": 12, "num_key_value_heads": 4}  # fmt: skip
KEPT, FULL, NONE = ({"checkpoint": kind} for kind in ("kept", "full", "none"))


def arms(world: int) -> tuple[Arm, ...]:
    """Grids of so many processes, two machines of half of them."""
    specs = {
        RING: "loongtrain", DOUBLE: f"loongtrain:window={world // 2}", TWO: "loongtrain:heads=2",
        CONTEXT: "loongtrain:heads=2,place=context", ALL: f"loongtrain:heads={world}",
    }  # fmt: skip
    return tuple(Arm(name, spec) for name, spec in specs.items())


def model(sizes: dict[str, int]) -> Any:
    """Sizes as a task has them."""
    return tuple(sizes.items())


claim = Claim(
    slug="loongtrain",
    statement=(
        "A grid of heads and context is exact and, for grouped heads, sends less between machines than a ring or an "
        "all-to-all alone; with its output kept, attention runs forward once a step, for less than half the memory."
    ),
    tier="scaled",
    reported=Reported(
        value="up to 2.88 times the MFU of DeepSpeed-Ulysses and Megatron context parallelism",
        setting="LLaMA-7B, MHA and GQA, 128K to 1M tokens, 32 and 64 A100",
        where="arXiv 2406.18485, abstract; tables of throughput seen at second hand",
    ),
    experiment=Experiment(
        subject="processes", arms=arms(8), baseline=Arm(RING, "loongtrain"), equal="none", seeds=1,
        tasks=(TwoDimensional(trained=(RING, TWO), model=model(SMALL)),),
        sizes=Sizes(
            quick={"arms": arms(4), "ranks": 4, "node": 2, "lengths": (32, 64), "tokens": (32, 64)},
            cuda={"model": model(LARGE), "tokens": (16_384, 32_768), "rounds": 2},
        ),
    ),
    checks=(
        *(below("error", name, EXACT) for name in (RING, DOUBLE, TWO, CONTEXT, ALL)),
        *(below("formula", name, EXACT, where={"of": "sent"}) for name in (RING, DOUBLE, TWO, CONTEXT, ALL)),
        # Between machines a ring's last process of each sends all blocks; a grid whose neighbours share heads sends
        # its ring there, of half the heads, and the all-to-all stays within.
        *(lower("between", TWO, than=name) for name in (RING, CONTEXT, ALL)),
        below("formula", TWO, 1e-3, where={"of": "kept"}),
        *(at_most("forwards", name, times=ONCE, than=name, where=KEPT, than_where=NONE) for name in (RING, TWO)),
        *(at_most("held", name, times=0.5, than=name, where=KEPT, than_where=NONE) for name in (RING, TWO)),
        *(below("gradient_gap", name, EXACT, where=KEPT) for name in (RING, TWO)),
    ),
    report=("within", "modelled", "step_time", "peak"),
    caveat="Processes on one machine stand in for two; modelled times are no measurement; MFU is not measured.",
)  # fmt: skip
