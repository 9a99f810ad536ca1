# SPDX-License-Identifier: Apache-2.0
"""Reading and knowing under damage: no damage keeps all, the largest channels cost what is read, answers are greedy."""

import torch

from manyheads.experiment import Arm, CausalLM
from manyheads.tasks.lenses.channel_damage import ChannelDamage, _answer, _known
from manyheads.tasks.lenses.channel_norms import ChannelNorms
from oracles.tasks import context, rows, values

SPEC = "massive_values:damage=top,of=qk,channels="


def test_damage_costs_what_is_read():
    run = context(Arm("full"), Arm("none", f"{SPEC}0"), Arm("top", f"{SPEC}6"), subject=CausalLM("default"))
    task = ChannelDamage(tokens=100, windows_of=4)
    assert task.unsupported_reason(run) is None
    found = rows(task, run)
    for metric in ("constant_found", "new_token", "known_token", "code_nll", "kept"):
        assert (values(found, metric, "none") == values(found, metric, "full")).all()
    assert values(found, "kept", "full", knowledge="planted constant").mean() == 1
    read, known = (values(found, "kept", "top", knowledge=k).mean() for k in ("planted constant", "new token"))
    assert read < 0.5 < known


def test_answers_are_greedy_and_known_tokens_stood_before():
    subject = CausalLM("default")
    subject.load("cpu")
    ids = torch.randint(100, 400, (1, 9), generator=torch.Generator().manual_seed(0))
    expected = subject.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        assert _answer(subject.model, ids, 4) == expected[0, 9:].tolist()
    assert _known(torch.tensor([[5, 6, 5, 7, 7]])).tolist() == [[False, True, False, True]]


def test_norms_of_channels_of_each_layer():
    found = rows(ChannelNorms(tokens=64, windows_of=2), context(subject=CausalLM("default")))
    layers = CausalLM("default")
    layers.load("cpu")
    peaks = {of: values(found, "channel_peak", of=of) for of in ("q", "k", "v")}
    assert all(len(peak) == layers.model.config.num_hidden_layers and (peak > 1).all() for peak in peaks.values())
    assert peaks["q"].mean() > peaks["v"].mean()
