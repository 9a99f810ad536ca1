# SPDX-License-Identifier: Apache-2.0
"""Why a cache of its own: transformers' dynamic cache, shrunk by hand as eviction libraries do, and ours beside it."""

import pytest
import torch
from transformers import DynamicCache

import manyheads
from manyheads.integrations.transformers import new_cache
from oracles import models
from oracles.caches import prefilled, step, stores
from oracles.strategies import Norm
from tolerance import is_close

PROMPT, KEPT = 20, 10
POLICY = Norm(budget=KEPT)


def shrunk(model, ids, **extra):
    """A stock cache after a prompt, cut to its last ``KEPT`` columns."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache, **extra)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, -KEPT:], layer.values[:, :, -KEPT:]
    return cache


class Spy:
    """Token ids and positions that reach a model."""

    def __init__(self, model):
        self.model, self.fed, self.positions = model, [], []

    def __enter__(self):
        self.handles = [
            self.model.register_forward_pre_hook(self._ids, with_kwargs=True),
            self.model.model.rotary_emb.register_forward_pre_hook(self._positions, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def _ids(self, module, args, kwargs):
        self.fed.append((args[0] if args else kwargs["input_ids"])[0].tolist())

    def _positions(self, module, args, kwargs):
        self.positions.append(kwargs["position_ids"][0].tolist())


@pytest.fixture
def model():
    return models.build("llama")


def test_positions(model):
    """The stock cache takes what is left for what was seen, and the next token stands in the middle of the prompt."""
    ids = models.tokens(1, PROMPT)
    stock = shrunk(model, ids)
    with Spy(model) as spy:
        step(model, models.tokens(1, 1), stock)
    assert spy.positions == [[KEPT]]
    with manyheads.use(model), Spy(model) as spy:
        step(model, models.tokens(1, 1), prefilled(model, POLICY, ids))
    assert spy.positions[-1] == [PROMPT]


def test_continuing_to_generate(model):
    """``generate`` feeds what the cache has not seen: the stock cache gets half of the prompt a second time."""
    ids = models.tokens(1, PROMPT)
    more = torch.cat([ids, models.tokens(1, 3, seed=1)], 1)
    stock = shrunk(model, ids)
    with Spy(model) as spy:
        model.generate(more, attention_mask=torch.ones_like(more), past_key_values=stock, max_new_tokens=1)
    assert spy.fed == [more[0, KEPT:].tolist()]
    with manyheads.use(model):
        ours = prefilled(model, POLICY, ids)
        with Spy(model) as spy:
            model.generate(more, attention_mask=torch.ones_like(more), past_key_values=ours, max_new_tokens=1)
    assert spy.fed == [more[0, PROMPT:].tolist()] and spy.positions == [[20, 21, 22]]


def test_padding_masks_the_wrong_columns(model):
    """With 12 columns of left padding the stock cache hides kept tokens: a row is blind to what it holds (D4)."""
    ids, mask = models.tokens(2, PROMPT), torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :12] = 0
    more = torch.cat([mask, mask.new_ones(2, 1)], 1)

    def blind(cache, slots):
        """Slots of row 1 whose value nothing depends on."""
        import copy

        last, count = models.tokens(2, 1), []
        plain = step(model, last, copy.deepcopy(cache), attention_mask=more)[1]
        for slot in slots:
            changed = copy.deepcopy(cache)
            for layer in changed.layers:
                layer.values[1, :, slot] += 1e4
            if torch.equal(step(model, last, changed, attention_mask=more)[1], plain):
                count.append(slot)
        return count

    assert len(blind(shrunk(model, ids, attention_mask=mask), range(2, KEPT))) == KEPT - 2  # it sees nothing
    with manyheads.use(model):
        ours = prefilled(model, POLICY, ids, attention_mask=mask)
        first, second = ((store.padded.positions()[1] >= 0).all(0) for store in stores(ours)[:2])
        filled = first & second
        assert int(filled.sum()) == 8 and blind(ours, filled.nonzero()[:, 0].tolist()) == []


def test_several_tokens_on_layers_of_unequal_size(model):
    """Layers that keep different numbers of tokens: the stock cache has one mask for all of them, and breaks."""
    ids, last = models.tokens(1, PROMPT), models.tokens(1, 4)
    stock = shrunk(model, ids)
    stock.layers[1].keys, stock.layers[1].values = stock.layers[1].keys[:, :, -5:], stock.layers[1].values[:, :, -5:]
    with pytest.raises(RuntimeError):
        step(model, last, stock)
    specs = (Norm(budget=10, layers=(0,)), Norm(budget=5, layers=(1,)))
    with manyheads.use(model, *specs):
        cache = DynamicCache(config=model.config)
        step(model, ids, cache)
        assert [layer.keys.shape[2] for layer in cache.layers] == [10, 5]
        many = step(model, last, cache)
        again = DynamicCache(config=model.config)
        step(model, ids, again)
        single = torch.cat([step(model, x, again) for x in last.split(1, 1)], 1)
    assert is_close(many, single)


def test_new_cache_and_generate_agree(model):
    """An explicit cache and ``generate`` inside ``use`` are the same thing."""
    ids = models.tokens(2, PROMPT)
    with manyheads.use(model, POLICY):
        inside = model.generate(ids, max_new_tokens=6, do_sample=False)
    with manyheads.use(model):
        explicit = model.generate(ids, max_new_tokens=6, do_sample=False, past_key_values=new_cache(model, POLICY))
    assert torch.equal(inside, explicit)
