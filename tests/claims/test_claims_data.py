# SPDX-License-Identifier: Apache-2.0
"""Claims as data: each loads, plans at every size, and its checks name arms and metrics that there are."""

from pathlib import Path

import pytest

from manyheads import claims
from manyheads.experiment.checks import _arm, find_metric, lower

FOLDER = Path(claims.__file__).parent
SLUGS = claims.slugs()


def unknown(claim, size):
    """What a check of the claim names that the plan at this size has not."""
    plan = claim.experiment.at(size)
    metrics = {(task.key, metric.name): metric for task in plan.tasks for metric in task.metrics}
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
    import dataclasses

    assert len(SLUGS) > 20  # the tests above look at something
    claim = claims.load("d2o")
    for bad in (lower("no_such", "d2o", than="h2o", at=0.2), lower("token_nll", "d2o", than="h2o", at=0.3)):
        assert list(unknown(dataclasses.replace(claim, checks=(bad,)), "cpu"))


@pytest.mark.parametrize("slug", SLUGS)
def test_the_file_is_short(slug):
    assert len((FOLDER / f"{slug}.py").read_text().splitlines()) <= 100


@pytest.mark.parametrize("slug", SLUGS)
def test_every_strategy_can_be_built(slug):
    for size in ("quick", "cpu", "cuda"):
        plan = claims.load(slug).experiment.at(size)
        for arm in plan.arms:
            assert all(plan.subject.unsupported_reason(strategy) is None for strategy in arm.strategies), arm.key
