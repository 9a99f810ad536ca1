# SPDX-License-Identifier: Apache-2.0
"""What the tasks of APB measure: one host by itself, what processes count, and the retaining heads of an arm."""

import pytest
import torch

import manyheads
import tolerance
from manyheads.experiment import Arm, RunContext
from manyheads.experiment.subjects import subject
from manyheads.parallel import Processes
from manyheads.parallel.apb import Blocks
from manyheads.tasks.parallel import _host as host
from manyheads.tasks.parallel.passing_cost import PassingCost

APB = "apb:hosts=4,query=8,anchor=6,passed=3"


@torch.inference_mode()
def test_one_host_computes_what_it_would_among_others():
    model = host.llama(2, "cpu", 128, small=True)
    ids = torch.randint(512, (1, 60), generator=torch.Generator().manual_seed(0))
    with host.one_host(model, manyheads.parse(APB), ids, 0) as read:
        assert tolerance.error(read(), model(ids[:, :13]).last_hidden_state) < tolerance.SAME
    nothing = manyheads.parse("apb:hosts=4,query=8,anchor=6,passed=0")
    with manyheads.use(model, nothing):
        whole = model(ids).last_hidden_state
    with host.one_host(model, nothing, ids, 2) as read:  # no other host gives it anything
        assert tolerance.error(read(), whole[:, 26:39]) < tolerance.SAME
    with host.one_host(model, manyheads.parse(APB), ids, 2) as read:  # the control: zeros that are passed
        assert tolerance.error(read(), whole[:, 26:39]) > 1e-3
    with host.one_host(model, nothing, ids, 3) as read:
        assert read().shape == (1, 13 + 8, 64)


@pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)
def test_bytes_are_counted_where_they_arrive():
    ring = Arm("ring", options={"ring": True})
    arms = (Arm("one"), ring, Arm("apb", APB))
    task, run = PassingCost(processes=(2,), tokens=(96,)), RunContext(subject("processes"), arms)
    rows = {(row.metric, row.arm): row.value for row in task.measure(run, task.units(run)[0])}
    kv, asked, part = 2 * 2 * 16 * 2, 8 * 16 * 2, 8 * 17 * 4
    blocks = Blocks.of(96, 2, 8, 6, 3)
    assert rows["passed", "apb"] == 3 * kv
    assert rows["received", "apb"] == max(blocks.received(h, kv, asked, part) for h in (0, 1)) == 3 * kv + 8 * part
    assert rows["passed", "ring"] == rows["received", "ring"] == blocks.ring(kv) == 48 * kv
    assert rows["pairs", "one"] == 1 and rows["pairs", "ring"] == 0.5
    with Processes(2, limit=120) as pool:
        for spec in (APB, ""):
            assert all(len(times) == 1 and times[0] > 0 for times in pool.run(host.together, spec, 1, 64, 1))
