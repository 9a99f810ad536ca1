# SPDX-License-Identifier: Apache-2.0
"""The kernels without a GPU, under Triton's interpreter, which has to be asked for before Triton is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from kernels.interpreter import needs_triton, run_interpreted

FILES = sorted(path.name for path in Path(__file__).parent.glob("interpreted*.py"))


@needs_triton
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_under_the_interpreter(marked):
    """In one process, since each has to import torch and Triton."""
    assert FILES
    run_interpreted(*FILES, marked=marked)


def test_the_package_imports_no_triton():
    code = "import sys, manyheads.kernels as k; k.available(); sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
