# SPDX-License-Identifier: Apache-2.0
"""Values among filler: learned in a few steps where the filler can be looked through, and not through a window."""

from manyheads.experiment import Arm
from manyheads.tasks.training.planted_values import PlantedValues

from .conftest import SOFTMAX, values


def test_a_model_that_sees_the_values_recalls_them(measured):
    task = PlantedValues(
        dim=32, layers=1, heads=2, length=20, batch=32, steps=150, rates=(1e-2,), samples=64, times=(1, 2), tokens=6,
        values=3,
    )  # fmt: skip
    results = measured(task, arms=(SOFTMAX, Arm("blind", "softmax:window=2")))
    share = {}
    for arm, _, _, at, value in values(results, "recalled"):
        share.setdefault((arm, at["times"]), []).append(value)
    mean = {key: sum(some) / len(some) for key, some in share.items()}
    assert mean["softmax", 1] > 0.9 and mean["blind", 1] < 0.6
