# SPDX-License-Identifier: Apache-2.0
"""Tasks about chat models refuse a base model in a line, and take the fixture, which stands in for one."""

import pytest

from manyheads.experiment import Arm, CausalLM
from manyheads.tasks.lenses.instructed_replies import InstructedReplies
from manyheads.tasks.lenses.refusals import Refusals
from manyheads.tasks.lenses.worked_answers import WorkedAnswers
from oracles.tasks import context

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def fixture():
    subject = CausalLM("default")
    subject.load("cpu")
    return subject


def named(fixture, name, template=None):
    """The fixture's model under a name, with or without a chat template."""
    from manyheads import models

    _, tokenizer = models.load_default("cpu")
    tokenizer.chat_template = template
    return CausalLM(name, model=fixture.model, tokenizer=tokenizer)


@pytest.mark.parametrize(("task", "lacks"), [(InstructedReplies(), "system message"), (Refusals(tokens=48), "refuse")])
def test_a_base_model_is_refused_in_a_line(fixture, task, lacks):
    reason = task.unsupported_reason(context(Arm("standard"), subject=named(fixture, "some-base")))
    assert reason.startswith("some-base is a base model") and lacks in reason and "\n" not in reason
    assert task.unsupported_reason(context(Arm("standard"), subject=named(fixture, "some-chat", TEMPLATE))) is None
    assert task.unsupported_reason(context(Arm("standard"), subject=fixture)) is None


def test_answers_are_worked_by_base_models_too(fixture):
    assert WorkedAnswers().unsupported_reason(context(Arm("blind draws"), subject=named(fixture, "some-base"))) is None
