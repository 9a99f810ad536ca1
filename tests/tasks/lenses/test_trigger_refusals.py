# SPDX-License-Identifier: Apache-2.0
"""Refusals by number of heads: units repeat to the bit, arms are tuned from one model, random heads are others."""

from manyheads.experiment import Arm
from manyheads.tasks.lenses.trigger_refusals import TriggerRefusals, _at_random
from oracles.tasks import context, values

TASK = TriggerRefusals(
    layers=2, heads=4, dim=16, batch=20, steps=30, tuning=10, counts=(1, 8), prompts=16, draws=1, length=10
)  # fmt: skip
ARMS = Arm("plain"), Arm("AHD", options={"dropout": 0.5})


def test_a_unit_gives_the_same_rows_in_any_order_and_arms_differ():
    run, other = context(*ARMS), context(*ARMS)
    first, second = TASK.units(run)
    plain, dropped = list(TASK.measure(run, first)), list(TASK.measure(run, second))
    assert list(TASK.measure(other, second)) == dropped  # though nothing ran before it
    assert [row.sample for row in plain] == [row.sample for row in dropped]
    assert (values(plain, "score_share") != values(dropped, "score_share")).any()
    for name in ("refused", "wrongly_refused"):
        # With all eight heads out, which were drawn does not matter.
        assert (values(plain, name, heads=8, chosen="ranked") == values(plain, name, heads=8, chosen="random")).all()
    assert len(values(plain, "refused", chosen="none")) == 16 and len(values(plain, "copied")) == 32


def test_random_heads_are_others_of_the_same_layers():
    (drawn,) = _at_random([("0.1", "1.2", "1.0")], 2, 4, draw=0)
    assert sorted(name[0] for name in drawn) == ["0", "1"] and not {"0.1", "1.2"} & set(drawn)
    assert len({tuple(_at_random([("0.1",)], 1, 4, draw)[0]) for draw in range(20)}) > 1
