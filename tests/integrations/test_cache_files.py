# SPDX-License-Identifier: Apache-2.0
"""A compressed cache is written and read back, and goes on as if it had stayed in memory; it is never pickled."""

import copy
import io
import pickle

import pytest
import torch
from safetensors import safe_open
from transformers import DynamicCache

import manyheads
from manyheads import UserError
from manyheads.integrations import cache_files
from manyheads.integrations.cache import StoreLayer
from manyheads.integrations.transformers import load_cache, new_cache, save_cache
from oracles import models
from oracles.caches import step

SPECS = [
    "full", "keydiff:budget=0.5", "snapkv:budget=0.5,window_size=4", "adakv:budget=0.5", "d2o:budget=0.5",
    "fireq:bits=fp8,window_tokens=4", "fireq:bits=int4", "fireq:bits=k8v4,window_tokens=4",
    "hedge:budget=0.5,recent=4,window_size=8,whole=0",
    "h2o:budget=0.5", "hashevict:budget=16", "streaming_llm:budget=12", "tova:budget=12",
    "hcattention:centroids=8,recent=4,sinks=2",
]  # fmt: skip


def goes_on(model, cache, seed=1):
    """Logits of four more tokens, one by one, and of three at once."""
    pieces = models.tokens(2, 7, seed=seed).split([1, 1, 1, 1, 3], 1)
    return torch.cat([step(model, piece, cache) for piece in pieces], 1)


def filled(model, spec, length=24, **more):
    cache = new_cache(model, manyheads.parse(spec), **more)
    step(model, models.tokens(2, length), cache)
    return cache


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_it_comes_back(name, spec, tmp_path):
    model, path = models.tiny(name), tmp_path / "cache.safetensors"
    with manyheads.use(model):
        cache = filled(model, spec)
        step(model, models.tokens(2, 1), cache)
        save_cache(cache, path)
        again = load_cache(path, model)
        assert again.bytes() <= cache.bytes() and again.get_seq_length() == 25
        assert torch.equal(goes_on(model, again), goes_on(model, cache))


def test_latents_and_a_padded_batch(tmp_path):
    model, path, given = models.tiny("deepseek_v3"), tmp_path / "cache", models.inputs("deepseek_v3")
    for spec in ("mla_hw", "keydiff:budget=0.5"):
        with manyheads.use(model), torch.no_grad():
            cache = new_cache(model, manyheads.parse(spec))
            model(**given, past_key_values=cache)
            save_cache(cache, path)
            again = load_cache(path, model)
            longer = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
            one, two = (
                model(models.tokens(2, 1), past_key_values=x, attention_mask=longer).logits for x in (cache, again)
            )
        assert torch.equal(one, two)


def test_fixed_storage_stays_fixed(tmp_path):
    model = models.tiny("llama")
    with manyheads.use(model):
        cache = filled(model, "keydiff:budget=0.5", room=8)
        save_cache(cache, tmp_path / "cache")
        again = load_cache(tmp_path / "cache", model)
        assert again.is_compileable and again.layers[0].store.room == 8
        pieces = models.tokens(2, 4).split(1, 1)
        assert all(torch.equal(step(model, piece, again), step(model, piece, cache)) for piece in pieces)


def test_what_generate_returns(tmp_path):
    """A cache that a port has filled itself; the file names strategy and format in its metadata."""
    model, ids = models.tiny("llama"), models.tokens(1, 24)
    with manyheads.use(model, "keydiff:budget=0.5"):
        cache = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True).past_key_values
    assert type(cache) is DynamicCache
    save_cache(cache, tmp_path / "cache")
    with safe_open(str(tmp_path / "cache"), framework="pt") as file:
        about = file.metadata()
    assert about["format"] == "manyheads-cache-1" and '"spec": "keydiff"' in about["layers"]
    with manyheads.use(model):
        again = load_cache(tmp_path / "cache", model)
        assert torch.equal(step(model, ids[:, :1], again), step(model, ids[:, :1], cache))


def test_refusals(tmp_path):
    model, path = models.tiny("llama"), tmp_path / "cache"
    with pytest.raises(UserError, match="has no layer of manyheads"):
        save_cache(DynamicCache(config=model.config), path)
    with manyheads.use(model):
        save_cache(filled(model, "keydiff:budget=0.5"), path)
        with pytest.raises(UserError, match="is a cache of another model than Gemma2ForCausalLM: see"):
            load_cache(path, models.tiny("gemma2"))
        wide = models.build("llama", num_key_value_heads=4)
        with pytest.raises(UserError, match="is a cache of another model than LlamaForCausalLM"):
            load_cache(path, wide)
        with pytest.raises(UserError, match="only a full cache made with record > 0 can be forked"):
            load_cache(path, model).fork(manyheads.parse("keydiff"))
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="is not a cache that save_cache of this version wrote"):
        load_cache(tmp_path / "model" / "model.safetensors", model)


@pytest.mark.parametrize(
    "write", [pickle.dumps, lambda cache: torch.save(cache, io.BytesIO())], ids=["pickle", "torch"]
)
def test_it_is_not_pickled(write):
    model = models.tiny("llama")
    with manyheads.use(model):
        cache = filled(model, "keydiff:budget=0.5")
    with pytest.raises(UserError, match=r"is not pickled: write it with .*save_cache") as refusal:
        write(cache)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("spec", SPECS)
def test_a_copy_is_independent(spec):
    """As a kept prompt is copied for every answer."""
    model = models.tiny("llama")
    with manyheads.use(model):
        cache = filled(model, spec)
        twin = copy.deepcopy(cache)
        first = goes_on(model, twin)
        assert torch.equal(goes_on(model, copy.deepcopy(twin)), goes_on(model, twin))
        assert torch.equal(goes_on(model, cache), first)


def test_control_of_the_file(tmp_path, monkeypatch):
    """Were the number of tokens that are gone not written, the cache would go on at other positions."""
    model = models.tiny("llama")
    whole = cache_files._described

    def forgetful(value, name, tensors):
        return whole(12 if name.endswith("padded.seen") else value, name, tensors)

    monkeypatch.setattr(cache_files, "_described", forgetful)
    with manyheads.use(model):
        cache = filled(model, "streaming_llm:budget=12")
        assert isinstance(cache.layers[0], StoreLayer)
        save_cache(cache, tmp_path / "cache")
        again = load_cache(tmp_path / "cache", model)
        pieces = models.tokens(2, 3).split([3], 1)
        assert not all(torch.equal(step(model, piece, again), step(model, piece, cache)) for piece in pieces)
