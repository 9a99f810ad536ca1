# SPDX-License-Identifier: Apache-2.0
"""What cannot hold is refused in one line that names it and says what to do; nothing is ever silently a no-op."""

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import manyheads
from manyheads import UserError
from manyheads.integrations.transformers import new_cache
from oracles import models
from oracles.caches import greedy, prefilled
from oracles.fingerprint import assert_same, of_model
from oracles.strategies import Attend, NoEdit, Watch

FOREIGN = {
    "bloom": ("BloomForCausalLM", {"vocab_size": 64, "hidden_size": 32, "n_layer": 1, "n_head": 4}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_layers": 1, "num_heads": 4, "attention_types": [[["global"], 1]]},
    ),
    "mpt": ("MptForCausalLM", {"vocab_size": 64, "d_model": 32, "n_layers": 1, "n_heads": 4}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_an_architecture_that_cannot_be_entered(name):
    cls = getattr(transformers, FOREIGN[name][0])
    model = cls(cls.config_class(**FOREIGN[name][1]))
    before = of_model(model)
    with pytest.raises(UserError, match=f"{cls.__name__} does not dispatch.*architectures do .*llama") as refusal:
        manyheads.use(model, Watch()).__enter__()
    assert "\n" not in str(refusal.value)
    assert_same(of_model(model), before)


def refused(match, model, *strategies, inside=None):
    """Opening the port, or running ``inside``, or closing raises one line; the model stays as it was."""
    before = of_model(model)
    with pytest.raises(UserError, match=match) as refusal, manyheads.use(model, *strategies):
        if inside is not None:
            inside()
    assert "\n" not in str(refusal.value)
    assert_same(of_model(model), before)


def test_nothing_to_act_on():
    sites = "finds no attention to act on in LlamaForCausalLM: the model has 2 sites .*self causal.*layers"
    refused(sites, models.tiny("llama"), Watch(layers=(7,)))
    decoders = "finds no attention to act on in BertForMaskedLM: it acts on causal attention, that of decoders"
    refused(f"keydiff.* {decoders}", models.tiny("bert"), "keydiff:budget=0.5")
    refused("mra .*LlamaForCausalLM: it acts on that of encoders, which is not causal", models.tiny("llama"), "mra")


def test_a_site_that_is_never_called():
    refused("strategies selected model.layers.0.self_attn, and it was never called", models.tiny("llama"), Watch())
    encoder = models.tiny("bart").get_encoder()
    refused("decoder.* was never called", models.tiny("bart"), NoEdit(), inside=lambda: encoder(models.tokens(1, 5)))
    with pytest.raises(KeyError), manyheads.use(models.tiny("llama"), Watch()):
        raise KeyError  # the user's own error is not hidden by ours


def test_a_cache_that_is_never_used():
    model = models.tiny("llama")
    without = "keydiff.* keeps the cache, but the model ran without one: pass use_cache=True"
    refused(without, model, "keydiff:budget=0.5", inside=lambda: model(models.tokens(1, 8), use_cache=False))


def test_two_claims_on_one_site():
    model = models.tiny("llama")
    refused("keydiff:.*budget=0.3 and random:.*layers=1 cannot hold together: each keeps the cache of model.layers.1",
            model, "keydiff:budget=0.3", "random:layers=1")  # fmt: skip
    refused(
        "cannot hold together: each computes the output of model.layers.0.self_attn",
        model,
        Attend(),
        Attend(layers=(0,)),
    )
    with manyheads.use(model, "keydiff:budget=0.3"):
        with pytest.raises(UserError, match=r"keydiff.* and random cannot hold together"):
            manyheads.use(model, "random").__enter__()
        greedy(model, models.tokens(1, 8))


@pytest.mark.parametrize("spec", ["snapkv:budget=0.5,window_size=2", "hashevict:budget=16", "full"])
def test_caches_that_cannot_be_replaced(spec):
    model, ids = models.tiny("llama"), models.tokens(1, 8)
    slug = spec.partition(":")[0]
    static = StaticCache(config=model.config, max_cache_len=32)
    refused(f"{slug} replaces transformers' dynamic cache and found StaticLayer at model.layers.0", model, spec,
            inside=lambda: model(ids, past_key_values=static))  # fmt: skip
    with pytest.raises(UserError, match=f"{slug} replaces .*cache_implementation"), manyheads.use(model, spec):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    del model._previous_max_cache_length  # transformers' own note on the model
    used = DynamicCache(config=model.config)
    model(ids, past_key_values=used)
    refused(f"{slug} must see a sequence from its first token.*already holds 8 tokens", model, spec,
            inside=lambda: model(ids, past_key_values=used))  # fmt: skip
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True  # its constructor makes a stream, which a CUDA build of torch cannot without a GPU
    refused(f"{slug} replaces", model, spec, inside=lambda: model(ids, past_key_values=offloaded))


def test_a_cache_of_ours_needs_its_port():
    model, ids = models.tiny("llama"), models.tokens(1, 8)
    cache = new_cache(model, manyheads.parse("keydiff:budget=0.5"))
    with pytest.raises(UserError, match=r"needs its port: run the model inside `with manyheads\.use"):
        model(ids, past_key_values=cache)
    with manyheads.use(model):
        model(ids, past_key_values=cache)
    with pytest.raises(UserError, match="needs its port"):
        model(ids[:, :1], past_key_values=cache)
    with manyheads.use(models.build("llama")), pytest.raises(UserError, match="needs its port"):
        model(ids[:, :1], past_key_values=cache)


def test_a_cache_of_another_model():
    """A port is open, but the cache was made for another model: its layers would be somebody else's."""
    first, second = models.build("llama"), models.build("llama")
    cache = new_cache(first, manyheads.parse("keydiff:budget=0.5"))
    with manyheads.use(second), pytest.raises(UserError):
        second(models.tokens(1, 8), past_key_values=cache)


def test_new_cache_refuses():
    with pytest.raises(UserError, match="strategies keeps no cache"):
        new_cache(models.tiny("llama"), Watch())
    with pytest.raises(UserError, match="finds no decoder self-attention in BertForMaskedLM"):
        new_cache(models.tiny("bert"), manyheads.parse("full"))
    with manyheads.use(models.tiny("llama")):
        cache = prefilled(models.tiny("llama"), "full", models.tokens(1, 20))
        with pytest.raises(UserError, match="only a full cache made with record > 0 can be forked"):
            cache.fork(manyheads.parse("keydiff"))
        cache = prefilled(models.tiny("llama"), "full", models.tokens(1, 20), record=4)
        with pytest.raises(UserError, match="snapkv needs the last 8 queries"):
            cache.fork(manyheads.parse("snapkv:window_size=8"))


def test_a_budget_that_cannot_hold_the_protected():
    with pytest.raises(UserError, match="snapkv: a budget of 4 slots cannot hold its 6 protected tokens"):
        manyheads.parse("snapkv:budget=4,window_size=6")
    with pytest.raises(UserError, match="hashevict: a budget of 14 slots cannot hold its 15 protected"):
        manyheads.parse("hashevict:budget=14")


def test_a_strategy_that_does_nothing_in_a_model_as_it_is():
    refused("softmax does not act on a model that is trained already", models.tiny("llama"), "softmax")


def test_a_position_bias_over_dropped_columns():
    """T5 adds a bias per cache column: after dropping columns it would be added to the wrong keys."""
    model = models.tiny("t5")
    refused("keydiff cannot evict at .*position bias", model, "keydiff:budget=2,schedule=step",
            inside=lambda: model.generate(**models.inputs("t5"), max_new_tokens=6, do_sample=False))  # fmt: skip


def test_a_model_copied_inside_its_port():
    import copy

    model = models.build("llama")
    refused(
        "a model cannot be copied while its port is open: copy it before", model, inside=lambda: copy.deepcopy(model)
    )
    assert torch.equal(models.forward("llama", copy.deepcopy(model)), models.forward("llama", model))


def test_a_model_saved_inside_its_port(tmp_path):
    """Nothing of the port is written: the saved model loads and computes as before."""
    model = models.build("llama")
    with manyheads.use(model, Watch()):
        models.forward("llama", model)
        model.save_pretrained(tmp_path / "inside")
    model.save_pretrained(tmp_path / "outside")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "inside" / name).read_bytes() == (tmp_path / "outside" / name).read_bytes()


def test_a_module_without_attention():
    with pytest.raises(UserError, match="Linear does not dispatch"):
        manyheads.use(torch.nn.Linear(2, 2), Watch()).__enter__()
