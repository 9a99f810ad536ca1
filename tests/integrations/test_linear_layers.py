# SPDX-License-Identifier: Apache-2.0
"""Linear layers that a strategy computes: which they are, that nothing is left of it, and what is refused."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import manyheads
from integrations.test_weights import Codes, adapted
from manyheads import UserError
from manyheads.strategy import LinearCompute
from oracles import models
from oracles.fingerprint import assert_same, of_model
from tolerance import CLOSE, assert_close, error


@dataclass(frozen=True, kw_only=True)
class Plain(LinearCompute):
    """The layer as it is, through the port."""

    def linear(self, weight: Tensor, bias: Tensor | None, name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.linear(x, weight, bias)


@dataclass(frozen=True, kw_only=True)
class Halved(LinearCompute):
    """Half of the layer."""

    def linear(self, weight: Tensor, bias: Tensor | None, name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.linear(x, weight, bias) / 2


def asked(name, strategy):
    """Paths of the layers that a strategy computes in a model of this architecture."""
    model = models.build(name)
    with manyheads.use(model, strategy):
        paths = [path for path, module in model.named_modules() if "_manyheads_linear" in vars(module)]
        models.forward(name, model)
    return paths


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "qwen3", "bert", "t5"])
def test_the_same_numbers_through_the_port(name):
    model = models.build(name)
    before = of_model(model)
    want = models.forward(name, model)
    with manyheads.use(model, Plain()):
        assert_close(models.forward(name, model), want, CLOSE)
    with manyheads.use(model, Halved()):
        assert error(models.forward(name, model), want) > 0.01
    assert torch.equal(models.forward(name, model), want)
    assert_same(of_model(model), before)


def test_off_after_an_exception():
    model = models.build("llama")
    before, want = of_model(model), models.forward("llama", model)
    with pytest.raises(ZeroDivisionError), manyheads.use(model, "fireq.linear"):
        models.forward("llama", model)
        raise ZeroDivisionError
    assert torch.equal(models.forward("llama", model), want)
    assert_same(of_model(model), before)


def test_which_layers():
    """The seven of each block, as ``layers`` says; the output head stands in none."""
    whole = asked("llama", Halved())
    assert len(whole) == 14 and not any("lm_head" in path for path in whole)
    second = asked("llama", Halved(layers=(1,)))
    assert second == [path for path in whole if ".1." in path] and len(second) == 7
    assert len(asked("gpt2", Halved())) == 8


def test_two_cannot_compute_one_layer():
    model = models.build("llama")
    with pytest.raises(UserError, match="cannot hold together"), manyheads.use(model, Plain(), "fireq.linear"):
        pass
    with manyheads.use(model, Plain(layers=(0,)), Halved(layers=(1,))):
        models.forward("llama", model)
    with manyheads.use(model, Plain()):
        with pytest.raises(UserError, match="cannot hold together"), manyheads.use(model, Halved()):
            pass
        models.forward("llama", model)


def test_what_never_ran_is_said():
    model = models.build("llama")
    with pytest.raises(UserError, match="never called"), manyheads.use(model, Plain()):
        pass
    with pytest.raises(UserError, match="no linear layer"), manyheads.use(model, Plain(layers=(9,))):
        pass
    with pytest.warns(UserWarning, match="7 of 14 linear layers"), manyheads.use(model, Plain()):
        layer = model.model.layers[0]
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module(torch.zeros(1, module.in_features))


def test_an_adapter_goes_on_above():
    """Packing changes the layer below the adapter alone; what the adapter adds is there in full."""
    model = adapted()
    batch = torch.arange(8)[None] + 1
    with torch.no_grad():
        want = model(batch).logits
        with manyheads.use(model, Plain()):
            assert_close(model(batch).logits, want, CLOSE)
        with manyheads.use(model, Halved()):
            chosen = [path for path, module in model.named_modules() if "_manyheads_linear" in vars(module)]
            model(batch)
    assert len(chosen) == 14 and sum("base_layer" in path for path in chosen) == 2
    assert not any("lora_" in path for path in chosen)


def test_packed_already_is_refused():
    model = models.build("llama")
    layer = model.model.layers[1].mlp
    layer.up_proj = Codes(layer.up_proj)
    with pytest.raises(UserError, match=r"up_proj .*quantised or offloaded"), manyheads.use(model, "fireq.linear"):
        pass
    with manyheads.use(model, "fireq.linear:layers=0"):
        models.forward("llama", model)


def test_with_a_cache_and_a_lens():
    """Layers, cache and a watching strategy act together, and generation ends where it began."""
    model = models.build("llama")
    ids = torch.arange(20)[None] % 40 + 1
    want = model.generate(ids, max_new_tokens=4, do_sample=False)
    with manyheads.use(model, "fireq.linear:group=32", "fireq:window_tokens=4"):
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == want.shape
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), want)
