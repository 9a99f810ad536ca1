# SPDX-License-Identifier: Apache-2.0
"""What tasks that train small models share: progress, first weights."""

from types import SimpleNamespace

import pytest
import torch

from manyheads.experiment import Arm
from manyheads.experiment.rows import WorkUnit
from manyheads.tasks.lenses import _trained
from manyheads.tasks.lenses._trained import llama, told
from oracles.tasks import context


def test_progress_is_told_every_twenty_steps_and_leaves_a_tenth_for_judging():
    run, said = context(Arm("full")), []
    run.advance = said.append
    unit = WorkUnit("task", "training", 100.0)
    on_step = told(run, unit, 100)
    for step in range(1, 101):
        on_step(SimpleNamespace(step=step))
    assert said == pytest.approx([18.0] * 5) and sum(said) == pytest.approx(0.9 * unit.cost)
    assert _trained._EVERY == 20


def test_first_weights_are_those_of_a_seed():
    run = context(Arm("full"))
    one, same, other = (llama(run, 30, 16, 1, 2, seed) for seed in (3, 3, 4))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight) and not torch.equal(
        one.lm_head.weight, other.lm_head.weight
    )
    config = one.config
    assert (config.intermediate_size, config.num_key_value_heads, config.tie_word_embeddings) == (32, 2, True)
    assert llama(run, 30, 16, 1, 2, 3, tie_word_embeddings=False).config.tie_word_embeddings is False
