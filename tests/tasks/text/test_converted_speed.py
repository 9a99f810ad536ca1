# SPDX-License-Identifier: Apache-2.0
"""Speed of converted models: what is counted is theirs, arms take turns, and each reads the prompt by itself."""

from types import SimpleNamespace

import pytest
import torch

from manyheads import parse
from manyheads.calls.calibration import Statistics
from manyheads.conversion import Drop, SurgeryPlan
from manyheads.errors import UserError
from manyheads.experiment import Arm, CausalLM, RunContext
from manyheads.integrations.anatomy import ModelAnatomy
from manyheads.integrations.surgery import converted
from manyheads.tasks.text.converted_speed import ConvertedSpeed
from tiny import compare as tiny
from tolerance import nearly

texts, tokenizer, model = tiny.texts, tiny.tokenizer, tiny.model


def test_bytes_are_of_the_converted_model_and_of_its_cache(model, tokenizer):
    plan = SurgeryPlan((Drop(part="attention", layers=(1,)),))
    cut = converted(model, plan)
    arms = (Arm("whole"), Arm("cut", "minitron"), Arm("left out"))
    task = ConvertedSpeed(prompt=24, written=3, rounds=2, timed=("whole", "cut"))
    run = RunContext(CausalLM("tiny", model, tokenizer), arms)
    run.kept(("plan", "cut"), lambda: plan)
    run.kept("text of the speed", lambda: SimpleNamespace(train=torch.arange(60) % 50))
    told = []
    run.advance = told.append
    rounds = [list(task.measure(run, unit)) for unit in task.units(run)]
    assert sum(told) == nearly(sum(unit.cost for unit in task.units(run)))
    value = {(row.metric, row.arm): row.value for row in rounds[0]}
    layers = model.config.num_hidden_layers
    assert value["cache", "cut"] == nearly(value["cache", "whole"] * (layers - 1) / layers)
    assert value["weights", "cut"] * 2**20 == sum(p.nbytes for p in cut.parameters())
    assert [row.arm for row in rounds[0] if row.metric == "prefill"] != [
        row.arm for row in rounds[1] if row.metric == "prefill"
    ]
    assert sum(row.metric == "decode" for row in rounds[1]) == 2 * 3 and all(row.value > 0 for row in rounds[1])
    assert not any(row.metric in ("cache", "weights") for row in rounds[1])


def test_the_cache_of_linear_attention_is_its_states(model, tokenizer):
    """Which do not grow with the prompt, and are not nothing."""
    arms = (Arm("linear", "dijiang"),)
    held = []
    for prompt in (24, 48):
        run = RunContext(CausalLM("tiny", model, tokenizer), arms)
        plan = parse("dijiang").plan(ModelAnatomy(model), Statistics({}))
        run.kept(("plan", "linear"), lambda plan=plan: plan)
        run.kept("text of the speed", lambda: SimpleNamespace(train=torch.arange(80) % 50))
        task = ConvertedSpeed(prompt=prompt, written=3, rounds=1)
        held += [row.value for unit in task.units(run) for row in task.measure(run, unit) if row.metric == "cache"]
    config = model.config
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    least = config.num_hidden_layers * config.num_key_value_heads * dim * dim * 4
    assert held[0] == held[1] and least <= held[0] * 2**20 < 2 * least


def test_sizes_that_mean_nothing_are_refused():
    with pytest.raises(UserError, match="1 or more"):
        ConvertedSpeed(rounds=0)
