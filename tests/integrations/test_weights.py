# SPDX-License-Identifier: Apache-2.0
"""What a linear layer multiplies by, asked of the layer: plain, adapted, quantised, offloaded; and what needs it."""

import accelerate
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import manyheads
from manyheads.errors import UserError
from manyheads.inspect.attention_breakdown import HeadOutputNorm
from manyheads.integrations.transformers import find_sites
from manyheads.integrations.weights import effective_weight, held_weight
from manyheads.lenses.refined_massive_activations import KVBias
from manyheads.lenses.safety_heads import Direction
from oracles import models
from tolerance import CALL, CLOSE, SAME, assert_close, error, is_close, within


class Codes(nn.Module):
    """A layer that keeps codes of 8 bits and a scale for each row; its ``weight`` is no weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)


def adapted(name="llama", **more):
    """A model with an adapter on its output projections, and the same with the adapter merged into the weights."""
    torch.manual_seed(0)
    peft = pytest.importorskip("peft", reason="needs peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["o_proj"], lora_dropout=0.5, **more)
    model = peft.get_peft_model(models.build(name), config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data.normal_(std=0.5)
    model.eval()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_weight_of_a_layer(dtype):
    linear = nn.Linear(24, 17).to(dtype)
    assert effective_weight(linear) is linear.weight
    limit = within(dtype, CALL if dtype.itemsize > 2 else 1)
    codes = Codes(nn.Linear(24, 17).to(dtype))
    assert_close(effective_weight(codes, dtype=dtype), (codes.weight * codes.scale).to(dtype), limit)
    peft = pytest.importorskip("peft", reason="needs peft")
    lora = peft.get_peft_model(nn.Sequential(linear), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    layer = lora.base_model.model[0]
    layer.lora_B["default"].weight.data.normal_()
    want = linear.weight + layer.get_delta_weight("default").to(dtype)
    assert_close(effective_weight(layer), want.detach(), limit)
    assert error(effective_weight(layer), linear.weight.detach()) > 0.1 and layer.training


def test_which_layers_hold_their_weight():
    """One thing that is not plain is enough: a forward of its own, codes, a kind of its own, nowhere, another layer."""

    class Kind(nn.Parameter):
        pass

    class Other(nn.Linear):
        pass

    turned = Conv1D(7, 8)
    assert torch.equal(held_weight(turned), turned.weight.T) and held_weight(turned).shape == (7, 8)
    hooked, codes, kind = (nn.Linear(8, 7) for _ in range(3))
    assert held_weight(hooked) is hooked.weight
    hooked.forward = lambda x: 2 * nn.functional.linear(x, hooked.weight, hooked.bias)
    assert_close(effective_weight(hooked), 2 * hooked.weight, CLOSE)
    codes.weight = nn.Parameter(torch.ones(7, 8, dtype=torch.int8), requires_grad=False)
    kind.weight = Kind(torch.ones(7, 8))
    assert type(kind.weight) is Kind
    for layer in (hooked, codes, kind, nn.Linear(8, 7, device="meta"), Other(8, 7), nn.ReLU()):
        assert held_weight(layer) is None


def test_a_layer_that_cannot_be_asked():
    class Squared(nn.Linear):
        def forward(self, x):
            return super().forward(x) ** 2

    class Broken(nn.Linear):
        def forward(self, x):
            raise NotImplementedError("no kernel for this device\nand more")

    for layer, why in (
        (Squared(8, 8), "no linear layer"), (Broken(8, 8), r"cannot be had \(no kernel"),
        (nn.Linear(8, 8, device="meta"), "meta device and nothing loads it"), (nn.ReLU(), "in_features"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=why) as refusal:
            effective_weight(layer, "block.3.o_proj")
        assert "block.3.o_proj" in str(refusal.value) and "\n" not in str(refusal.value)


def test_hooks_of_others_do_not_see_the_question():
    layer, seen = Codes(nn.Linear(8, 8)), []
    layer.register_forward_hook(lambda *_: seen.append(1))
    effective_weight(layer)
    assert not seen


@pytest.fixture
def direction(tmp_path):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(3))
    return f"safety_heads:direction={Direction(vector).save(tmp_path / 'd.safetensors')}"


def scores(model, *lenses):
    with torch.no_grad(), manyheads.watch(model, *lenses) as seen:
        model(models.tokens(2, 14))
    return [table.values for i in range(len(lenses)) for table in seen.compute(i).tables.values()]


def close(some, others):
    return all(is_close(a, b) for a, b in zip(some, others, strict=True))


def test_adapters(direction):
    """Scores are those of the model with the adapter merged, not those of the weights under it."""
    model = adapted()
    got = scores(model, direction, HeadOutputNorm())
    with model.disable_adapter():
        under = scores(model, direction, HeadOutputNorm())
        assert close(under, scores(models.tiny("llama"), direction, HeadOutputNorm()))
    want = scores(model.merge_and_unload(), direction, HeadOutputNorm())
    assert close(got, want) and not close(under, want)


def test_offloaded_weights(direction):
    model = models.build("llama")
    want = scores(model, direction, HeadOutputNorm())
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    assert close(scores(model, direction, HeadOutputNorm()), want)
    bias = KVBias.of(site for site, _ in find_sites(model))
    assert bias.weights["model.layers.0.self_attn.k"].shape == (2, 8)


def test_quantised_layers(direction):
    """Codes of 8 bits: the scores are those of what the codes stand for, and the doctor's norms too."""
    model, rounded = models.build("llama"), models.build("llama")
    for one, other in zip(model.model.layers, rounded.model.layers, strict=True):
        codes = one.self_attn.o_proj = Codes(one.self_attn.o_proj)
        other.self_attn.o_proj.weight.data = codes.weight * codes.scale
    got, want = (scores(m, direction, HeadOutputNorm()) for m in (model, rounded))
    assert close(got, want)
    for layer in model.model.layers:
        layer.self_attn.o_proj.scale *= 2
    assert not close(scores(model, direction, HeadOutputNorm()), want)


def test_absorbed_latents_of_adapted_and_offloaded_layers():
    """The up-projection of latent attention too: decoding in latent space gives the model's own logits."""
    ids = models.tokens(1, 12)
    for change in ("offload", "adapter"):
        model = models.build("deepseek_v3")
        if change == "adapter":
            torch.manual_seed(0)
            peft = pytest.importorskip("peft", reason="needs peft")
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["kv_b_proj"])).eval()
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.data.normal_(std=0.3)
        else:
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        with torch.no_grad():
            want = model(ids).logits[:, -3:]
            with manyheads.use(model, "mla_hw:schedule=absorb"):
                out = model(ids[:, :9], use_cache=True)
                got = [model(ids[:, t : t + 1], past_key_values=out.past_key_values).logits for t in range(9, 12)]
        assert_close(torch.cat(got, 1), want, SAME)
