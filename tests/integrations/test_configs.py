# SPDX-License-Identifier: Apache-2.0
"""Which attention function each module is pointed at, and that its config comes back with the last port."""

import pytest
import torch
from transformers.modeling_utils import PreTrainedModel

from manyheads.integrations.configs import EAGER, OWN, SDPA, implementation_of, switch_configs
from oracles import models


@pytest.mark.parametrize(
    ("name", "own", "want"),
    [
        ("eager", frozenset(), EAGER), ("sdpa", frozenset(), SDPA), ("flash_attention_2", frozenset(), SDPA),
        ("flex_attention", frozenset(), SDPA), (None, frozenset(), EAGER), ("mine", frozenset({"mine"}), OWN + "mine"),
        ("mine", frozenset({"other"}), SDPA),
    ],
)  # fmt: skip
def test_each_implementation_has_its_stand_in(name, own, want):
    model = models.build("llama")
    model.config._attn_implementation_internal = name
    before = model.config
    restore = switch_configs(model, own)
    assert model.config is not before and model.config._attn_implementation == want
    assert model.config is model.model.config is model.model.layers[0].self_attn.config  # one clone of one config
    assert implementation_of(model.model.layers[0].self_attn) == name  # as it was loaded
    assert before._attn_implementation == name
    restore()
    assert model.config is before is model.model.layers[1].self_attn.config
    assert not any("_manyheads" in key for module in model.modules() for key in vars(module))


def test_a_model_without_sdpa_is_eager(monkeypatch):
    model = models.build("llama")
    for kind in {type(m) for m in model.modules() if isinstance(m, PreTrainedModel)}:
        monkeypatch.setattr(kind, "_supports_sdpa", False)
    restore = switch_configs(model)
    assert model.config._attn_implementation == EAGER
    restore()


def test_ports_close_in_any_order():
    model = models.build("llama")
    before = model.config
    first = switch_configs(model)
    clone = model.config
    second = switch_configs(model)
    assert model.config is clone
    first()
    assert model.config is clone and implementation_of(model.model.layers[0].self_attn) == before._attn_implementation
    second()
    assert model.config is before
    assert implementation_of(torch.nn.Linear(1, 1)) is None
