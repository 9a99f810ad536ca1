# SPDX-License-Identifier: Apache-2.0
"""Tiles with bits under Triton's interpreter, on the CPU. Collected in a process of its own by test_interpreter.py.
Float32 and float16 only: the interpreter computes bfloat16 wrongly.
"""

import itertools

import pytest
import torch

from kernels.interpreted import _mended  # noqa: F401 - a fixture that mends the interpreter
from kernels.tile_cases import build, flipped, kernel, worst
from manyheads.parallel import PATTERNS, AttnMask, AttnSlice
from tiers import spread

EXACT = (1e-12, 1e-12)  # float64: the same numbers, added in another order
# Rows 200 to 219 see nothing, and neither does any row see keys 128 to 255, a block of the contiguous layout.
HOLES = AttnMask((AttnSlice((0, 200), (0, 100)), AttnSlice((220, 270), (0, 128), "inverse")), 270)
LAYOUTS = ("contiguous", "zigzag", "striped")
CASES = [  # of half precision, whose tiles are larger: the interpreter takes its time for each
    {"name": name, "how": how, "size": 270 if how == "striped" else 150, "dtype": torch.float16, **heads}
    for ((i, name), (j, how)) in itertools.product(enumerate(PATTERNS), enumerate(LAYOUTS))
    for heads in [[{}, {"group": 2}, {"kv_heads": 2}][(i + j) % 3]]
]
SHAPES = [
    {"group": 4, "size": 60},
    {"width": 64, "dtype": torch.float16, "group": 2},
    {"width": 80, "columns": 48, "size": 131, "batch": 2},
    {"width": 128, "dtype": torch.float16, "name": "document_causal"},
    {"width": 24, "columns": 40, "size": 129, "how": "striped"},
    {"width": 16, "size": 3},
    {"width": 16, "size": 513, "dtype": torch.float16, "name": "window", "how": "zigzag"},
    {"mask": HOLES, "group": 2, "kv_heads": 2},
    {"mask": HOLES, "how": "striped", "dtype": torch.float16},
    {"mask": AttnMask((), 140), "size": 140},
]


@spread("given", [*CASES, *SHAPES], 17, ids=str)
def test_three_ways(given):
    """The formula in float64, torch in float64 and in the dtype of the case, and the kernels."""
    case = build(**given)
    assert worst(case, case.run("torch", dtype=torch.float64), EXACT) <= 1
    assert worst(case, case.run("torch")) <= 1
    assert worst(case, kernel(case)) <= 1


@pytest.mark.parametrize("given", [{}, {"dtype": torch.float16, "width": 64}, {"name": "window_causal", "size": 200}])
def test_a_wrong_bit_is_seen(given):
    """The control: of one pair of all, in a row that sees four keys."""
    case = build(**{"ranks": 1, "size": 140, **given})
    assert worst(case, kernel(case)) <= 1
    wrong = flipped(case)
    assert worst(case, kernel(wrong)) > 2
    assert worst(case, wrong.run("torch")) > 2
