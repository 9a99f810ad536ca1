# SPDX-License-Identifier: Apache-2.0
"""Sinks of a model on text: what a head is worth is the loss without its slice of the output projection."""

import numpy as np
import torch

from manyheads.experiment import CausalLM
from manyheads.tasks.lenses._windows import nll
from manyheads.tasks.lenses.head_sinks import HeadSinks
from oracles.tasks import context, rows, values

TASK = HeadSinks(tokens=48, windows_of=3, text="code", heads=4)


def test_a_head_costs_what_its_slice_costs():
    run = context(subject=CausalLM("default"))
    model, ids = run.subject.model, TASK.windows(run)
    assert not set(map(tuple, ids.tolist())) & set(map(tuple, TASK.windows(run, "calibration").tolist()))
    plain = nll(model, ids)
    unit = TASK.units(run)[0]
    with torch.no_grad():
        found = TASK._cost(run, unit, 2, 1, plain)
        weight = model.model.layers[2].self_attn.o_proj.weight
        kept, size = weight.clone(), model.config.head_dim
        weight[:, size : 2 * size] = 0
        expected = (nll(model, ids) - plain).mean(1).numpy()
        weight.copy_(kept)
        other = TASK._cost(run, unit, 2, 0, plain)
    assert np.allclose(found, expected, atol=1e-5) and not np.allclose(other, expected, atol=1e-5)


def test_values_for_each_text():
    found = rows(TASK, context(subject=CausalLM("default")))
    assert (np.abs(values(found, "sink_and_worth")) <= 1).all() and len(values(found, "head_sink")) == 3
    sinks, others = (values(found, "head_drain", heads=heads) for heads in ("greatest sinks", "others"))
    assert len(sinks) == len(others) == 3 and (sinks < others).all()
