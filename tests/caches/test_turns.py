# SPDX-License-Identifier: Apache-2.0
"""A chat under a budget: after every turn what is held is within the budget of the whole conversation."""

import copy
import math
import warnings

import pytest
import torch

import manyheads
from manyheads import parse
from manyheads.integrations.decoding import greedy
from manyheads.integrations.transformers import new_cache, prefill
from oracles import models
from oracles.caches import stores

BUDGET, TURNS = 0.25, (60, 30, 44, 20, 50)
# By budget in tokens; with the paper's protected tokens, few enough for such a chat.
TOKENS = (
    "knorm", "keydiff", "snapkv:window_size=4,recent=4", "lagkv:sinks=2,lag_size=8", "expected_attention", "random",
    "h2o", "tova", "streaming_llm", "d2o", "hashevict", "adakv:base=snapkv(window_size=4),recent=4",
    "pyramidkv:base=snapkv(window_size=4),recent=4", "graphkv:base=keydiff", "fireq:base=knorm,window_tokens=8",
    "hedge:bits=none,recent=4,whole=0", "h2o:schedule=prefill",
)  # fmt: skip


@pytest.fixture(scope="module")
def llama():
    return models.build("llama")


def chat(model, strategy, said=3):
    """The cache after the last turn was read, and the tokens of the whole chat; the model replies to every turn."""
    cache, seen = new_cache(model, strategy), 0
    for n, length in enumerate(TURNS):
        ids = models.tokens(1, length, seed=n)
        if n < len(TURNS) - 1:
            greedy(model, cache, ids, said)
            seen += length + said - 1
        else:
            with torch.no_grad():
                model(ids, past_key_values=cache)
            seen += length
    assert cache.get_seq_length() == seen
    return cache, seen


def kept(cache):
    """Tokens that the heads hold, over all layers."""
    return sum(int((store.live.positions() >= 0).sum()) for store in stores(copy.deepcopy(cache)))


def heads(cache):
    return sum(store.live.keys.shape[1] for store in stores(copy.deepcopy(cache)))


@pytest.mark.parametrize("spec", TOKENS)
def test_tokens_after_every_turn_are_within_the_budget(llama, spec):
    strategy = parse(f"{spec}{',' if ':' in spec else ':'}budget={BUDGET}")
    with manyheads.use(llama):
        cache, seen = chat(llama, strategy.for_turns())
        share = kept(cache) / heads(cache)
        most = max(math.ceil(BUDGET * seen), strategy.protected)
        assert share <= most
        # hashevict overwrites the slots that a fraction of its first prompt gave it, and gets no more.
        assert share == strategy.protected if spec == "hashevict" else share > 0.5 * most
        if strategy.for_turns() != strategy:  # control: as it is by default, only the first turn is compressed
            assert kept(chat(llama, strategy)[0]) / heads(cache) > 1.5 * most


@pytest.mark.parametrize("spec", ["hedge:recent=4,whole=0", "hedge:recent=4,whole=0,bits=int4"])
def test_bytes_of_one_ranking_after_every_turn(llama, spec):
    """``hedge`` and ``auto`` count bytes of a 16-bit cache; what stands beside the codes is counted."""
    half = copy.deepcopy(llama).to(torch.bfloat16)
    strategy = parse(f"{spec},budget={BUDGET}")
    with manyheads.use(half):
        whole = chat(half, parse("full"))[0].bytes()
        cache = chat(half, strategy.for_turns())[0]
        assert 0.4 * BUDGET * whole < cache.bytes() <= 1.1 * BUDGET * whole
        assert chat(half, strategy)[0].bytes() > 1.3 * BUDGET * whole


def test_what_has_a_schedule_of_its_own_keeps_it():
    assert parse("keydiff").for_turns().schedule == parse("auto").for_turns().schedule == "turn"
    assert parse("fireq:base=graphkv(base=keydiff)").for_turns().inner.schedule == "turn"
    assert (
        parse("streaming_llm").for_turns().schedule == "step" and parse("knorm:schedule=64").for_turns().schedule == 64
    )
    for spec in ("full", "mla_hw"):
        assert parse(spec).for_turns() == parse(spec)


def test_a_turn_in_chunks_is_one_turn(llama):
    """It is compressed after its last chunk, as if it had come at once; ``chunk`` compresses after each."""
    ids, found = models.tokens(1, 90, seed=3), {}
    with manyheads.use(llama):
        for schedule in ("turn", "chunk"):
            for size in (90, 20):
                cache = new_cache(llama, parse(f"knorm:budget=0.3,schedule={schedule}"))
                prefill(llama, ids[:, :40], cache)
                prefill(llama, ids, cache, chunk=size)
                found[schedule, size] = [store.live.positions() for store in stores(cache)]
    same = {name: all(map(torch.equal, found[name, 90], found[name, 20])) for name in ("turn", "chunk")}
    assert same == {"turn": True, "chunk": False}
    assert all(map(torch.equal, found["turn", 90], found["chunk", 90]))


def generated(model, cache, turns=TURNS):
    """A chat by ``generate``, each call with the whole conversation so far."""
    ids = models.tokens(1, 1, seed=9)[:, :0]
    for n, length in enumerate(turns):
        ids = torch.cat([ids, models.tokens(1, length, seed=n)], 1)
        ids = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
    return ids


def test_generate_goes_on_with_a_chat(llama):
    """The cache of ``generate`` after several calls is that of the turns."""
    with manyheads.use(llama), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*ranks anew at every turn")
        cache = new_cache(llama, parse(f"knorm:budget={BUDGET},schedule=turn"))
        ids = generated(llama, cache)
        held = kept(cache) / heads(cache)
        assert held == math.ceil(BUDGET * (ids.shape[1] - 2)) + 1  # the reply's token comes on top until the next turn


def test_a_chat_under_the_schedule_of_one_prompt_is_told(llama):
    """Once, from the second later prompt on; a question about a prompt is no chat, nor is what keeps everything."""
    with manyheads.use(llama):
        for spec, turns, warns in (
            ("knorm:budget=0.25", 3, True), ("knorm:budget=0.25", 2, False), ("knorm:budget=1.0", 3, False),
            ("full", 3, False), ("tova:budget=0.25", 3, False),
        ):  # fmt: skip
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                generated(llama, new_cache(llama, parse(spec)), TURNS[:turns])
            assert sum("ranks anew at every turn" in str(one.message) for one in said) == warns, spec
