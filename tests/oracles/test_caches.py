# SPDX-License-Identifier: Apache-2.0
"""Every cache strategy, under several schedules and budgets, has the properties of a cache."""

import pytest
import torch

import manyheads
from oracles import caches, models
from oracles.strategies import Blind, Careless, DrawnGates, Forgetful, MaskedOnly, Miscounted, Norm, Unmarked, Wrong

EVICTING = {
    "norm": Norm(budget=0.5),
    "norm-step": Norm(budget=7, schedule="step", recent=2),
    "random": "random:budget=0.5",
    "random-every-3": "random:budget=5,schedule=3",
    "streaming_llm": "streaming_llm:budget=0.6,sinks=2",
    "streaming_llm-slots": "streaming_llm:budget=6,sinks=2",
    "snapkv": "snapkv:budget=0.75,window_size=3,kernel_size=3",
    "snapkv-step": "snapkv:budget=5,window_size=3,kernel_size=3,schedule=step",
    "snapkv-every-2": "snapkv:budget=0.6,window_size=2,kernel_size=5,schedule=2,sinks=1",
    "keydiff": "keydiff:budget=0.5",
    "keydiff-chunk": "keydiff:budget=6,schedule=chunk",
    "hashevict": "hashevict:budget=6,num_global=2,num_recent=2",
    "hashevict-fraction": "hashevict:budget=0.8,num_global=1,num_recent=1,probe=key",
    "hashevict-reserve": "hashevict:budget=0.6,num_global=1,num_recent=1,reserve=4",
    "knorm": "knorm:budget=0.5",
    "h2o": "h2o:budget=6",
    "h2o-prefill": "h2o:budget=0.5,schedule=prefill",
    "tova": "tova:budget=6",
    "lagkv": "lagkv:budget=0.6,sinks=1,lag_size=3",
    "pyramidkv": "pyramidkv:base=snapkv(window_size=2,kernel_size=3),budget=0.5,beta=4",
    "adakv": "adakv:base=snapkv(window_size=2,kernel_size=3),budget=0.5",
    "adakv-chunk": "adakv:base=keydiff,budget=6,schedule=chunk",
    "d2o": "d2o:budget=0.7,sinks=1",
    "graphkv": "graphkv:base=snapkv(window_size=2,kernel_size=3),budget=0.5",
    "fireq": "fireq:base=keydiff,budget=0.7,window_tokens=2",
    "hedge": "hedge:budget=0.6,sinks=1,recent=1,window_size=4,bits=none,whole=0",
    "attention_gate": DrawnGates(),
    "attention_gate-step": DrawnGates(schedule="step", sinks=1),
}
# The six that stand for the rest where a property is dear: one-shot and per step, key-only and with queries, in place.
FEW = ("norm", "random-every-3", "streaming_llm-slots", "snapkv-step", "keydiff-chunk", "hashevict")
each = pytest.mark.parametrize("strategy", EVICTING.values(), ids=EVICTING)
few = pytest.mark.parametrize("strategy", [EVICTING[name] for name in FEW], ids=FEW)
GROUPS = {f"group of {4 // n}": {"num_key_value_heads": n} for n in (4, 2, 1)}
_models = {}


def grouped(group):
    """Llama with query groups of 1, 2 or 4."""
    if group not in _models:
        _models[group] = models.build("llama", dtype=torch.float64, **GROUPS[group])
    return _models[group]


def in_groups(every):
    """All strategies with query groups of one size, and the six with all sizes."""
    cases = [(group, name) for name in EVICTING for group in GROUPS if group == every or name in FEW]
    values = [pytest.param(group, EVICTING[name], id=f"{group}-{name}") for group, name in cases]
    return pytest.mark.parametrize(("group", "strategy"), values)


@pytest.fixture
def llama():
    return models.tiny("llama", torch.float64)


@in_groups("group of 2")
def test_batch_equals_singles_padded_left(group, strategy):
    caches.batch_equals_singles_padded_left(grouped(group), strategy)


@in_groups("group of 4")
def test_batch_equals_singles_padded_right(group, strategy):
    caches.batch_equals_singles_padded_right(grouped(group), strategy)


THREE = ("norm", "snapkv-step", "hashevict")  # once after the prompt by keys, at each step by queries, in place


@pytest.mark.parametrize("strategy", [EVICTING[name] for name in THREE], ids=THREE)
@pytest.mark.parametrize("name", [name for name in models.DECODERS if name != "llama"])
def test_batch_equals_singles_in_every_architecture(name, strategy, monkeypatch):
    softmax = torch.nn.functional.softmax  # models ask for float32, where the least float64 of their masks is -inf
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim=-1, dtype=None: softmax(x, dim))
    caches.batch_equals_singles_padded_left(models.tiny(name, torch.float64), strategy)


@each
def test_beams_equal_singles(llama, strategy):
    caches.beams_equal_singles(llama, strategy)


