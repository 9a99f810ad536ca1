# SPDX-License-Identifier: Apache-2.0
"""What a store of ours is as a layer of transformers' cache: rows, lengths, masks, bytes, and where it is put."""

from types import SimpleNamespace

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, StaticCache

import manyheads
from manyheads import UserError, parse
from manyheads.integrations.cache import (
    Past,
    SlotCache,
    StoreLayer,
    cache_arguments,
    expand,
    find_cache,
    install,
    seen_by,
)
from manyheads.integrations.transformers import find_sites, new_cache
from oracles import models
from oracles.caches import stores


@pytest.fixture
def model():
    return models.build("llama")


def filled(model, spec="full", rows=2, length=12):
    cache = new_cache(model, parse(spec))
    with torch.no_grad():
        model(models.tokens(rows, length), past_key_values=cache, use_cache=True)
    return cache


def test_stores_are_put_into_a_cache_that_makes_its_layers_as_it_goes(model):
    """Without a config transformers' cache begins with no layers; one with a config has them."""
    sites = find_sites(model)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        policy = parse("knorm:budget=5")
        install(cache, sites, policy.store, policy)
        assert len(cache.layers) == len(sites) and all(isinstance(layer, StoreLayer) for layer in cache.layers)
        assert len({id(layer.store.group) for layer in cache.layers}) == 1
        assert set(cache.layers[0].store.group) == {site.layer for site, _ in sites}
    one = DynamicCache()
    install(one, sites[1:2], policy.store, policy)
    assert [type(layer) for layer in one.layers] == [DynamicLayer, StoreLayer]  # those before it stay transformers'


def test_caches_that_cannot_hold_a_store(model):
    sites, policy = find_sites(model), parse("knorm:budget=5")
    short = SlotCache()
    short.layer_class_to_replicate = None
    with pytest.raises(UserError, match=r"knorm: the cache has 0 layers, none for model\.layers\.0"):
        install(short, sites, policy.store, policy)
    static = StaticCache(config=model.config, max_cache_len=8)
    with pytest.raises(UserError, match=r"found StaticLayer at .*leave cache_implementation at its default"):
        install(static, sites, policy.store, policy)
    offloaded = DynamicCache(config=model.config, offloading=True)
    with pytest.raises(UserError, match="leave cache_implementation at its default"):
        install(offloaded, sites, policy.store, policy)
    with torch.no_grad():
        used = model(models.tokens(1, 7), use_cache=True).past_key_values
    with pytest.raises(UserError, match="already holds 7 tokens"):
        install(used, sites, policy.store, policy)


def test_lengths_and_masks_as_transformers_asks_for_them(model):
    with manyheads.use(model):
        cache = filled(model, "knorm:budget=5")
        layer = cache.layers[0]
        assert layer.get_seq_length() == 12 and layer.get_max_length() == -1 and layer.is_initialized
        assert layer.keys.shape[2] == 5 == layer.values.shape[2]
        query, past = layer.get_mask_sizes(3)
        assert (query, past) == (3, 12) and isinstance(past, Past) and past.store is layer.store
        empty = new_cache(model, parse("knorm:budget=5")).layers[0]
        assert not empty.is_initialized and empty.get_mask_sizes(3) == (3, 0)
        assert seen_by(cache, layer.site) == 12 and seen_by(cache, layer.site, 1) == 12
        assert seen_by(cache, layer.site, 99) == 12 and seen_by(cache, layer.site, -1) == 12
        alone = new_cache(model, parse("knorm:budget=5,layers=0"))
        with torch.no_grad():
            model(models.tokens(2, 12), past_key_values=alone, use_cache=True)
        assert alone.layers[0].get_mask_sizes(3) == (15, 0)  # not all layers know the past: the mask spans it


def test_a_sliding_window_reaches_back_as_far_as_it_is_long():
    model = models.build("mistral")
    window = model.config.sliding_window
    with manyheads.use(model):
        for length in (window - 2, window - 1, window, window + 5):
            layer = filled(model, "full", 1, length).layers[0]
            reach = min(length, window - 1)
            assert layer.get_mask_sizes(2) == (reach + 2, length - reach)


