# SPDX-License-Identifier: Apache-2.0
"""The kernels without a GPU, under Triton's interpreter, which has to be asked for before Triton is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from kernels.interpreter import needs_triton, run_interpreted

FILES = [
    ["interpreted.py"], ["interpreted_probe.py"], ["interpreted_recurrence.py"],
    ["interpreted_block_sparse.py", "interpreted_int4_fp8.py", "interpreted_product_codes.py"],
    ["interpreted_tiles.py"],
]  # fmt: skip


@needs_triton
@pytest.mark.parametrize("names", FILES, ids=lambda names: names[0].removesuffix(".py"))
def test_kernels_under_the_interpreter(names):
    run_interpreted(*names)


def test_every_file_is_run():
    assert sorted(name for names in FILES for name in names) == sorted(
        path.name for path in Path(__file__).parent.glob("interpreted*.py")
    )


def test_the_package_imports_no_triton():
    code = "import sys, manyheads.kernels as k; k.available(); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
