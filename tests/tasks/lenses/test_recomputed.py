# SPDX-License-Identifier: Apache-2.0
"""Figures of the tasks on lenses, recomputed one sample at a time and by scipy; models are told what to say."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from manyheads.data.texts import standard_library
from manyheads.experiment import Arm, CausalLM
from manyheads.tasks.lenses.channel_damage import ChannelDamage
from manyheads.tasks.lenses.channel_norms import ChannelNorms
from manyheads.tasks.lenses.massive_ablation import MassiveAblation
from oracles.tasks import context, rows


@pytest.fixture(scope="module")
def default():
    subject = CausalLM("default")
    subject.load("cpu")
    return subject


def reading(*arms, subject):
    """A run that reads a few files."""
    run = context(*arms, subject=subject)
    run.data = {"texts": standard_library()[:24]}
    return run


def nats(logits, token):
    return math.log(float(logits.double().exp().sum())) - float(logits[token])


def test_windows_for_two_uses_share_no_token(default):
    task, run = ChannelDamage(tokens=64, windows_of=3), reading(subject=default)
    drawn = [w.tolist() for w in (*task.windows(run), *task.windows(run, "calibration"))]
    assert len(drawn) == 6 and all(len(window) == 65 for window in drawn) and len({tuple(w) for w in drawn}) == 6
    most = default.max_context
    assert "reads" in ChannelDamage(tokens=most + 1).unsupported_reason(run)
    assert ChannelNorms(tokens=most).unsupported_reason(run) is None
    assert "no tokenizer" in ChannelNorms().unsupported_reason(context(subject=CausalLM("recall")))
    for wrong in ({"tokens": 31}, {"windows_of": 1}):
        with pytest.raises(ValueError, match="give 2 windows or more"):
            ChannelNorms(**wrong)
    assert ChannelNorms(tokens=32, windows_of=2).tokens == 32


def test_norms_are_means_of_the_heads_of_a_layer(default):
    """By hand: the norm of each channel over all tokens, the largest over the mean; channels above five times it."""
    task, run = ChannelNorms(tokens=64, windows_of=2), reading(subject=default)
    found = [row for row in rows(task, run) if row.at["of"] == "v"]
    model, kept = default.model, {}
    hooks = [
        layer.self_attn.v_proj.register_forward_hook(lambda _, __, out, i=i: kept.update({i: out}))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(task.windows(run)[:, :-1])
    for hook in hooks:
        hook.remove()
    dim = model.config.head_dim
    for i, out in kept.items():
        heads = out.double().unflatten(-1, (-1, dim))  # [B, T, Hkv, d]
        peaks, massive = [], []
        for h in range(heads.shape[2]):
            norms = [torch.linalg.norm(heads[n, :, h], dim=0) for n in range(2)]
            peaks.append(np.mean([float(x.max() / x.mean()) for x in norms]))
            massive.append(np.mean([float((x > 5 * x.mean()).sum()) for x in norms]))
        (peak,) = [row.value for row in found if row.metric == "channel_peak" and row.sample == f"layer {i}"]
        assert peak == pytest.approx(np.mean(peaks), rel=1e-3)
        (count,) = [row.value for row in found if row.metric == "massive_channels" and row.sample == f"layer {i}"]
        assert count == pytest.approx(np.mean(massive), abs=1e-6)


def test_what_massive_activations_cost(default):
    arms = (Arm("full"), Arm("control", options={"replace": "control"}))
    task = MassiveAblation(tokens=64, windows_of=3, text="code", ratio=100.0, draws=2)
    run = reading(*arms, subject=default)
    found = rows(task, run)
    assert [unit.cost for unit in task.units(run)] == [1.0, 2.0]
    (first, second), model = task._acting(run, arms[1]), default.model
    layer, spikes = task._layer(run), task._calibrated(run).records["spikes"]
    mine = [spike for spike in spikes if spike["layer"] == layer]
    assert layer == min(spike["layer"] for spike in spikes) and first.layers == (layer,)
    assert set(first.columns) == {spike["column"] for spike in mine}
    assert set(first.channels) == {spike["channel"] for spike in mine} and first.seed != second.seed

    def loss(zeroed):
        def zero(_, __, out):
            made = (out[0] if isinstance(out, tuple) else out).clone()
            for column in first.columns:
                made[:, column, zeroed] = 0
            return (made, *out[1:]) if isinstance(out, tuple) else made

        hook = model.model.layers[layer].register_forward_hook(zero) if zeroed else nullcontext()
        with torch.no_grad():
            got = []
            for window in task.windows(run):
                logits = model(window[None, :-1]).logits[0]
                got.append(np.mean([nats(logits[t], int(window[t + 1])) for t in range(64)]))
        if zeroed:
            hook.remove()
        return np.array(got)

    draws = []
    for one in (first, second):
        order = torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(one.seed)).tolist()
        draws.append([c for c in order if c not in one.channels][: len(one.channels)])
    plain, control = loss([]), np.mean([loss(channels) for channels in draws], 0)
    by = {(row.metric, row.arm, row.sample): row.value for row in found}
    for i in range(3):
        assert by["token_nll", "full", f"{i}"] == pytest.approx(plain[i], abs=1e-4)
        assert by["token_nll", "control", f"{i}"] == pytest.approx(control[i], abs=1e-4)
        assert by["added_nll", "control", f"{i}"] == pytest.approx(control[i] - plain[i], abs=2e-4)
    tables = task._calibrated(run).tables
    at = tables["max"].layers.index(layer)
    for i in range(3):
        assert by["largest_activation", "full", f"calibration {i}"] == tables["max"].values[i, at, 0]
        assert by["max_to_median", "full", f"calibration {i}"] == tables["max / median"].values[i, at, 0]
