# SPDX-License-Identifier: Apache-2.0
"""Forecasts without a network: they say what their columns are, and learn from the training part alone."""

import numpy as np
import pytest

from manyheads.domains.series.naive_forecast import NaiveForecast
from manyheads.domains.series.tabular_forecast import TabularForecast
from manyheads.errors import UserError
from manyheads.recipe import Sample
from manyheads.tasks.series._forecast import Table


class Lines:
    """Windows of y = 2 last + 3 + noise, of two variables; a forecast is its numbers."""

    name = "lines"

    def __init__(self):
        rng = np.random.default_rng(0)
        self.parts = {part: [Sample(f"{part} {i}", "g", part, rng.standard_normal((6, 2))) for i in range(80)]
                      for part in ("train", "test")}  # fmt: skip
        self.asked = []

    def judged(self, part):
        self.asked.append(part)
        return self.parts[part]

    def fitting(self):
        return self.judged("train")

    def table(self, sample):
        last, season = sample.inputs.T
        kinds = np.arange(6) % 2
        rows, level = np.stack((last, season), 1), np.full(6, 0.5)
        return Table(("last", "season"), rows, kinds, level, 2 * last + 3 - 5 * kinds)

    def told(self, sample, values):
        return values

    def scores(self, samples, said):
        off = [one - self.table(sample).targets for sample, one in zip(samples, said, strict=True)]
        return [{"mse": float(np.square(x).mean())} for x in off]


def found(procedure):
    task = Lines()
    rows = list(procedure.run(task, np.random.default_rng(0)))
    assert [name for _, name, _ in rows] == [sample.name for sample in task.parts["test"]]
    return task, np.mean([value for _, _, value in rows])


def test_naive_forecasts_are_their_columns():
    for kind, column in (("last", 0), ("season", 1)):
        task, value = found(NaiveForecast(kind=kind))
        want = [np.square(s.inputs[:, column] - task.table(s).targets).mean() for s in task.parts["test"]]
        assert value == pytest.approx(np.mean(want)) and set(task.asked) == {"test"}


def test_fitted_ones_find_a_line_of_each_variable():
    _, naive = found(NaiveForecast())
    (task, ridge), (_, boosting) = found(TabularForecast()), found(TabularForecast(model="boosting"))
    assert task.asked == ["train", "test"] and ridge < 1e-3 < boosting < 0.5 < 4 < naive


def test_a_variable_that_was_never_seen_is_its_level():
    task, procedure = Lines(), TabularForecast()
    table = task.table(task.parts["test"][0])
    said = procedure.forecast(procedure.fitted(task, 0) | {}, table)
    model = procedure.fitted(task, 0)
    del model[1]
    other = procedure.forecast(model, table)
    assert (other[table.kinds == 1] == 0.5).all() and (other[table.kinds == 0] == said[table.kinds == 0]).all()


@pytest.mark.parametrize("procedure", [NaiveForecast(), TabularForecast()])
def test_a_task_that_asks_for_no_forecast(procedure):
    class Other:
        name = "digit_strings"

    with pytest.raises(UserError, match="no forecast"):
        list(procedure.run(Other(), np.random.default_rng(0)))
