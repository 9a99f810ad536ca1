# SPDX-License-Identifier: Apache-2.0
"""Following a style turn by turn: what is learned is followed, and what does not vary goes with nothing."""

from manyheads.experiment import Arm
from manyheads.tasks.lenses.style_dialogue import StyleDialogue
from oracles.tasks import context, rows, values

ARMS = Arm("standard"), Arm("c1_hf", options={"form": "c1_hf"})


def test_layouts_are_judged_on_one_model():
    task = StyleDialogue(steps=2, batch=4, words=3, turns=(1, 2, 5), dialogues=8)
    found = rows(task, context(*ARMS))
    assert {row.at.get("turns") for row in found if row.arm == "c1_hf"} == {5}
    assert len(values(found, "accuracy", "standard")) == 24
    near, far = (values(found, "sra", "standard", turns=turns).mean() for turns in (1, 5))
    assert near > far  # untrained attention is spread over all
    assert values(found, "lift", "standard", turns=5).mean() / values(found, "lift", "standard", turns=1).mean() < 2
    assert (values(found, "accuracy") == 0).all() and (values(found, "goes_with_accuracy") == 0).all()
