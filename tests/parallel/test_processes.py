# SPDX-License-Identifier: Apache-2.0
"""Processes that stay up: results by rank, errors as they were, limits that hold, nothing left running."""

import multiprocessing
import time

import pytest
import torch

from manyheads.errors import UserError
from manyheads.parallel import Processes

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from parallel import processes_worker as worker


def running():
    return {process for process in multiprocessing.active_children() if process.is_alive()}


@pytest.fixture
def before():
    """Processes of other tests."""
    return running()


def test_results_by_rank_and_errors_of_the_user(before):
    with Processes(2, node=1) as pool:
        found = pool.run(worker.answer, 7)
        assert [one["rank"] for one in found] == [0, 1]
        assert all(one == {"rank": r, "size": 2, "node": 1, "sum": 3.0, "given": 7} for r, one in enumerate(found))
        assert [one["given"] for one in pool.run(worker.answer, 8)] == [8, 8]  # it stays up
        assert len(running() - before) == 2  # the control: they would be seen
        with pytest.raises(UserError, match=r"^give it something else$"):
            pool.run(worker.refuse)
        with pytest.raises(RuntimeError, match="have ended"):
            pool.run(worker.answer, 7)
    assert running() == before


def test_groups_are_made_once_for_all_worlds(processes):
    """Each has threads that wait; a model that is used again and again had more of them every time."""
    for names in processes(4).run(worker.pairs_asked_for, 3):
        assert len(set(names)) == 1
    first, second, third, fourth = (names[0] for names in processes(4).run(worker.pairs_asked_for, 1))
    assert first == second != third == fourth  # the control: other pairs have others


def test_other_errors_carry_the_traceback_of_their_process(before):
    with Processes(2) as pool, pytest.raises(RuntimeError, match=r"process 1:\n(?s:.*)in fail(?s:.*)it is zero here"):
        pool.run(worker.fail)
    assert running() == before


def test_a_process_that_hangs_ends_at_the_limit(before):
    with Processes(1, limit=1.0) as pool:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"processes \[0\] did not finish within 1 s"):
            pool.run(worker.hang)
        assert 1.0 <= time.monotonic() - start < 30
    assert running() == before


def test_a_process_that_ended_is_told(before):
    with Processes(1) as pool, pytest.raises(RuntimeError, match="process 0 ended"):
        pool.run(worker.die)
    assert running() == before


def test_what_cannot_start_is_refused():
    with pytest.raises(UserError, match="at least 1"):
        Processes(0)
    if torch.cuda.device_count() < 64:
        with pytest.raises(UserError, match="nccl wants a GPU for each of 64"):
            Processes(64, "nccl")
    with pytest.raises(RuntimeError, match="open them with `with`"):
        Processes(2).run(worker.answer, 7)