@each
def test_padding_is_never_read(llama, strategy):
    caches.padding_is_never_read(llama, strategy)


@few
def test_every_kept_slot_matters(llama, strategy):
    caches.every_kept_slot_matters(llama, strategy, replaces_first="hashevict" in str(strategy))


@pytest.mark.parametrize("name", models.DECODERS)
def test_off_means_off(name):
    plain = ("random", "streaming_llm", "keydiff", "snapkv", "hashevict")
    budgets = (1.0, 1000) if name == "llama" else (1.0,)
    specs = ["full:budget=1.0", *(f"{slug}:budget={budget}" for slug in plain for budget in budgets)]
    caches.off_means_off(models.tiny(name), *specs, "snapkv:budget=1.0,schedule=step", "keydiff:budget=1000,schedule=2")


@each
def test_on_means_on(llama, strategy):
    caches.on_means_on(llama, strategy)


@each
def test_bytes_are_real(llama, strategy):
    caches.bytes_are_real(llama, strategy)


@pytest.mark.parametrize("strategy", ["full", "keydiff:budget=1.0", "random:budget=40"])
def test_a_window_frees_what_it_leaves(strategy):
    """A sliding-window layer holds the window and no byte more, already after the prompt."""
    model = models.tiny("mistral")
    with manyheads.use(model):
        cache = caches.prefilled(model, strategy, models.tokens(2, 60))
        for store in caches.stores(cache):
            assert store.keys.shape[2] == models.WINDOW - 1
            assert store.keys.untyped_storage().nbytes() == store.keys.numel() * 4
        assert cache.bytes() == caches.held(cache)


@each
def test_slot_order_is_free(llama, strategy):
    caches.slot_order_is_free(llama, strategy)


@pytest.mark.parametrize("strategy", ["full", *EVICTING.values()], ids=["full", *EVICTING])
def test_rows_can_be_rearranged(llama, strategy):
    caches.rows_can_be_rearranged(llama, strategy)


@pytest.mark.parametrize("strategy", ["full", *EVICTING.values()], ids=["full", *EVICTING])
def test_two_conversations(llama, strategy):
    caches.two_conversations(llama, strategy)


ROOMY = ("full", "snapkv:budget=30,window_size=4,schedule=step", "hashevict:budget=30", "random:budget=30,schedule=2")


@pytest.mark.parametrize("strategy", [*ROOMY, *EVICTING.values()], ids=[*ROOMY, *EVICTING])
def test_crops_or_refuses(llama, strategy):
    caches.crops_or_refuses(llama, strategy)


@few
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_continues_where_it_was(name, strategy):
    caches.continues_where_it_was(models.build(name), strategy)


PADLESS = {"kvzip": "kvzip:budget=0.4,sinks=1,instruct=false"}
PACKED = {"hedge-int4": "hedge:budget=0.9,sinks=1,recent=1,window_size=4,bits=int4,whole=0"}


@pytest.mark.parametrize("strategy", [*EVICTING.values(), *PACKED.values()], ids=[*EVICTING, *PACKED])
def test_protected_stay(llama, strategy):
    caches.protected_stay(llama, strategy)


@pytest.mark.parametrize("strategy", PADLESS.values(), ids=PADLESS)
def test_protected_stay_in_rows_of_one_length(llama, strategy):
    caches.protected_stay(llama, strategy, padded=False)


@pytest.mark.parametrize("how", [Careless, Miscounted])
def test_control_of_protected(llama, how):
    with pytest.raises(AssertionError, match="is not in head"):
        caches.protected_stay(llama, Wrong(budget=0.5, how=how))


@few
def test_rows_with_protected_spans_equal_singles(llama, strategy):
    caches.protected_rows_equal_singles(llama, strategy)


CONTROLS = [
    (caches.batch_equals_singles_padded_left, Unmarked),
    (caches.batch_equals_singles_padded_right, Unmarked),
    (caches.beams_equal_singles, Unmarked),
    (caches.padding_is_never_read, Unmarked),
    (caches.every_kept_slot_matters, Blind),
    (caches.slot_order_is_free, Blind),
    (caches.bytes_are_real, MaskedOnly),
    (caches.continues_where_it_was, Forgetful),
]


@pytest.mark.parametrize(("oracle", "how"), CONTROLS, ids=[f"{o.__name__}-{h.__name__}" for o, h in CONTROLS])
def test_control(llama, oracle, how):
    oracle(llama, Wrong(budget=0.5))
    with pytest.raises(AssertionError):
        oracle(llama, Wrong(budget=0.5, how=how))


def test_control_of_off_and_on(llama):
    with pytest.raises(AssertionError):
        caches.off_means_off(llama, "random:budget=0.5")
    with pytest.raises(AssertionError):
        caches.on_means_on(llama, "random:budget=1000")
