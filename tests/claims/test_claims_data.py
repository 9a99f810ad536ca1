# SPDX-License-Identifier: Apache-2.0
"""Claims as data: each loads, plans at every size, and its checks name arms and metrics that there are."""

import dataclasses
from pathlib import Path

import pytest

from manyheads import claims
from manyheads.experiment.checks import _arm, find_metric, lower, word_of
from manyheads.experiment.estimates import Estimate

FOLDER = Path(claims.__file__).parent
SLUGS = claims.slugs()


def unknown(claim, size):
    """What a check of the claim names that the plan at this size has not."""
    plan = claim.experiment.at(size)
    metrics = {(task.key, metric.name): metric for task in plan.tasks for metric in task.stated}
    for check in claim.checks:
        try:
            find_metric(check.metric, metrics)
            _arm(check.arm, check.at, plan.arms)
            if isinstance(check.than, str):
                _arm(check.than, check.than_at, plan.arms)
        except ValueError as error:
            yield str(error)


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("size", ["quick", "cpu", "cuda"])
def test_checks_name_what_there_is(slug, size):
    assert not list(unknown(claims.load(slug), size))


def test_a_check_of_nothing_is_found():

    assert len(SLUGS) > 20  # the tests above look at something
    claim = claims.load("d2o")
    for bad in (lower("no_such", "d2o", than="h2o", at=0.2), lower("token_nll", "d2o", than="h2o", at=0.3)):
        assert list(unknown(dataclasses.replace(claim, checks=(bad,)), "cpu"))


@pytest.mark.parametrize("slug", SLUGS)
def test_the_file_is_short(slug):
    place = FOLDER / slug.replace(".", "/")
    text = (place / "__init__.py" if place.is_dir() else place.with_suffix(".py")).read_text()
    assert len(text.splitlines()) <= 100


def test_a_part_of_a_paper_has_a_claim_of_its_own():
    """It is listed, loaded and stored under its own name, and none of its results is the paper's."""
    name = "reasoning_rhythm.credit_assignment"
    assert claims.of_paper("reasoning_rhythm") == ["reasoning_rhythm", name] and name in SLUGS
    assert claims.load(name).slug == name and claims.load("reasoning_rhythm").slug == "reasoning_rhythm"
    assert {result.slug for result in claims.stored("reasoning_rhythm")} == {"reasoning_rhythm"}
    assert claims.of_paper("reasoning") == []


@pytest.mark.parametrize("slug", SLUGS)
def test_every_strategy_can_be_built(slug):
    for size in ("quick", "cpu", "cuda"):
        plan = claims.load(slug).experiment.at(size)
        for arm in plan.arms:
            assert all(plan.subject.unsupported_reason(strategy) is None for strategy in arm.strategies), arm.key


def stale(result, claim):
    """What is wrong with a stored result: rules that the claim no longer has, or a word that does not follow."""
    rules = {str(check): check for check in claim.checks}
    for run in result.runs:
        if run.legacy is not None or run.size == "quick":
            continue
        where = f"{run.size} run on {run.measured}"
        if not run.commit or not run.date or not run.environment:
            yield f"the {where} does not say where it comes from"
        if missing := rules.keys() ^ {found.check for found in run.checks}:
            yield f"the {where} was judged by other rules ({min(missing)}); run it again"
            continue
        for found in run.checks:
            word = found.word
            if word == "not testable here":
                if not found.reason:
                    yield f"the {where}: {found.check} has no reason"
            elif word != word_of(found.effect, rules[found.check], found.bound):
                yield f"the {where}: {found.check} is not {word}"


@pytest.mark.parametrize("slug", SLUGS)
def test_stored_words_follow_from_stored_figures(slug):
    claim = claims.load(slug)
    assert [reason for result in claims.stored(slug) for reason in stale(result, claim)] == []


def test_a_word_that_does_not_follow_is_found():
    claim, result = next(
        (claims.load(slug), result)
        for slug in SLUGS
        for result in claims.stored(slug)
        if any(check.word == "holds" for run in result.runs for check in run.checks)
    )

    def said(word, **changes):
        runs = [
            dataclasses.replace(run, checks=tuple(dataclasses.replace(c, word=word) for c in run.checks), **changes)
            for run in result.runs
        ]
        return list(stale(dataclasses.replace(result, runs=tuple(runs)), claim))

    for wrong in (said("contradicted"), said("inconclusive"), said("holds", commit=None)):
        assert wrong
    fewer = dataclasses.replace(claim, checks=claim.checks[1:])
    assert "other rules" in next(stale(result, fewer))


@pytest.mark.parametrize("slug", SLUGS)
def test_every_rule_can_end_each_way(slug):
    for check in claims.load(slug).checks:
        bound = check.factor if check.relative else float(check.than) if not isinstance(check.than, str) else 0.0
        least = -check.margin if check.tolerant else 0.0
        for low, high, want in (
            (least + 1e-6, 1.0 + least, "holds"), (-check.margin - 1.0, -check.margin - 1e-6, "contradicted"),
            (-check.margin - 1e-6, least + 1e-6, "inconclusive"), (least, least + 1, "inconclusive"),
        ):  # fmt: skip
            ends = sorted(bound + check.sign * end for end in (low, high))
            found = Estimate(sum(ends) / 2, *ends, 10, 10, "bootstrap over contexts")
            assert word_of(found, check, bound) == want, (str(check), want)
