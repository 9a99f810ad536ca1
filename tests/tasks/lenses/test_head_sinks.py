# SPDX-License-Identifier: Apache-2.0
"""Sinks of a model on text: what a head is worth is the loss without its slice of the output projection."""

import numpy as np
import torch

from manyheads.experiment import CausalLM
from manyheads.tasks.lenses._windows import nll
from manyheads.tasks.lenses.head_sinks import SECOND, HeadSinks, _kinds
from oracles.tasks import context, rows, values
from tolerance import is_close, is_far

TASK = HeadSinks(tokens=48, windows_of=3, text="code", heads=2)


def test_a_head_costs_what_its_slice_costs():
    run = context(subject=CausalLM("default"))
    model, ids = run.subject.model, TASK.windows(run)
    assert not set(map(tuple, ids.tolist())) & set(map(tuple, TASK.windows(run, "calibration").tolist()))
    plain = nll(model, ids)
    layers = list(range(model.config.num_hidden_layers))
    with torch.no_grad():
        found = TASK._added(run, ids, [(2, 1)], layers, 0)
        weight = model.model.layers[2].self_attn.o_proj.weight
        kept, size = weight.clone(), model.config.head_dim
        weight[:, size : 2 * size] = 0
        expected = (nll(model, ids) - plain).double().mean(1).numpy()
        weight.copy_(kept)
        other = TASK._added(run, ids, [(2, 0)], layers, 0)
    assert is_close(found, expected) and is_far(other, expected)


def test_dormant_and_active_heads_are_others_of_the_same_layers():
    sink = np.array([[0.9, 0.8, 0.7, 0.1], [0.2, 0.6, 0.3, 0.0]])
    dormant, active = _kinds(sink, 3 / 8)
    assert dormant == [(0, 0), (0, 1), (1, 1)]  # not 0.2: half of its layer is taken
    assert active == [(0, 3), (0, 2), (1, 3)]


def test_values_for_each_text():
    found = rows(TASK, context(subject=CausalLM("default")))
    first, second = (values(found, "head_sink", token=token) for token in ("first", SECOND))
    assert len(first) == 3 and (first > second).all()
    sinks, others = (values(found, "head_drain", heads=heads) for heads in ("greatest sinks", "others"))
    assert len(sinks) == len(others) == 3 and (sinks < others).all()
    for kind in ("dormant", "active"):
        assert len(values(found, "head_worth", heads=kind)) == 3
        assert (values(found, "joint_worth", heads=kind, by="zero") != 0).all()
    # The two corpora are one here, so that no head switches: what is taken out costs the same on either side.
    assert (values(found, "switch_worth") == 0).all()
