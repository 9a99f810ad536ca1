# SPDX-License-Identifier: Apache-2.0
"""Forecasts that need no training, which every trained model has to beat.

The last value that was observed; or, with ``kind=season``, the value of a season before: what was observed nearest to a
whole horizon before the time that is asked for.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...errors import UserError
from ...recipe import Procedure

if TYPE_CHECKING:
    import numpy as np

__all__ = ["NaiveForecast"]


@dataclass(frozen=True, kw_only=True)
class NaiveForecast(Procedure):
    """The last value, or that of a season before.

    Attributes:
        kind: ``last`` or ``season``.
    """

    task: ClassVar[str] = "irregular_forecast"

    kind: Literal["last", "season"] = field(
        default="last", metadata={"help": "the last value, or that of a season before"}
    )

    def run(self, task: Any, rng: "np.random.Generator") -> Iterable[tuple[str, str, float]]:
        if not hasattr(task, "table"):
            raise UserError(f"naive_forecast: {task.name} asks for no forecast: give --task irregular_forecast")
        samples = task.judged("test")
        said = [task.told(sample, task.table(sample).column(self.kind)) for sample in samples]
        return self.scored(task, samples, said)
