# SPDX-License-Identifier: Apache-2.0
"""Will they donate? The outcome of a dialogue by its beginning, with the resisting strategies in it and without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from ...data.persuasion import Dialogue, donated, persuasions
from ...errors import UserError, refusal
from ...experiment import Metric, Row, RunContext, Task, WorkUnit
from .._folds import by_hash
from .._statistics import auroc_values

__all__ = ["PersuasionOutcome"]

_FOLDS = 10
_KINDS = ("text", "strategies", "both", "length")


@dataclass(frozen=True, kw_only=True)
class PersuasionOutcome(Task):
    """Logistic regression says from the first ``share`` of the turns of PersuasionForGood whether a donation is made.

    ``seen`` among the ``options`` of an arm is what it reads: ``text`` (TF-IDF of the words, of each side apart),
    ``strategies`` (how often each occurs among the persuadee's turns, as annotated by people, not as a model labels
    them), ``both``, or ``length``, the number of turns of each side and of their words: a control. Ten folds by
    dialogue; penalties are chosen by threefold cross-validation within the training part. The area under the ROC curve
    is of the pairs of a fold; a dialogue's value is the area and what the dialogue adds to its deviation.

    The paper has neural models of the sequence of strategies; here they are counted.

    Attributes:
        share: of the turns that are read, from the first.
        only: names of the arms that are measured; all when empty.
    """

    subject: ClassVar[str] = "trainable"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("auc", "area under the ROC curve", higher=True, floor=0.5,
               what="a dialogue's value is the area and what it adds to its deviation"),
    )  # fmt: skip

    share: float = 0.6
    only: tuple[str, ...] = ()
    label: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError("share is the part of a dialogue that is read, above 0 and at most 1")

    def unsupported_reason(self, run: RunContext) -> str | None:
        return refusal(lambda: (persuasions(), donated()))

    def units(self, run: RunContext) -> list[WorkUnit]:
        return [
            WorkUnit(self.key, arm.key, 30.0, f"{arm.key}: outcome of dialogues", {"arm": arm.key})
            for arm in run.arms if not self.only or arm.name in self.only
        ]  # fmt: skip

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        arm = run.arm_of(unit)
        if (seen := str(arm.options.get("seen", ""))) not in _KINDS:
            raise UserError(f"{arm.key}: the option seen of an arm of {self.name} is one of {', '.join(_KINDS)}")
        gave = donated()
        dialogues = sorted(persuasions(), key=lambda one: by_hash(one.name))
        right, part = np.array([gave[one.name] for one in dialogues]), np.arange(len(dialogues)) % _FOLDS
        odds = np.empty(len(dialogues))
        for fold in range(_FOLDS):
            train = [one for one, p in zip(dialogues, part, strict=True) if p != fold]
            test = [one for one, p in zip(dialogues, part, strict=True) if p == fold]
            odds[part == fold] = self.odds(seen, train, right[part != fold], test)
            run.advance(30.0 / _FOLDS)
        for one, value in zip(dialogues, auroc_values(odds, right, part), strict=True):
            yield self.row("auc", arm, value, one.name)

    def odds(self, seen: str, train: Sequence[Dialogue], right: Any, test: Sequence[Dialogue]) -> Any:
        """Log-odds of a donation in ``test [N]``, by a model of ``train`` and whether there was one in those."""
        from sklearn.linear_model import LogisticRegressionCV
        from sklearn.pipeline import make_pipeline, make_union

        parts = {
            "text": [_words(True), _words(False)], "strategies": [_numbers(_strategies)], "length": [_numbers(_length)],
        }  # fmt: skip
        parts["both"] = [*parts["text"], *parts["strategies"]]
        chosen = LogisticRegressionCV(
            Cs=(0.1, 1.0, 10.0), cv=3, scoring="neg_log_loss", max_iter=500, l1_ratios=(0,), use_legacy_attributes=False
        )
        model = make_pipeline(make_union(*parts[seen]), chosen)
        read, asked = ([self.beginning(one) for one in some] for some in (train, test))
        return model.fit(read, right).decision_function(asked)

    def beginning(self, dialogue: Dialogue) -> Dialogue:
        """Its first turns, one at least."""
        return Dialogue(dialogue.name, dialogue.turns[: max(1, int(self.share * len(dialogue.turns)))])


def _words(own: bool) -> Any:
    """From dialogues to TF-IDF of what one side says."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(
        preprocessor=lambda one: " ".join(turn.text.lower() for turn in one.turns if turn.own == own), min_df=2,
        sublinear_tf=True,
    )  # fmt: skip


def _numbers(of: Any) -> Any:
    """From dialogues to what ``of`` counts in one, standardised."""
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    return make_pipeline(
        FunctionTransformer(lambda some: [of(one) for one in some]), DictVectorizer(sparse=False), StandardScaler()
    )


def _strategies(dialogue: Dialogue) -> dict[str, float]:
    """Share of the persuadee's turns that have each label."""
    labels = [turn.label for turn in dialogue.turns if turn.own]
    return {label: labels.count(label) / len(labels) for label in labels}


def _length(dialogue: Dialogue) -> dict[str, float]:
    """Turns of each side, and their words."""
    found: dict[str, float] = {}
    for name, own in (("own", True), ("other", False)):
        texts = [turn.text for turn in dialogue.turns if turn.own == own]
        found |= {f"{name} turns": float(len(texts)), f"{name} words": float(len(" ".join(texts).split()))}
    return found
