# SPDX-License-Identifier: Apache-2.0
"""An attention function that the user has registered stays in force inside a port; strategies that cannot say so."""

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import manyheads
from manyheads import UserError
from manyheads.integrations import functions, sites
from manyheads.integrations.transformers import new_cache
from oracles import models
from oracles.caches import step
from oracles.strategies import Attend, CopyEdit, Mute, NoEdit, Sharpen, Watch
from tolerance import MODEL, SAME, error, within

NAME = "colder_for_a_test"


def colder(module, query, key, value, mask, **kwargs):
    return sdpa_attention_forward(module, query, key, value, mask, **{**kwargs, "scaling": 3 * kwargs["scaling"]})


@pytest.fixture(params=["masked", "maskless"])
def model(request):
    AttentionInterface.register(NAME, colder)
    if request.param == "masked":
        AttentionMaskInterface.register(NAME, sdpa_mask)
    made = models.build("llama")
    made.set_attn_implementation(NAME)
    yield made
    for table in (AttentionInterface, AttentionMaskInterface):
        for name in [name for name in table._global_mapping if name.endswith(NAME)]:
            del table._global_mapping[name]


def logits(model, *strategies):
    with manyheads.use(model, *strategies):
        return models.forward("llama", model)


def test_it_is_used(model):
    own = models.forward("llama", model)
    assert error(own, models.forward("llama", models.tiny("llama"))) > 100 * SAME
    for strategies in [(), (NoEdit(),), (Watch(),)]:
        assert torch.equal(logits(model, *strategies), own)
    assert error(logits(model, CopyEdit()), own) <= SAME
    assert torch.equal(models.forward("llama", model), own) and model.config._attn_implementation == NAME


def test_edits_reach_it(model):
    """A third of the scale is undone by a factor of 3 on the queries: the function is the user's, on edited queries."""
    for strategy in (Sharpen(), Mute()):
        assert error(logits(model, strategy), models.forward("llama", model)) > 1e-3
        assert error(logits(model, strategy), logits(models.tiny("llama"), strategy)) > 1e-3


@pytest.mark.parametrize("spec", ["full", "snapkv:budget=1.0,window_size=4", "fireq:bits=fp8,window_tokens=32"])
def test_it_decodes_over_any_storage(model, spec):
    """What storage of our own would answer itself is computed by the function as well."""
    ids = models.tokens(1, 24)
    with torch.no_grad():
        want = model(ids, attention_mask=None).logits[:, 20:]
    with manyheads.use(model):
        cache = new_cache(model, manyheads.parse(spec))
        step(model, ids[:, :20], cache)
        made = torch.cat([step(model, ids[:, at : at + 1], cache) for at in range(20, 24)], 1)
    assert error(made, want) <= within(torch.float32, 4 * MODEL)


@pytest.mark.parametrize("strategy", [Attend()])
def test_who_computes_attention_is_refused(model, strategy):
    with pytest.raises(UserError, match=f"computes the attention of .* and so does '{NAME}'.*sdpa") as refusal:
        logits(model, strategy)
    assert "\n" not in str(refusal.value)


def test_who_needs_its_weights_is_refused(model):
    with pytest.raises(UserError, match=f"computes with '{NAME}'.*weights are not known"):
        logits(model, "active_dormant")
    with pytest.raises(UserError, match="computes attention itself here"), manyheads.use(model):
        cache = new_cache(model, manyheads.parse("keydiff:budget=0.5"), room=4)
        step(model, models.tokens(1, 20), cache)


def test_a_mask_that_only_it_can_read(model):
    """Without strategies it is handed on as it is; a strategy that would have to read it is refused."""
    seen = []

    def own_mask(**given):
        return torch.ones(given["batch_size"], given["kv_length"])

    def function(module, query, key, value, mask, **kwargs):
        seen.append(mask.ndim)
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register(NAME, function)
    AttentionMaskInterface.register(NAME, own_mask)
    ids = models.tokens(1, 9)
    with torch.no_grad():
        own = model(ids).logits
        with manyheads.use(model):
            assert torch.equal(model(ids).logits, own)
        assert set(seen) == {2}
        unread = r"takes a mask \(Tensor\) that strategies .* cannot read"
        with pytest.raises(UserError, match=unread), manyheads.use(model, Watch()):
            model(ids)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_name_of_transformers_that_the_user_took_over(name):
    model = models.build("llama", attn=name)
    table = transformers.models.llama.modeling_llama.ALL_ATTENTION_FUNCTIONS
    plain = models.forward("llama", model)
    table[name] = lambda module, q, k, v, mask, **kwargs: colder(module, q, k, v, mask, **kwargs)
    try:
        own = models.forward("llama", model)
        assert error(own, plain) > 100 * SAME
        assert torch.equal(logits(model), own) and torch.equal(logits(model, Watch()), own)
    finally:
        del table[name]
    assert torch.equal(logits(model), plain)


def test_what_a_fused_kernel_knew_is_computed():
    """Gemma 2 caps its logits, which SDPA cannot: in a model loaded for another kernel the cap still counts."""
    eager, other = (models.build("gemma2", attn="eager") for _ in range(2))
    with manyheads.use(eager):
        want = models.forward("gemma2", eager)
    for module in other.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation_internal = "flex_attention"
    with manyheads.use(other):
        assert error(models.forward("gemma2", other), want) <= SAME


def test_control_of_own_functions(model, monkeypatch):
    """Were only the names of transformers known, SDPA would stand in for the function."""
    own = models.forward("llama", model)
    for module in (functions, sites):
        monkeypatch.setattr(module, "own_function", lambda _: None, raising=False)
    assert error(logits(model), own) > 100 * SAME
