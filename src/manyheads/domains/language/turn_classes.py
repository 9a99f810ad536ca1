# SPDX-License-Identifier: Apache-2.0
"""Labels of turns without a network of ours, which every trained model has to beat.

``by=words`` is logistic regression on TF-IDF of words and pairs of them, ``by=meaning`` on mean states of the published
encoder that trained models read, each turn by itself; ``by=prior`` says the commonest label of all. How far weights are
held back, and whether rare labels count more, is chosen on the validation part by the task's first metric.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ...errors import UserError
from ...recipe import Procedure, Sample

if TYPE_CHECKING:
    import numpy as np

__all__ = ["TurnClasses"]

_TRIED = tuple((c, weight) for c in (1.0, 10.0) for weight in (None, "balanced"))  # 1 / penalty, weight of classes


@dataclass(frozen=True, kw_only=True)
class TurnClasses(Procedure):
    """Logistic regression of scikit-learn on the words or the meaning of a turn, or the commonest label.

    Attributes:
        by: ``words``, ``meaning`` or ``prior``.
    """

    task: ClassVar[str] = "resisting_strategies"

    by: Literal["words", "meaning", "prior"] = field(
        default="words", metadata={"help": "TF-IDF, mean states of a published encoder, or the commonest label"}
    )

    def run(self, task: Any, rng: "np.random.Generator") -> Iterable[tuple[str, str, float]]:
        if not hasattr(task, "judgement") or not hasattr(task, "meanings"):
            raise UserError(f"turn_classes: {task.name} has no turns: give --task resisting_strategies")
        samples = task.judged("test")
        return self.scored(task, samples, self.said(task, samples))

    def said(self, task: Any, samples: Sequence[Sample]) -> list[Any]:
        """What the best classifier on the validation part says of ``samples``."""
        try:
            from sklearn.dummy import DummyClassifier
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
        except ImportError as error:
            raise UserError("turn_classes needs scikit-learn: pip install 'manyheads[train]'") from error
        seen, held = task.samples("train"), task.judged("validation")
        labels = [label for sample in seen for label in _of_own(sample, sample.target)]
        words: Any = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
        if self.by == "words":
            words.fit([text for sample in seen for text in _of_own(sample, sample.inputs)])

        def rows(some: Sequence[Sample]) -> Any:
            if self.by == "words":
                return words.transform([text for sample in some for text in _of_own(sample, sample.inputs)])
            return task.meanings(some)

        if self.by == "prior":
            fitted = [DummyClassifier(strategy="prior").fit([[0]] * len(labels), labels)]
            return _told(task, fitted[0], samples, [[0]] * sum(sum(s.about["own"]) for s in samples))
        fitted = [
            LogisticRegression(C=c, class_weight=weight, max_iter=300).fit(rows(seen), labels) for c, weight in _TRIED
        ]
        name, given = task.metrics[0].name, rows(held)

        def score(model: Any) -> float:
            return mean(float(one[name]) for one in task.scores(held, _told(task, model, held, given)))

        return _told(task, max(fitted, key=score), samples, rows(samples))


def _of_own(sample: Sample, values: Sequence[str]) -> list[str]:
    return [value for value, own in zip(values, sample.about["own"], strict=True) if own]


def _told(task: Any, model: Any, samples: Sequence[Sample], rows: Any) -> list[Any]:
    """Predictions of dialogues by rows of their own turns."""
    import numpy as np
    import torch

    found = np.full((rows.shape[0] if hasattr(rows, "shape") else len(rows), len(task.classes)), 1e-9)
    found[:, [task.classes.index(label) for label in model.classes_]] = model.predict_proba(rows).clip(1e-9)
    parts = torch.from_numpy(np.log(found)).float().split([sum(sample.about["own"]) for sample in samples])
    return [task.judgement(sample, part) for sample, part in zip(samples, parts, strict=True)]
