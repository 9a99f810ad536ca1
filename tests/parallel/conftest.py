# SPDX-License-Identifier: Apache-2.0
"""Processes that are started once for all tests, by how many there are."""

import contextlib

import pytest


@pytest.fixture(scope="session")
def processes():
    """Asked with a number, a pool of so many; one that a failure has ended is started again.

    What takes long where other programs run too is to import transformers, once for each process.
    """
    from manyheads.parallel import Processes
    from parallel import shared_worker

    with contextlib.ExitStack() as stack:
        pools = {}

        def pool(size):
            if size not in pools or not pools[size]._pipes:
                made = pools[size] = stack.enter_context(Processes(size, limit=300))
                made.run(shared_worker.warm)
                made.limit = 60
            return pools[size]

        yield pool
