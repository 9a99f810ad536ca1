# SPDX-License-Identifier: Apache-2.0
"""Adapters go into the weights at the end, and leave nothing behind after an error."""

import pytest
import torch

from manyheads.training.lora import adapters
from oracles.conversions import tiny

pytest.importorskip("peft", reason="needs the extra [train]")


def state(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def changed(trained):
    """Adapters that do something."""
    for name, p in trained.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(p)


def test_adapters_are_merged():
    model = tiny("llama")
    ids, before = torch.arange(6)[None], state(model)
    with adapters(model, 2) as trained:
        assert {
            name for name, p in trained.named_parameters() if p.requires_grad
        } and not model.lm_head.weight.requires_grad
        changed(trained)
        want = trained(input_ids=ids).logits
    after = state(model)
    assert after.keys() == before.keys() and all(p.requires_grad for p in model.parameters())
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert (model(input_ids=ids).logits - want).abs().max() < 1e-8


def test_after_an_error_the_model_is_as_before():
    model = tiny("llama")
    before = state(model)
    with pytest.raises(KeyboardInterrupt), adapters(model, 2) as trained:
        changed(trained)
        raise KeyboardInterrupt
    after = state(model)
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.requires_grad for p in model.parameters())
