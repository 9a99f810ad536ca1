# SPDX-License-Identifier: Apache-2.0
"""Tests under Triton's interpreter, which has to be asked for before Triton is imported: a process of their own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run_interpreted(*names: str, marked: str) -> None:
    """Run the tests in ``names``, files beside this one, in one process, which imports Triton once.

    ``marked`` is the expression of marks by which they are taken.
    """
    here = Path(__file__).parent
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-m",
            marked,
            "-p",
            "no:cacheprovider",
            "-p",
            "no:unraisableexception",
            *[str(here / name) for name in names],
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
