# SPDX-License-Identifier: Apache-2.0
"""KVzip: what a repetition of the prompt attends to, against the formula in loops over what the model computed."""

import math

import pytest
import torch

import manyheads
from manyheads import UserError
from manyheads.caches.kvzip import KVzip
from manyheads.integrations.transformers import new_cache, prefill
from manyheads.strategy import AttentionWatch
from oracles import caches, models

LENGTH, SINKS = 40, 2


class Record(AttentionWatch):
    """Queries and keys of every call, by layer."""

    slug = "record"

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "seen", {})

    def watch(self, call, output):
        self.seen.setdefault(call.site.layer, []).append((call, call.site.output()))


def scored(model, ids, chunk_size, *, group_max=True, sinks=True, own=True, top=True, reading=None,
           plus=False):  # fmt: skip
    """Scores ``[layer][Hkv, L]`` from plain forwards of the model, in float64; flags leave out one part each."""
    made = []
    for start in range(SINKS, ids.shape[1], chunk_size):
        stop = min(start + chunk_size, ids.shape[1])
        record = Record()
        again = ids[:, start:stop] if reading is None else reading(ids, start, stop)
        with torch.no_grad(), manyheads.use(model, record):
            model(torch.cat([ids, again], 1))
        for layer, calls in record.seen.items():
            ((call, out),) = calls
            q, k, v, scale = call.q.double(), call.k.double(), call.v.double(), call.scale
            inputs = call.hidden.double()[0].norm(dim=-1)
            groups, new = q.shape[1] // k.shape[1], again.shape[1]
            if len(made) <= layer:
                made.append(torch.zeros(k.shape[1], ids.shape[1], dtype=torch.float64))
            for h in range(k.shape[1]):
                by_query = []
                for g in range(groups):
                    for t in range(new):
                        columns = [*(range(SINKS) if sinks else ()), *range(start, stop)]
                        columns += range(ids.shape[1], ids.shape[1] + t + 1) if own else ()
                        query = q[0, h * groups + g, ids.shape[1] + t]
                        z = [math.exp(float(query @ k[0, h, j]) * scale) for j in columns]
                        weight = dict(zip(columns, (e / sum(z) for e in z), strict=True))
                        size = dict.fromkeys(columns, 1.0)
                        if plus:
                            w = out.double()[:, (h * groups + g) * v.shape[3] :][:, : v.shape[3]]
                            size = {j: float((w @ v[0, h, j]).norm() / inputs[ids.shape[1] + t]) for j in columns}
                        by_query.append([weight[j] * size[j] for j in range(start, stop)])
                by_query = torch.tensor(by_query, dtype=torch.float64)
                if not group_max:
                    by_query = by_query.unflatten(0, (groups, -1)).mean(0)
                made[layer][h, start:stop] = by_query.amax(0) if top else by_query.mean(0)
    return made


def kept_by_hand(scores, budget):
    """Positions of each layer and head: the best of all that are not protected."""
    every = [(layer, h, j) for layer, x in enumerate(scores) for h in range(len(x)) for j in range(x.shape[1])]
    room = math.ceil(budget * scores[0].shape[1]) * sum(len(x) for x in scores)
    best = sorted(every, key=lambda s: (s[2] >= SINKS, -float(scores[s[0]][s[1], s[2]])))[:room]
    return [[sorted(j for n, i, j in best if (n, i) == (layer, h)) for h in range(len(x))] for layer, x in
            enumerate(scores)]  # fmt: skip


def kept(cache):
    return [
        [sorted(p for p in head if p >= 0) for head in store.live.positions()[0].tolist()]
        for store in caches.stores(cache)
    ]


def policy(**fields):
    return KVzip(**{"budget": 0.4, "sinks": SINKS, "instruct": False, **fields})


@pytest.fixture(scope="module")
def model():
    return models.build("llama", num_key_value_heads=2).double()


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("chunk_size", [64, 15])
def test_against_loops(model, chunk_size, plus):
    ids = models.tokens(1, LENGTH)
    with manyheads.use(model):
        cache = caches.prefilled(model, policy(chunk_size=chunk_size, plus=plus), ids)
    assert kept(cache) == kept_by_hand(scored(model, ids, chunk_size, plus=plus), 0.4)


def test_control_of_the_loops(model):
    """Each part of the formula matters for what stays, and so does what is read."""
    ids = models.tokens(1, LENGTH)
    with manyheads.use(model):
        got = kept(caches.prefilled(model, policy(chunk_size=15), ids))
    for part in ("group_max", "sinks", "own", "top"):
        assert got != kept_by_hand(scored(model, ids, 15, **{part: False}), 0.4), part
    assert got != kept_by_hand(scored(model, ids, 64), 0.4)
    assert got != kept_by_hand(scored(model, ids, 15, plus=True), 0.4)
    reversed_ = scored(model, ids, 15, reading=lambda ids, start, stop: ids[:, start:stop].flip(1))
    assert got != kept_by_hand(reversed_, 0.4)


