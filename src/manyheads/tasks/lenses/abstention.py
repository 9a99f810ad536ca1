# SPDX-License-Identifier: Apache-2.0
"""How well made-up answers are told from right ones, and whether thresholds and bounds keep what they promise.

A model answers questions whose answers are known (:mod:`manyheads.data.known_answers`). An arm is a detector of its
wrong answers: one that needs no training, a classifier, ``random`` numbers, ``level``, which knows how hard
questions of a level are and nothing of the answer, or ``shuffled``: the classifier of both kinds of features, fitted to
and judged by labels that were shuffled within each kind of question.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np

from ...data.known_answers import known_answers
from ...errors import UserError
from ...experiment import Arm, CausalLM, Metric, Row, RunContext, Task, WorkUnit
from ...experiment.risk_bounds import clopper_pearson, hoeffding, massart, mcallester, rademacher, seeger
from ...experiment.selective import candidates, conformal_threshold, controlled_threshold
from ...inspect.answers import read_answers
from ...inspect.detectors import UNTRAINED, JudgedAnswers, judged, split
from .._statistics import auroc_values
from ..text._text_task import model_of

__all__ = ["Abstention"]

_PARTS = 4  # of the cross-validation
_LEAST = 20  # wrong answers, and right ones, below which nothing is told
_FIXED: dict[str, Callable[[int, int, float], float]] = {
    "clopper_pearson": lambda wrong, n, delta: clopper_pearson(wrong, n, delta)[1],
    "hoeffding": lambda wrong, n, delta: hoeffding(wrong / n, n, delta),
    "mcallester": lambda wrong, n, delta: mcallester(wrong / n, n, 0.0, delta),
    "kl": lambda wrong, n, delta: seeger(wrong / n, n, 0.0, delta),
}


@dataclass(frozen=True, kw_only=True)
class Abstention(Task):
    """Values of answers, and of draws of a calibration.

    ``auroc`` counts pairs of a wrong and a right answer to questions of one kind (and of one part of the
    cross-validation), so that a detector gains nothing by telling kinds apart; its values are those of DeLong. It is
    given over all kinds and for each; for ``one level`` only pairs of the same level count, so that none gains
    by telling hard questions from easy ones. Of thresholds, ``answered_risk``, ``answered`` and ``false_alarm`` are of
    questions that were not calibrated on: of one half, whose detector and candidates come from the other half, a random
    half calibrates and the rest is answered or not, again and again; a value stands for one question. Where nothing was
    answered at all the risk is 0, so it says nothing without ``answered``.

    ``risk_kept`` and ``bound_holds`` ask for the guarantee itself, which is of the true risk: answers are drawn anew,
    with replacement, from those of a half, in which the true risk is known. ``rule`` of thresholds is ``controlled``,
    or ``plain``: the loosest whose risk in the calibration is as wanted. Bounds are of the error of a rule *flag the
    answer when this score is above that* which was ``fixed`` beforehand, or ``chosen`` by the same draw among all
    detectors and candidates; ``clopper_pearson`` of a chosen rule does not know that it was chosen.

    Attributes:
        questions: of each kind.
        kinds: of questions.
        tokens: of an answer, at most.
        risk, delta: what the controlled threshold promises, and with which probability it may fail.
        alarm: of the conformal threshold.
        bound_delta: of the bounds.
        splits: of a half into calibration and use.
        draws: of answers with replacement.
    """

    subject: ClassVar[str] = "causal_lm"
    metrics: ClassVar[tuple[Metric, ...]] = (
        Metric("wrong", "answers that are wrong", kind="share"),
        Metric("overconfidence", "probability of an answer less its being right"),
        Metric("auroc", "AUROC of wrong answers", higher=True),
        Metric("answered_risk", "wrong ones among the answers given"),
        Metric("answered", "questions answered at the threshold", higher=True, kind="share"),
        Metric("false_alarm", "right answers held back at the conformal threshold", kind="share"),
        Metric("risk_kept", "calibrations whose threshold keeps the risk", higher=True, kind="share"),
        Metric("bound", "bound of a rule's error"),
        Metric("bound_holds", "draws whose bound is no lower than the true error", higher=True, kind="share"),
    )

    questions: int = 200
    kinds: tuple[str, ...] = ("arithmetic", "cloze", "facts")
    tokens: int = 8
    risk: float = 0.4
    delta: float = 0.1
    alarm: float = 0.1
    bound_delta: float = 0.05
    splits: int = 100
    draws: int = 300

    def unsupported_reason(self, run: RunContext) -> str | None:
        tokenizer: Any = cast(CausalLM, run.subject).tokenizer
        if tokenizer is None:
            return f"{run.subject.name} has no tokenizer, so that it reads no text"
        return (
            None if tokenizer.is_fast else f"the tokenizer of {run.subject.name} does not tell where its tokens stand"
        )

    def units(self, run: RunContext) -> list[WorkUnit]:
        cost = float(self.questions * len(self.kinds))
        return [WorkUnit(self.key, "answers", cost, f"{cost:.0f} questions")]

    def measure(self, run: RunContext, unit: WorkUnit) -> Iterator[Row]:
        from ...data.texts import corpus

        texts = corpus("wikitext") if "cloze" in self.kinds else ()
        asked = [q for kind in self.kinds for q in known_answers(kind, self.questions, run.rng(questions=kind), texts)]
        told = [0.0]

        def say(done: float) -> None:
            run.advance(done - told[-1])
            told.append(done)

        answers = read_answers(model_of(run), cast(CausalLM, run.subject).tokenizer, asked, tokens=self.tokens, say=say)
        found = judged(answers)
        if min(found.wrong.sum(), (~found.wrong).sum()) < _LEAST:
            raise UserError(
                f"{run.subject.name} answers {int(found.wrong.sum())} of {len(asked)} questions wrong: below {_LEAST} "
                "wrong or right ones nothing can be told; take another model, or more questions"
            )
        for i, answer in enumerate(answers):
            for metric, value in (
                ("wrong", found.wrong[i]), ("overconfidence", found.confidence[i] - (not found.wrong[i]))
            ):  # fmt: skip
                yield self.row(
                    metric, run.baseline, value, f"{i}", context=found.origin[i], at={"kind": found.kind[i]},
                    about={"level": answer.question.level, "answer": answer.text},
                )  # fmt: skip
        for seed in run.seeds:
            yield from self._told_apart(run, found, seed)
        yield from self._abstaining(run, found)
        yield from self._bounded(run, found)

    def _told_apart(self, run: RunContext, found: JudgedAnswers, seed: int) -> Iterator[Row]:
        """Rows of AUROC in one cross-validation."""
        part = found.parts(_PARTS, run.rng(parts=seed))
        by_kind, by_level = (
            np.array([f"{name}/{k}" for name, k in zip(names, part, strict=True)])
            for names in (found.kind, found.level)
        )
        for arm in run.arms:
            score, wrong = self._crossed(run, found, arm, part, seed)
            for kind in ("all", "one level", *self.kinds):
                mine = np.flatnonzero((found.kind == kind) | (kind in ("all", "one level")))
                stratum = by_level if kind == "one level" else by_kind
                values = auroc_values(score[mine], wrong[mine], stratum[mine])
                for i, value in zip(mine, values, strict=True):
                    if math.isfinite(value):
                        yield self.row(
                            "auroc", arm, value, f"{i}", context=found.origin[i], seed=seed, at={"kind": kind}
                        )

    def _crossed(self, run: RunContext, found: JudgedAnswers, arm: Arm, part: Any, seed: int) -> tuple[Any, Any]:
        """Scores of all answers, and what they are to tell."""
        rng, wrong = run.rng(detector=arm.name, parts=seed), found.wrong
        if arm.name == "random":
            return rng.random(len(part)), wrong
        if arm.name != "shuffled":
            return found.crossed(arm.name, part, rng), wrong
        wrong = wrong.copy()
        for kind in self.kinds:
            mine = np.flatnonzero(found.kind == kind)
            wrong[mine] = wrong[rng.permutation(mine)]
        return found.crossed("both", part, rng, wrong), wrong

    def _halves(self, run: RunContext, found: JudgedAnswers, arm: Arm) -> Iterator[tuple[Any, Any, Any]]:
        """Answers that are calibrated on, their scores, and candidates from the others, one half after the other."""
        halves = split(len(found.wrong), run.rng(halves=0))
        for k, (fit, use) in enumerate((halves, halves[::-1])):
            rng = run.rng(detector=arm.name, half=k)
            if arm.name == "random":
                own, scores = rng.random(len(fit)), rng.random(len(use))
            else:
                own, scores = found.scores(arm.name, fit, use, rng)
            yield use, scores, candidates(own)

    def _abstaining(self, run: RunContext, found: JudgedAnswers) -> Iterator[Row]:
        for arm in run.arms:
            if arm.name == "shuffled":
                continue
            given, held, flagged = (np.zeros(len(found.wrong)) for _ in range(3))
            for k, (use, scores, tried) in enumerate(self._halves(run, found, arm)):
                wrong = found.wrong[use]
                for i in range(self.splits):
                    a, b = split(len(use), run.rng(splits=i, half=k))
                    threshold = controlled_threshold(scores[a], wrong[a], tried, self.risk, self.delta)
                    alarm = conformal_threshold(scores[a][~wrong[a]], self.alarm)
                    held[use[b]] += 1
                    given[use[b]] += scores[b] <= threshold
                    flagged[use[b]] += scores[b] > alarm
                yield from self._kept(run, arm, scores, wrong, tried, k)
            tried_on = np.maximum(held, 1)
            share = given / tried_on
            risk = float(share @ found.wrong / share.sum()) if share.any() else 0.0
            # Each question's part in the deviation of a ratio of two means, as of the values of AUROC.
            values = risk + share / max(share.mean(), 1e-12) * (found.wrong - risk)
            for i, origin in enumerate(found.origin):
                yield self.row("answered_risk", arm, values[i], f"{i}", context=origin)
                yield self.row("answered", arm, share[i], f"{i}", context=origin)
                if not found.wrong[i]:
                    yield self.row("false_alarm", arm, flagged[i] / tried_on[i], f"{i}", context=origin)

    def _kept(self, run: RunContext, arm: Arm, scores: Any, wrong: Any, tried: Any, half: int) -> Iterator[Row]:
        """Whether the true risk is as wanted at the thresholds of calibrations drawn from these answers."""
        for i in range(self.draws // 2):
            drawn = run.rng(draws=i, half=half).integers(0, len(scores), len(scores))
            plain = [t for t in tried if (m := scores[drawn] <= t).any() and wrong[drawn][m].mean() <= self.risk]
            made = {
                "controlled": controlled_threshold(scores[drawn], wrong[drawn], tried, self.risk, self.delta),
                "plain": max(plain, default=-math.inf),
            }
            for rule, threshold in made.items():
                given = scores <= threshold
                kept = not given.any() or wrong[given].mean() <= self.risk
                yield self.row("risk_kept", arm, kept, f"{half}/{i}", at={"rule": rule})

    def _bounded(self, run: RunContext, found: JudgedAnswers) -> Iterator[Row]:
        """Bounds of rules of the untrained detectors, their candidates from the first half, drawn from the second."""
        fit, use = split(len(found.wrong), run.rng(halves=0))
        rules = [(name, t) for name in UNTRAINED for t in candidates(found.untrained[name][fit])]
        loss = np.array([(found.untrained[name][use] > t) != found.wrong[use] for name, t in rules])  # [K, N]
        n, delta, kl = len(use), self.bound_delta, math.log(len(rules))
        fixed = next(i for i, (name, t) in enumerate(rules) if t >= np.median(found.untrained[name][fit]))
        truth = loss.mean(1)
        for i in range(self.draws):
            errors = loss[:, run.rng(bounds=i).integers(0, n, n)].sum(1)
            best = int(errors.argmin())
            mean = errors[best] / n
            made = {("fixed", form): (fixed, of(int(errors[fixed]), n, delta)) for form, of in _FIXED.items()}
            made |= {
                ("chosen", "kl"): (best, seeger(mean, n, kl, delta)),
                ("chosen", "mcallester"): (best, mcallester(mean, n, kl, delta)),
                ("chosen", "rademacher"): (best, rademacher(mean, n, massart(len(rules), n), delta)),
                ("chosen", "clopper_pearson"): (best, clopper_pearson(int(errors[best]), n, delta)[1]),
            }
            for (rule, form), (which, bound) in made.items():
                at = {"rule": rule, "form": form}
                yield self.row("bound", run.baseline, bound, f"{i}", at=at)
                yield self.row("bound_holds", run.baseline, bound >= truth[which], f"{i}", at=at)
