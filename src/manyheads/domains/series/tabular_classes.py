# SPDX-License-Identifier: Apache-2.0
"""Classifiers of scikit-learn, which every trained network has to beat: logistic regression, or gradient boosting.

Each window is a row: of every channel its last value, its mean and deviation, and how far it went from the first frame.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...errors import UserError
from ...recipe import Procedure, Sample

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TabularClasses"]

_WINDOWS = 8000  # that are fitted to, at most


@dataclass(frozen=True, kw_only=True)
class TabularClasses(Procedure):
    """Logistic regression or gradient boosting on four numbers of each channel of a window.

    Attributes:
        model: ``logistic`` or ``boosting``.
    """

    task: ClassVar[str] = "order_book"

    model: Literal["logistic", "boosting"] = field(default="logistic", metadata={"help": "logistic or boosting"})

    def run(self, task: Any, rng: "np.random.Generator") -> Iterable[tuple[str, str, float]]:
        if not hasattr(task, "classes"):
            raise UserError(f"tabular_classes: {task.name} asks for no class: give --task order_book")
        samples, seed = task.judged("test"), int(rng.integers(2**31))
        said = self.said(task, samples, task.samples("train")[:_WINDOWS], seed)
        return self.scored(task, samples, said)

    def said(self, task: Any, samples: Sequence[Sample], seen: Sequence[Sample], seed: int) -> list[Any]:
        """What a model that is fitted to ``seen`` says of ``samples``."""
        import numpy as np
        import torch

        try:
            from sklearn.ensemble import HistGradientBoostingClassifier
            from sklearn.linear_model import LogisticRegression
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import StandardScaler
        except ImportError as error:
            raise UserError("tabular_classes needs scikit-learn: pip install 'manyheads[train]'") from error
        model: Any = (
            make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
            if self.model == "logistic"
            else HistGradientBoostingClassifier(
                learning_rate=0.05, max_leaf_nodes=15, min_samples_leaf=40, early_stopping=True, random_state=seed
            )
        )
        labels = [task.classes.index(one.target) for one in seen]
        model.fit(np.stack([_row(one) for one in seen]), labels)
        found = np.full((len(samples), len(task.classes)), 1e-9)
        found[:, model.classes_] = model.predict_proba(np.stack([_row(one) for one in samples])).clip(1e-9)
        log_probs = torch.from_numpy(np.log(found)).float().log_softmax(-1)
        return [task.judgement(row[None]) for row in log_probs]


def _row(sample: Sample) -> Any:
    """``[4 * channels]`` of a window ``[frames, channels]``."""
    import torch

    x = sample.inputs.double()
    return torch.cat((x[-1], x.mean(0), x.std(0, correction=0), x[-1] - x[0])).numpy()
