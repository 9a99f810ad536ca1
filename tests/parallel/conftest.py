# SPDX-License-Identifier: Apache-2.0
"""Processes that are started once for all tests of this folder, by how many there are."""

import pytest

_pools = {}


@pytest.fixture(scope="session")
def processes():
    """Asked with a number, a pool of so many; one that a failure has ended is started again."""
    from manyheads.parallel import Processes
    from parallel import shared_worker

    def pool(size):
        if size not in _pools or not _pools[size]._pipes:
            made = _pools[size] = Processes(size, limit=300).__enter__()
            made.run(shared_worker.warm)
            made.limit = 60
        return _pools[size]

    return pool


def pytest_runtest_teardown(nextitem):
    """Processes end with the folder's last test: groups of gloo that wait take time of tests elsewhere."""
    if nextitem is None or "tests/parallel/" not in nextitem.path.as_posix():
        while _pools:
            _pools.popitem()[1].__exit__(None, None, None)
