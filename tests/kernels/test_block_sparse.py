# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention's kernels without a GPU: Triton's interpreter, which has to be asked for before the import."""

from kernels.interpreter import needs_triton, run_interpreted


@needs_triton
def test_kernels_under_the_interpreter():
    run_interpreted("interpreted_block_sparse.py")
