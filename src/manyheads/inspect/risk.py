# SPDX-License-Identifier: Apache-2.0
"""How often a model makes answers up, with bounds; which detector tells them; and above which score not to answer."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data.known_answers import Question, known_answers, right
from ..data.texts import Text
from ..errors import UserError
from ..experiment.estimates import Estimate, estimate
from ..experiment.risk_bounds import clopper_pearson, hoeffding, mcallester, seeger
from ..experiment.rows import Metric, Row
from ..experiment.selective import area, calibration_error, candidates, controlled_threshold, risk_coverage
from ..lens import device_of
from ..progress import Progress
from ..tasks._statistics import auroc_values
from ..training.logistic import Logistic, fit_logistic
from .answers import Answer, Judge, read_answers
from .detectors import CLASSIFIERS, UNTRAINED, JudgedAnswers, judged
from .run import describe, plain_values

__all__ = ["EACH", "RiskReport", "Threshold", "built_in_questions", "read_questions", "risk_report"]

EACH = 60  # questions of each kind where none are given
_LEAST = 15  # right answers, and wrong ones
_PARTS = 3  # a third each to fit, to calibrate, and to see
_AUROC, _SHARE = Metric("auroc", ""), Metric("wrong", "", kind="share")


@dataclass(frozen=True)
class Threshold:
    """Answers whose score by a detector is above ``value`` are not to be given; ``-inf``: none is.

    Attributes:
        detector: name of the detector.
        value: of its score.
        answered: share of the answers seen afterwards that would be given.
        wrong: of those, None where none would be given.
        classifier: of the features, None of a detector that needs no training.
    """

    detector: str
    value: float
    answered: float
    wrong: Estimate | None
    classifier: Logistic | None = None

    def holds_back(self, answers: Sequence[Answer]) -> Any:
        """Bool ``[N]``: which of new ``answers`` (of :func:`.answers.read_answers`) are not to be given."""
        found = judged(answers)
        if self.classifier is None:
            return found.untrained[self.detector] > self.value
        return self.classifier(found.features[self.detector]) > self.value


@dataclass(frozen=True)
class RiskReport:
    """What was found.

    Attributes:
        run: model, settings and versions, fit for JSON.
        answers: all of them.
        kinds: for ``all`` and each kind, how many were wrong: an estimate.
        calibration: expected calibration error of the answers' probabilities.
        bounds: of the risk of all answers, by name; each holds with probability ``1 - delta``.
        auroc: of each detector within kinds; of classifiers by cross-validation.
        curves: of each detector coverage and risk, see :func:`..experiment.selective.risk_coverage`.
        thresholds: of each detector, in the order of ``auroc``.
    """

    run: dict[str, Any]
    answers: list[Answer]
    kinds: dict[str, Estimate]
    calibration: float
    bounds: dict[str, float]
    auroc: dict[str, Estimate]
    curves: dict[str, tuple[Any, Any]]
    thresholds: dict[str, Threshold]

    @property
    def chosen(self) -> Threshold:
        """The threshold of the detector that was asked for."""
        return self.thresholds[self.run["settings"]["detector"]]

    def area(self, detector: str) -> float:
        """Mean risk over all shares that could be answered, see :func:`..experiment.selective.area`."""
        return area(*self.curves[detector])

    def document(self) -> dict[str, Any]:
        """All of it, fit for JSON; what is infinite is null."""
        made: dict[str, Any] = plain_values({
            "run": self.run, "calibration_error": self.calibration, "bounds": self.bounds,
            "wrong": {kind: found.plain() for kind, found in self.kinds.items()},
            "detectors": {
                name: {
                    "auroc": found.plain(), "area": self.area(name), "threshold": self.thresholds[name].value,
                    "answered": self.thresholds[name].answered,
                    "wrong": (seen := self.thresholds[name].wrong) and seen.plain(),
                    "curve": dict(zip(("coverage", "risk"), self.curves[name], strict=True)),
                }
                for name, found in self.auroc.items()
            },
            "answers": [
                {
                    "question": a.question.text, "opening": a.question.opening, "kind": a.question.kind,
                    "level": a.question.level, "answers": a.question.answers, "said": a.text, "right": a.right,
                    "tokens": a.tokens, "entropy": a.entropy, "log_probability": a.logprob, "source_mass": a.mass,
                    "lookback": a.lookback,
                }
                for a in self.answers
            ],
        })  # fmt: skip
        return made


def built_in_questions(each: int = EACH, seed: int = 0, texts: Sequence[Text] = ()) -> list[Question]:
    """``each`` sums and facts, and as many gaps in ``texts`` where there are any."""
    kinds = ("arithmetic", "facts", *(("cloze",) if texts else ()))
    return [
        q for n, kind in enumerate(kinds) for q in known_answers(kind, each, np.random.default_rng((seed, n)), texts)
    ]


def read_questions(path: Path) -> list[Question]:
    """Questions from a JSON file: ``[{"question": ..., "answers": [...], "source": ...}, ...]``.

    ``source`` is the part of the question that has to support the answer, all of it where it is not given; ``kind`` and
    ``opening`` may be given too. An answer is right that names one of ``answers``.

    Raises:
        UserError: no such file, or other JSON.
    """
    try:
        rows = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"no such file: {path}; --questions takes a JSON list of questions") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON ({error}); --questions takes a list of questions") from None
    known = {"question", "answers", "source", "kind", "opening"}
    for row in rows if isinstance(rows, list) else [{}]:
        row = row if isinstance(row, dict) else {}
        texts = all(isinstance(row.get(name, ""), str) for name in known - {"answers"})
        if not texts or not row.get("question") or not isinstance(row.get("answers"), list) or set(row) - known:
            raise UserError(f'{path}: write questions as [{{"question": "...", "answers": ["..."]}}, ...]')
        if row.get("source", "") not in row["question"]:
            raise UserError(f"{path}: the source of a question is a part of it: {row['source'][:40]!r} is not")
    return [
        Question(
            row["question"], tuple(map(str, row["answers"])), row.get("source", ""), (), row.get("opening", ""),
            kind=row.get("kind", "questions"),
        )
        for row in rows
    ]  # fmt: skip


def risk_report(
    model: Any, tokenizer: Any, questions: Sequence[Question] | None = None, judge: Judge = right, *,
    detector: str = "both", risk: float = 0.2, delta: float = 0.1, kl: float = 0.0, tokens: int = 12, seed: int = 0,
    origin: str | None = None, command: Sequence[str] = (), progress: Progress | None = None,
) -> RiskReport:  # fmt: skip
    """Ask questions whose answers are known, and say how the wrong answers could be told and held back.

        report = risk_report(model, tokenizer, risk=0.3)
        report.bounds["Clopper-Pearson"], report.auroc["both"], report.chosen.answered

    A threshold comes from three thirds of the answers, of the same kinds: the first fits the classifier and says which
    thresholds are tried, the second chooses among them (:func:`..experiment.selective.controlled_threshold`), the third
    is what ``answered`` and ``wrong`` are of.

    Args:
        model: a causal language model, on the device to use.
        tokenizer: its tokenizer.
        questions: sums and facts of our own when None.
        judge: whether an answer to a question is right: any function of both.
        detector: whose threshold is the chosen one: of :mod:`.detectors`.
        risk: share of wrong ones among the answers given, at most.
        delta: probability with which that, and each bound, may fail.
        kl: KL divergence in nats of what was trained on these questions from what was fixed before
            (:func:`..experiment.risk_bounds.gaussian_kl`); 0 for a model that never saw them.
        tokens: of an answer, at most.
        seed: of the questions and the thirds.
        origin: what the model is called.
        command: what was typed.
        progress: called with how far the run is.

    Raises:
        UserError: anything that the caller can mend.
    """
    begun, say = time.perf_counter(), progress or (lambda done, total, message: None)
    if not (0 < risk < 1 and 0 < delta < 1):
        raise UserError(f"risk and delta lie between 0 and 1, not {risk} and {delta}")
    if detector not in (*UNTRAINED, *CLASSIFIERS):
        raise UserError(f"there is no detector {detector!r}; there are {', '.join((*UNTRAINED, *CLASSIFIERS))}")
    asked = list(built_in_questions(seed=seed) if questions is None else questions)
    answers = read_answers(
        model, tokenizer, asked, judge, tokens=tokens, say=lambda done: say(done, len(asked), "answers are looked at")
    )
    found = judged(answers) if answers else None
    wrong = 0 if found is None else int(found.wrong.sum())
    if found is None or min(wrong, len(answers) - wrong) < _LEAST:
        raise UserError(
            f"{wrong} of {len(answers)} answers are wrong: with fewer than {_LEAST} wrong or right ones nothing can "
            "be told; give more questions, or such as the model gets right and wrong, with --questions"
        )
    rng = np.random.default_rng(seed)
    part, n = found.parts(_PARTS, rng), len(answers)
    run = describe(model, [], [Text(a.question.kind, a.question.text) for a in answers], origin, command)
    run["settings"] = {
        "detector": detector, "risk": risk, "delta": delta, "kl": kl, "tokens": tokens, "seed": seed,
        "questions": n, "device": str(device_of(model)),
    }  # fmt: skip
    names = [*UNTRAINED, *CLASSIFIERS]
    scores = {name: found.crossed(name, part, rng) for name in names}
    report = RiskReport(
        run, answers,
        {kind: _estimate(found.wrong, found.origin, _SHARE, (found.kind == kind) | (kind == "all"))
         for kind in ("all", *np.unique(found.kind))},
        calibration_error(found.confidence, ~found.wrong),
        _bounds(wrong, n, kl, delta),
        {name: _auroc(found, scores[name], part) for name in names},
        {name: risk_coverage(scores[name], found.wrong) for name in names},
        {name: _threshold(found, name, part, risk, delta, rng) for name in names},
    )  # fmt: skip
    say(1, 1, "")
    run["seconds"] = round(time.perf_counter() - begun, 2)
    return report


def _bounds(wrong: int, n: int, kl: float, delta: float) -> dict[str, float]:
    """Bounds of the risk of all answers; those of a model that never saw the questions only where it did not."""
    unseen = {"Clopper-Pearson": clopper_pearson(wrong, n, delta)[1], "Hoeffding": hoeffding(wrong / n, n, delta)}
    bayes = {
        f"PAC-Bayes, {name}": of(wrong / n, n, kl, delta) for name, of in (("kl", seeger), ("McAllester", mcallester))
    }
    return {**(unseen if kl == 0 else {}), **bayes}


def _estimate(values: Any, origin: Any, metric: Metric, where: Any) -> Estimate:
    rows = [
        Row(task="risk", metric=metric.name, arm="model", value=float(values[i]), sample=f"{i}", context=origin[i])
        for i in np.flatnonzero(where)
    ]
    return estimate(rows, metric)


def _auroc(found: JudgedAnswers, score: Any, part: Any) -> Estimate:
    """AUROC over pairs of one kind and of one part of the cross-validation."""
    stratum = np.array([f"{kind}/{k}" for kind, k in zip(found.kind, part, strict=True)])
    values = auroc_values(score, found.wrong, stratum)
    if not np.isfinite(values).all():
        raise UserError("no kind of question has right and wrong answers: give more questions of each")
    return _estimate(values, found.origin, _AUROC, np.full(len(values), True))


def _threshold(found: JudgedAnswers, name: str, part: Any, risk: float, delta: float, rng: Any) -> Threshold:
    fit, calibrate, see = (np.flatnonzero(part == k) for k in range(_PARTS))
    classifier = None
    if name in CLASSIFIERS:
        classifier = fit_logistic(found.features[name][fit], found.wrong[fit], rng)
        own = found.scores(name, fit, fit, rng)[0]
        score = classifier(found.features[name])
    else:
        own, score = found.untrained[name][fit], found.untrained[name]
    value = controlled_threshold(score[calibrate], found.wrong[calibrate], candidates(own), risk, delta)
    given = np.isin(np.arange(len(score)), see) & (score <= value)
    wrong = _estimate(found.wrong, found.origin, _SHARE, given) if given.any() else None
    return Threshold(name, value, float(given.sum() / len(see)), wrong, classifier)
