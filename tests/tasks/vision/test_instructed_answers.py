# SPDX-License-Identifier: Apache-2.0
"""Instructed answers: texts whose answers follow from instruction and picture, and what is judged of them."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from manyheads.data import scenes
from manyheads.data.scenes import OBJECTS
from manyheads.data.visual_questions import FORMATS, INSTRUCTED_WORDS, instructed
from manyheads.errors import UserError
from manyheads.experiment import Arm, Experiment, RunContext, Trainable, run
from manyheads.models import joined_vlm
from manyheads.tasks.vision.instructed_answers import InstructedAnswers

pytestmark = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")
ARMS = (Arm("pooled", "feature_pool"), Arm("hidden", "visual_redundancy.cmai"))
SIZES = {
    "grid": 4, "steps": 2, "pool": 8, "batch": 4, "samples": 4, "at_once": 2, "asked": 2, "filler": 3, "times": (1, 2),
    "model": "towered",
}  # fmt: skip


def test_texts_say_what_is_asked_and_no_answer():
    vlm = joined_vlm.small(patches=4, words=INSTRUCTED_WORDS)
    made = instructed(
        vlm.language, 40, torch.Generator().manual_seed(0), grid=4, size=8, patches=4, asked=5, filler=3
    )  # fmt: skip
    words = {vlm.language.encode(word)[0]: word for word in INSTRUCTED_WORDS}
    said = {word for pair in FORMATS.values() for word in pair}
    for ids, at, truth, answers in zip(made.ids, made.at, made.truth, made.answers, strict=True):
        text = [words.get(int(token), "") for token in ids]
        assert text[1] == "say" and said.isdisjoint(text)
        assert all(text[place] in OBJECTS for place in at.tolist())
        assert [words[int(a)] for a in answers] == [FORMATS[text[2]][int(t)] for t in truth]
    assert len({int(f) for f in made.formats}) == 4 and 0.3 < made.truth.float().mean() < 0.7


@pytest.fixture
def tower(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=1, patch_size=2, image_size=8, mlp_ratio=1
    )
    Dinov2Model(config).save_pretrained(tmp_path / "tower")
    return str(tmp_path / "tower")


@pytest.mark.parametrize("more", [{}, {"model": "small", "pool": 0}])
def test_every_arm_is_judged_on_the_same_answers(more, tower, tmp_path):
    task = InstructedAnswers(**SIZES | more, tower=tower)
    experiment = Experiment(subject="trainable", arms=ARMS, tasks=(task,), seeds=1, equal="none")
    rows = run(experiment.at("cpu"), tmp_path / "run").rows
    found = {}
    for row in rows:
        found.setdefault((row.metric, row.arm, row.at.get("times")), []).append(row.value)
    for arm, left in (("full", 16), ("pooled", 4), ("hidden", 16)):
        for times in (1, 2):
            assert found["read", arm, times] == [left] * 4
            followed, content, right = (found[name, arm, times] for name in ("followed", "content", "right"))
            assert len(right) == 8
            assert right == [a * b for a, b in zip(followed, content, strict=True)]


def test_what_is_judged_by_hand(tower):
    task = InstructedAnswers(**SIZES | {"samples": 2}, tower=tower)
    made = RunContext(Trainable(), (Arm("full"),))
    vlm = task.fresh(made, 0)
    text = task._drawn(made, vlm, 2, "test", part="x")

    class Says(torch.nn.Module):
        """A head that gives all the right answers but one, which is true in other words."""

        def forward(self, hidden):
            wanted = text.answers.clone()
            other = (int(text.formats[0]) + 1) % 4
            wanted[0, 0] = text.tokens[other, int(text.truth[0, 0])]
            return torch.nn.functional.one_hot(wanted, len(INSTRUCTED_WORDS) + 3).float()

    vlm.model.lm_head = Says()
    rows = list(task._judged(Arm("full"), vlm, [text], 0))
    values = {name: [row.value for row in rows if row.metric == name] for name in ("followed", "content", "right")}
    assert values == {"followed": [0, 1, 1, 1], "content": [1, 1, 1, 1], "right": [0, 1, 1, 1]}


def test_other_strategies_are_refused(tower):
    with pytest.raises(UserError, match="tokens of images"):
        InstructedAnswers(**SIZES, tower=tower).guard(RunContext(Trainable(), (Arm("full"), Arm("tome", "tome"))))