def test_rows_of_a_cache(model):
    with manyheads.use(model):
        cache = filled(model)
        keys = cache.layers[0].keys.clone()
        cache.batch_repeat_interleave(3)
        assert torch.equal(cache.layers[0].keys, keys.repeat_interleave(3, 0))
        cache.batch_select_indices(torch.tensor([5, 0]))
        assert torch.equal(cache.layers[0].keys, keys.flip(0))
        cache.batch_select_indices(torch.tensor([False, True]))
        assert torch.equal(cache.layers[0].keys, keys[:1])
        cache.reorder_cache(torch.tensor([0, 0]))
        assert torch.equal(cache.layers[0].keys, keys[[0, 0]])
        for rows, want in ((4, 4), (3, 2), (2, 2), (1, 2)):
            cache = filled(model)
            expand(cache, rows)
            assert cache.layers[0].keys.shape[0] == want  # only where the numbers fit
        expand(None, 4)
        empty = new_cache(model, parse("full"))
        empty.batch_repeat_interleave(3)
        expand(empty, 4)
        assert empty.layers[0].store.rows is None
        cache = filled(model)
        with pytest.raises(UserError, match="holds 2 rows and the model was called with 3"), torch.no_grad():
            model(models.tokens(3, 1), past_key_values=cache, use_cache=True)
        cache = filled(model)
        with torch.no_grad():
            model(models.tokens(4, 1), past_key_values=cache, use_cache=True)
        assert cache.layers[0].keys.shape[:3] == (4, 2, 13)


def test_cutting_and_emptying(model):
    with manyheads.use(model):
        cache = filled(model)
        keys = cache.layers[1].keys.clone()
        cache.layers[1].crop(-3)
        assert cache.layers[1].get_seq_length() == 9 and torch.equal(cache.layers[1].keys, keys[:, :, :9])
        with pytest.raises(ValueError, match="minus the number"):
            cache.layers[1].crop(1)
        cache.layers[1].crop(0)
        assert cache.layers[1].get_seq_length() == 9 and cache.layers[1].is_croppable
        for gone in (cache.layers[0].offload, cache.layers[0].prefetch):
            with pytest.raises(UserError, match="turn offloading off"):
                gone()
        cache.layers[0].reset()
        assert cache.layers[0].get_seq_length() == 0 and not cache.layers[0].is_initialized


def test_bytes_are_those_of_what_is_held(model):
    with manyheads.use(model):
        cache = filled(model)
        want = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
        assert cache.bytes() == pytest.approx(want, rel=0.01) and cache.bytes() == sum(
            s.nbytes() for s in stores(cache)
        )
        some = filled(model, "knorm:budget=4,layers=0")
        plain = some.layers[1]
        assert not isinstance(plain, StoreLayer)
        assert some.bytes() == some.layers[0].store.nbytes() + plain.keys.nbytes + plain.values.nbytes


def test_a_cache_needs_its_port(model):
    with manyheads.use(model):
        cache = filled(model)
    with (
        pytest.raises(UserError, match=r"drops tokens at model\.layers\.0\.self_attn and needs its port"),
        torch.no_grad(),
    ):
        model(models.tokens(2, 1), past_key_values=cache, use_cache=True)


def test_how_a_model_is_given_its_cache():
    cache = DynamicCache()
    for name, forward in (
        ("cache", lambda x, cache=None: x), ("past_key_values", lambda x, past_key_values=None: x),
        ("cache", lambda x, past_key_values=None, cache=None: x),
    ):  # fmt: skip
        made = type("M", (torch.nn.Module,), {})()
        made.forward = forward
        assert cache_arguments(made, cache) == {name: cache, "use_cache": True}
    wrapper = type("W", (torch.nn.Module,), {"forward": lambda self, *args, **kwargs: None})()
    assert set(cache_arguments(wrapper, cache).values()) == {cache, True}  # as transformers calls its own
    assert find_cache(None, 3, cache, DynamicCache()) is cache and find_cache(None, "x") is None
    assert find_cache() is None and find_cache(SimpleNamespace()) is None
