# SPDX-License-Identifier: Apache-2.0
"""FireQ's linear layers in whole models: near the model, nearer with smoothing, and each field what it says."""

import copy

import pytest
import torch
from torch import nn

import manyheads
from manyheads import UserError, parse
from manyheads.caches.fireq import FireQLinear
from oracles import models
from tolerance import error


def off(model, spec, want):
    """Relative error of a model's logits under ``spec``."""
    with torch.no_grad(), manyheads.use(model, spec):
        return error(models.forward("llama", model), want)


def test_a_model_is_near_itself():
    model = models.build("llama")
    want = models.forward("llama", model)
    errors = {spec: off(model, f"fireq.linear:group=32,{spec}", want) for spec in ("table=fp8", "activations=whole")}
    assert all(0.005 < value < 0.5 for value in errors.values()), errors


def test_smoothing_takes_an_outlying_channel():
    """Channels of the norms 2^6 times smaller and the weights behind them as much larger: the same function."""
    model = models.build("llama")
    planted = copy.deepcopy(model)
    with torch.no_grad():
        for layer in planted.model.layers:
            for norm, behind in (
                (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
            ):
                norm.weight[3] /= 64
                for module in behind:
                    module.weight[:, 3] *= 64
    want = models.forward("llama", model)
    assert torch.equal(models.forward("llama", planted), want)
    fields = "fireq.linear:group=32"
    rough, smooth = off(planted, f"{fields},smoothing=none", want), off(planted, f"{fields},smoothing=mean", want)
    assert smooth < 0.7 * rough
    assert off(planted, f"{fields},smoothing=absmax", want) < 0.7 * rough


def test_the_layer_is_the_formula():
    """Against the packed numbers, taken from the definition in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(70, 24)
    x = torch.randn(2, 5, 70)
    compute = FireQLinear(group=32, activations="whole").linear(layer.weight, layer.bias, "layer")
    weight = layer.weight.detach().double()
    s = weight.abs().mean(0).max() / weight.abs().mean(0)
    smooth = nn.functional.pad(weight * s, (0, 26)).unflatten(1, (-1, 32))
    top = smooth.abs().amax(2) / 7
    shift = 2.0 ** (64 / top.max()).log2().floor()
    sigma = (top * shift).clamp(min=2**-9).float().to(torch.float8_e4m3fn).double()
    codes = (smooth * shift / sigma[..., None]).round().clamp(-7, 7)
    numbers = (codes * sigma[..., None]).float().to(torch.float8_e4m3fn).double().flatten(1)[:, :70] / shift / s
    with torch.no_grad():
        assert error(compute(x).double(), x.double() @ numbers.T + layer.bias.double()) < 1e-6
        whole = FireQLinear(group=32).linear(layer.weight, layer.bias, "layer")
        assert 1e-3 < error(whole(x), compute(x)) < 0.05


def test_specs_and_refusals():
    assert parse("fireq.linear:group=64,smoothing=none").spec == "fireq.linear:group=64,smoothing=none"
    assert parse("fireq").slug == "fireq"
    with pytest.raises(UserError, match="group is one of 32, 64, 128"):
        parse("fireq.linear:group=48")
    with pytest.raises(UserError, match="smoothing"):
        parse("fireq.linear:smoothing=median")