def test_the_instruction_and_the_last_tokens_of_the_chunk_before_are_read_too(model):
    ids, said = models.tokens(1, LENGTH), {"\n\nRepeat the previous context:": [5, 6], "later": [7, 8, 9]}
    encode = lambda text: said.get(text, said["later"])  # noqa: E731
    pieces = list(policy(instruct=True, chunk_size=15).second_reading(ids, encode))
    row = ids[0].tolist()
    assert [(at.start, at.stop, piece[0].tolist()) for at, piece in pieces] == [
        (2, 17, [5, 6, *row[2:17]]), (17, 32, [7, 8, 9, *row[9:17], *row[17:32]]),
        (32, 40, [7, 8, 9, *row[24:32], *row[32:40]]),
    ]  # fmt: skip


def test_nothing_of_the_second_reading_stays(model):
    """Tokens, positions and bytes are those of the prompt, and the next token goes on behind it."""
    ids, last = models.tokens(1, LENGTH), models.tokens(1, 1, seed=7)
    with manyheads.use(model):
        cache = caches.prefilled(model, policy(), ids)
        assert int(cache.get_seq_length()) == LENGTH
        total = sum(len(head) for layer in kept(cache) for head in layer)
        assert total == math.ceil(0.4 * LENGTH) * 2 * len(cache.layers)
        assert all("reconstruction" not in store.state for store in caches.stores(cache))
        got = caches.step(model, last, cache)
        masked = caches.prefilled(model, "full", ids)
        for store, heads in zip(caches.stores(masked), kept(caches.prefilled(model, policy(), ids)), strict=True):
            for h, held in enumerate(heads):
                gone = [j for j in range(LENGTH) if j not in held]
                store.live.keys[0, h, gone] = 0.0
                store.live.values[0, h, gone] = 0.0
        assert int(cache.get_seq_length()) == LENGTH + 1 and bool(got.isfinite().all())


def test_a_prompt_in_chunks_is_scored_after_the_last(model):
    ids = models.tokens(1, LENGTH + 1)
    with manyheads.use(model):
        cache = new_cache(model, policy(chunk_size=15))
        prefill(model, ids, cache, chunk=16)
        whole = caches.prefilled(model, policy(chunk_size=15), ids[:, :LENGTH])
    assert kept(cache) == kept(whole)


def test_generate_and_a_budget_of_one(model):
    """``generate`` makes its own cache; a budget of 1 reads once and is the model itself."""
    ids = models.tokens(1, LENGTH)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)
    with manyheads.use(model, policy(budget=1.0)):
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), plain)
    with manyheads.use(model, policy()):
        made = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert made["sequences"].shape == plain.shape
    held = sum(len(head) for layer in kept(made["past_key_values"]) for head in layer)
    assert held == 2 * len(made["past_key_values"].layers) * (math.ceil(0.4 * LENGTH) + 3)


def test_sliding_windows_stay_as_they_are():
    model = models.build("gemma2").double()
    ids = models.tokens(1, LENGTH)
    with manyheads.use(model):
        cache = caches.prefilled(model, policy(), ids)
        full = caches.prefilled(model, "full", ids)
        for store, other in zip(caches.stores(cache), caches.stores(full), strict=True):
            if store.site.window is not None:
                assert torch.equal(store.live.keys, other.live.keys)
            else:
                assert (store.live.positions() >= 0).sum() < (other.live.positions() >= 0).sum()
        assert {store.site.window is None for store in caches.stores(cache)} == {True, False}


def test_refusals(model):
    ids = models.tokens(2, 12)
    for fields, words in (({"chunk_size": 0}, "chunk_size"), ({"schedule": "chunk"}, "prefill")):
        with pytest.raises(UserError, match=words):
            KVzip(**fields)
    with manyheads.use(model):
        with pytest.raises(UserError, match="one length"):
            mask = torch.ones_like(ids)
            mask[0, :3] = 0
            caches.prefilled(model, policy(), ids, attention_mask=mask)
        with pytest.raises(UserError, match="instruct=false"):
            caches.prefilled(model, policy(instruct=True), ids)
        with pytest.raises(UserError, match="not a part of it"):
            cache = new_cache(model, policy())
            for _ in range(2):
                model.model(ids, past_key_values=cache)
        with pytest.raises(UserError, match="of its own"):
            shared = new_cache(model, manyheads.parse("full"), record=16)
            caches.step(model, ids, shared)
            shared.fork(policy())
        with pytest.raises(UserError, match="input_ids"):
            cache = new_cache(model, policy())
            model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)


def test_a_decoder_behind_an_encoder():
    """What it has been given to begin with is kept whole while that is short, and else refused in a line."""
    bart, ids = models.tiny("bart"), models.tokens(1, 12)
    with manyheads.use(bart, policy()), torch.no_grad():
        made = bart.generate(ids, max_new_tokens=3)
    assert torch.equal(made, bart.generate(ids, max_new_tokens=3))
    with manyheads.use(bart, policy()), pytest.raises(UserError, match="with an encoder"), torch.no_grad():
        bart.generate(ids, decoder_input_ids=models.tokens(1, 24), max_new_tokens=3)
