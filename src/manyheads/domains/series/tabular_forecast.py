# SPDX-License-Identifier: Apache-2.0
"""Forecasts of scikit-learn, which every trained network has to beat: ridge regression, or gradient boosting.

Each number that is forecast is a row of a few columns, as the task has them: the last value, that of a season before,
level and deviation of the history, how far ahead. What is fitted is the difference from that level. Each variable has
a model of its own, fitted to the windows of the training part. The strength of the ridge is chosen by generalised
cross-validation, boosting stops where a tenth of the rows that is held out gets no better.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...errors import UserError
from ...recipe import Procedure

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TabularForecast"]


@dataclass(frozen=True, kw_only=True)
class TabularForecast(Procedure):
    """Ridge regression or gradient boosting on a few features.

    Attributes:
        model: ``ridge`` or ``boosting``.
    """

    task: ClassVar[str] = "irregular_forecast"

    model: Literal["ridge", "boosting"] = field(default="ridge", metadata={"help": "ridge or boosting"})

    def run(self, task: Any, rng: "np.random.Generator") -> Iterable[tuple[str, str, float]]:
        if not hasattr(task, "table"):
            raise UserError(f"tabular_forecast: {task.name} asks for no forecast: give --task irregular_forecast")
        seed = int(rng.integers(2**31))
        fitted = self.fitted(task, seed)
        samples = task.judged("test")
        said = [task.told(sample, self.forecast(fitted, task.table(sample))) for sample in samples]
        return self.scored(task, samples, said)

    def fitted(self, task: Any, seed: int) -> dict[int, Any]:
        """A model of each variable, fitted to the training part."""
        import numpy as np

        try:
            from sklearn.ensemble import HistGradientBoostingRegressor
            from sklearn.linear_model import RidgeCV
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise UserError("tabular_forecast needs scikit-learn: pip install 'manyheads[train]'") from error
        tables = [task.table(sample) for sample in task.fitting()]
        features, kinds, level, targets = (
            np.concatenate([getattr(one, name) for one in tables]) for name in ("features", "kinds", "level", "targets")
        )
        found = {}
        for kind in np.unique(kinds):
            model: Any = (
                make_pipeline(StandardScaler(), RidgeCV(np.logspace(-2, 5, 15)))
                if self.model == "ridge"
                else HistGradientBoostingRegressor(
                    learning_rate=0.05, max_leaf_nodes=15, min_samples_leaf=40, early_stopping=True, random_state=seed
                )
            )
            found[int(kind)] = model.fit(features[kinds == kind], (targets - level)[kinds == kind])
        return found

    def forecast(self, fitted: dict[int, Any], table: Any) -> Any:
        """The numbers of a table ``[n]``; the level of a variable that was never seen in training."""
        found = table.level.copy()
        for kind, model in fitted.items():
            if (rows := table.kinds == kind).any():
                found[rows] += model.predict(table.features[rows])
        return found
