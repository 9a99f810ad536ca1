# SPDX-License-Identifier: Apache-2.0
"""What tasks that train small models share: progress."""

from types import SimpleNamespace

from manyheads.experiment import Arm
from manyheads.experiment.rows import WorkUnit
from manyheads.tasks.lenses import _trained
from manyheads.tasks.lenses._trained import told
from oracles.tasks import context
from tolerance import nearly


def test_progress_is_told_every_twenty_steps_and_leaves_a_tenth_for_judging():
    run, said = context(Arm("full")), []
    run.advance = said.append
    unit = WorkUnit("task", "training", 100.0)
    on_step = told(run, unit, 100)
    for step in range(1, 101):
        on_step(SimpleNamespace(step=step))
    assert said == nearly([18.0] * 5) and sum(said) == nearly(0.9 * unit.cost)
    assert _trained._EVERY == 20
