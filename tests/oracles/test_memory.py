# SPDX-License-Identifier: Apache-2.0
"""Nothing outlives its use: caches, activations and memories die with their last owner."""

import gc
import weakref

import pytest
import torch
from torch import Tensor

import manyheads
from manyheads.integrations.transformers import new_cache
from manyheads.strategy import AttentionWatch
from oracles import models
from oracles.caches import prefilled, step, stores
from oracles.strategies import Watch

SPECS = [
    "full",
    "keydiff:budget=6",
    "snapkv:budget=8,window_size=4,schedule=step",
    "hashevict:budget=8,num_global=1,num_recent=2",
]


class Hoard(AttentionWatch):
    """Keeps what it sees, as long as its port's memory lives."""

    def watch(self, call, out):
        call.state["seen"] = [call.q, out]


def alive(references):
    gc.collect()
    return [r for r in references if r() is not None]


@pytest.mark.parametrize("spec", SPECS)
def test_a_cache_dies_with_its_owner(spec):
    model = models.tiny("llama")
    with manyheads.use(model) as port:
        cache = prefilled(model, spec, models.tokens(2, 16))
        step(model, models.tokens(2, 1), cache)
        references = [weakref.ref(cache), *(weakref.ref(x) for s in stores(cache) for x in (s, s.keys, s.values))]
        assert len(alive(references)) == len(references)
        del cache
        assert not alive(references), "the open port holds a cache that its owner gave up"
    assert port.strategies == () and not alive(references)


def test_activations_die_with_the_memory():
    model, hoard = models.tiny("llama"), Hoard()
    with manyheads.use(model, hoard) as port:
        models.forward("llama", model)
        references = [weakref.ref(x) for m in port.state(hoard).values() for x in m["seen"]]
    assert len(alive(references)) == 4
    del port
    assert not alive(references)


def test_no_tensor_is_left_after_many_uses():
    """The count of tensors that live does not grow from use to use."""
    model, counts = models.tiny("llama"), []
    for _ in range(3):
        for spec in SPECS:
            with manyheads.use(model, spec, Watch()):
                model.generate(**models.inputs("llama"), max_new_tokens=3, do_sample=False)
        gc.collect()
        counts.append(sum(issubclass(type(x), Tensor) for x in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]


def test_a_dead_model_leaves_no_cache_behind():
    """A cache refers to its model weakly."""
    model = models.build("llama")
    cache = new_cache(model, manyheads.parse("full"))
    reference = weakref.ref(model)
    del model
    assert not alive([reference]) and cache.get_seq_length() == 0


@pytest.mark.parametrize(
    "spec", ["hashevict:budget=8,num_global=1,num_recent=2", "hashevict:budget=0.5,num_global=1,num_recent=2"]
)
def test_hashevict_overwrites_in_place(spec):
    """From the first full step on: the same storages, the same bytes, step after step."""
    model = models.tiny("llama")
    with manyheads.use(model):
        cache = prefilled(model, spec, models.tokens(2, 24))
        step(model, models.tokens(2, 1), cache)
        places = [[x.data_ptr() for x in s.padded.tensors if x is not None] for s in stores(cache)]
        size = cache.bytes()
        for t in range(20):
            before = [s.padded.index.clone() for s in stores(cache)]
            step(model, models.tokens(2, 1, seed=t), cache)
            assert [[x.data_ptr() for x in s.padded.tensors if x is not None] for s in stores(cache)] == places
            assert cache.bytes() == size
            for store, old in zip(stores(cache), before, strict=True):  # exactly one slot of each head is another
                assert bool(((store.padded.index != old).sum(-1) == 1).all())


def test_control_of_in_place():
    model = models.tiny("llama")
    with manyheads.use(model):
        cache = prefilled(model, "keydiff:budget=8,schedule=step", models.tokens(2, 24))
        place = stores(cache)[0].keys.data_ptr()
        held = [stores(cache)[0].keys]  # so that the allocator cannot give the same place again
        step(model, models.tokens(2, 1), cache)
        assert stores(cache)[0].keys.data_ptr() != place and len(held) == 1


def test_a_fork_shares_until_it_drops():
    """Forks hold no second copy of what they keep whole, and dropping in one leaves the parent as it was."""
    model = models.tiny("llama")
    with manyheads.use(model):
        parent = prefilled(model, "full", models.tokens(1, 24), record=4)
        whole = [s.keys.clone() for s in stores(parent)]
        twin = parent.fork(manyheads.parse("full"))
        assert [s.keys.data_ptr() for s in stores(twin)] == [s.keys.data_ptr() for s in stores(parent)]
        for spec in (
            "keydiff:budget=6",
            "hashevict:budget=8,num_global=1,num_recent=2",
            "snapkv:budget=6,window_size=4",
        ):
            arm = parent.fork(manyheads.parse(spec))
            for t in range(12):
                step(model, models.tokens(1, 1, seed=t), arm)
        step(model, models.tokens(1, 5), twin)
        assert parent.get_seq_length() == 24
        assert all(torch.equal(s.keys, w) for s, w in zip(stores(parent), whole, strict=True))
