# SPDX-License-Identifier: Apache-2.0
"""Ridge and boosting: what each can learn of one variable and the other cannot."""

import numpy as np
import pytest

from manyheads.domains.series.tabular_forecast import TabularForecast
from manyheads.tasks.series._forecast import Table


class One:
    """Windows of one variable, whose target is a function of its last value."""

    def __init__(self, of):
        self.of, self.rng = of, np.random.default_rng(1)

    def fitting(self):
        return [self.rng.uniform(-2, 2, (40, 1)) for _ in range(30)]

    def table(self, rows):
        level = np.zeros(len(rows))
        return Table(("last",), rows, np.zeros(len(rows), int), level, self.of(rows[:, 0]))


@pytest.mark.parametrize(("of", "better"), [(lambda x: 3 * x, "ridge"), (np.abs, "boosting")])
def test_a_line_is_the_ridges_and_a_bend_is_the_boostings(of, better):
    errors = {}
    for model in ("ridge", "boosting"):
        task, procedure = One(of), TabularForecast(model=model)
        fitted = procedure.fitted(task, 0)
        table = task.table(task.fitting()[0])
        errors[model] = np.square(procedure.forecast(fitted, table) - table.targets).mean()
    worse = next(name for name in errors if name != better)
    assert errors[better] < 0.1 * errors[worse]
