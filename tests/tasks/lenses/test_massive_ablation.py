# SPDX-License-Identifier: Apache-2.0
"""Massive activations replaced: zeroing hurts, control and means hardly do, and without any there is no task."""

from manyheads.experiment import Arm, CausalLM
from manyheads.tasks.lenses.massive_ablation import MassiveAblation
from oracles.tasks import context, rows, values

ARMS = Arm("full"), *(Arm(how, options={"replace": how}) for how in ("zero", "mean", "control")), Arm("other", "ablate")
TASK = MassiveAblation(tokens=64, windows_of=3, text="code", ratio=100.0, draws=1)


def test_what_replacing_costs():
    run = context(*ARMS, subject=CausalLM("default"))
    assert TASK.unsupported_reason(run) is None
    found = rows(TASK, run)
    assert {row.arm for row in found} == {"full", "zero", "mean", "control"}
    assert (values(found, "added_nll", "full") == 0).all()
    zero, mean, control = (values(found, "added_nll", arm).mean() for arm in ("zero", "mean", "control"))
    assert zero > 0.05 and abs(mean) < zero / 2 and abs(control) < zero / 2
    assert (values(found, "max_to_median") > 100).all()
    far = MassiveAblation(tokens=64, windows_of=3, text="code", ratio=1e6)
    assert "no activation reaches" in far.unsupported_reason(run)
