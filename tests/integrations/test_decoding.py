# SPDX-License-Identifier: Apache-2.0
"""Reading in chunks, and decoding from a cache of fixed size: by hand, by ``generate``, and compiled."""

import math

import pytest
import torch
from transformers.generation.configuration_utils import CompileConfig

import manyheads
from manyheads import UserError, parse
from manyheads.integrations.decoding import decode, greedy
from manyheads.integrations.transformers import new_cache, prefill
from oracles import models
from oracles.caches import stores
from tolerance import DRAWN, FORMULA, WRONG, is_close, mean_error, share_error

SPECS = {
    "full": "full",
    "even": "snapkv:budget=20,window_size=4,schedule=chunk",
    "ragged": "adakv:base=snapkv(window_size=4,kernel_size=3),budget=0.5",
    "packed": "fireq:window_tokens=8",
    "packed-fp8": "fireq:base=knorm,bits=fp8,budget=0.6,window_tokens=4",
    "packed-k8v4": "fireq:bits=k8v4,window_tokens=8",
    "one ranking": "hedge:budget=0.5,recent=4,whole=0",
}
each = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@pytest.fixture
def llama():
    """In float64: tokens are compared between kinds of storage, and in float32 the logits nearly tie."""
    return models.build("llama", dtype=torch.float64)


def generated(model, ids, cache, **extra):
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=10, do_sample=False,
        eos_token_id=None, **extra,
    )  # fmt: skip
    return out[:, ids.shape[1] :]


@each
def test_fixed_storage_decodes_what_growing_storage_does(llama, spec):
    ids = models.tokens(2, 40)
    with manyheads.use(llama):
        caches = [new_cache(llama, parse(spec), room=room) for room in (12, 12, 0)]
        for cache in caches:
            prefill(llama, ids, cache, 16 if "chunk" in spec else 4096)
        want = generated(llama, ids, caches[2])
        assert torch.equal(decode(llama, ids, caches[0], 10), want)
        assert torch.equal(generated(llama, ids, caches[1]), want)
        assert int(caches[0].get_seq_length()) == caches[2].get_seq_length() == 49


@each
@pytest.mark.parametrize("padding", [pytest.param(0, marks=pytest.mark.slow), 9])
def test_generate_compiles_it_in_one_graph(llama, spec, padding):
    """What runs as a CUDA graph on a GPU: no break, no recompilation from token to token."""
    ids = models.tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    asked = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with manyheads.use(llama):
        want = llama.generate(ids, past_key_values=new_cache(llama, parse(spec)), **asked)
        got = llama.generate(
            ids, past_key_values=new_cache(llama, parse(spec), room=12), compile_config=config, **asked
        )  # fmt: skip
    assert torch.equal(got, want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_chunks_never_hold_the_prompt(llama):
    """Under a budget of slots no layer ever holds more than it and a chunk; control: without eviction it does."""
    ids, held = models.tokens(1, 101), []
    for spec in ("knorm:budget=24,schedule=chunk", "full"):
        with manyheads.use(llama):
            cache, most = new_cache(llama, parse(spec)), []
            prefill(llama, ids, cache, 16, lambda _, c=cache, m=most: m.append(c.bytes()))
            held.append(max(most))
            assert cache.get_seq_length() == 100
            assert all(s.live.size == (24 if "knorm" in spec else 100) for s in stores(cache))
    assert held[0] < held[1] * (24 + 16) / 100


def test_prefill_goes_on_where_a_cache_stands(llama):
    ids = models.tokens(1, 60)
    with manyheads.use(llama):
        parts, whole = (new_cache(llama, parse("full")) for _ in range(2))
        prefill(llama, ids[:, :31], parts, 8)
        prefill(llama, ids, parts, 8)
        prefill(llama, ids, whole)
        for a, b in zip(stores(parts), stores(whole), strict=True):
            assert is_close(a.keys, b.keys, FORMULA) and a.seen == b.seen == 59


def test_rows_end_at_eos(llama):
    ids = models.tokens(2, 20)
    with manyheads.use(llama):
        caches = [new_cache(llama, parse("full"), room=64) for _ in range(2)]
        for cache in caches:
            prefill(llama, ids, cache)
        free = decode(llama, ids, caches[0], 64)
        eos = int(free[0, 3])
        made = decode(llama, ids, caches[1], 64, eos=eos)
    for row, plain in zip(made.tolist(), free.tolist(), strict=True):
        end = plain.index(eos) if eos in plain else len(plain)
        assert row[: end + 1] == plain[: min(end + 1, len(row))] and set(row[end:]) <= {eos}


def test_drawing_follows_the_distribution():
    """First tokens drawn for many rows against the softmax, and at a tenth more of the temperature: another one."""
    model = models.build("llama")
    ids = models.tokens(1, 12).expand(4000, -1).contiguous()
    with torch.no_grad():
        model.lm_head.weight.div_(model(ids[:1]).logits[0, -1].std() / 1.5)  # neither all alike nor one far above
    torch.manual_seed(0)
    with manyheads.use(model), torch.no_grad():
        logits = model(ids[:1]).logits[0, -1].double()
        drawn = {}
        for temperature in (1.0, 0.6, 1e-4):
            cache = new_cache(model, parse("full"), room=2)
            prefill(model, ids, cache)
            drawn[temperature] = decode(model, ids, cache, 1, temperature=temperature)[:, 0]
    for temperature in (1.0, 0.6):
        counts = torch.bincount(drawn[temperature], minlength=len(logits))
        p, hot = ((logits / (temperature * by)).softmax(-1) for by in (1.0, 1.1))
        assert share_error(counts, p) < DRAWN
        # The mean logit is what tells of a temperature, with the least error of all statistics.
        for q, low, high in ((p, 0.0, DRAWN), (hot, WRONG, math.inf)):
            mean = float((q * logits).sum())
            spread = float((q * (logits - mean).square()).sum().sqrt())
            assert low <= mean_error(logits[drawn[temperature]], mean, spread) <= high
    assert bool((drawn[1e-4] == logits.argmax()).all())


def test_refusals(llama):
    ids = models.tokens(1, 20)
    with manyheads.use(llama):
        for spec in ("h2o:budget=8", "streaming_llm:budget=8", "h2o:budget=8,schedule=chunk", "hashevict:budget=20"):
            with pytest.raises(UserError, match="schedule="):
                new_cache(llama, parse(spec), room=8)
        cache = new_cache(llama, parse("full"), room=8)
        with pytest.raises(UserError, match="prefill it first"):
            decode(llama, ids, cache, 4)
        prefill(llama, ids, cache)
        with pytest.raises(UserError, match="room for 8"):
            decode(llama, ids, cache, 9)
        with pytest.raises(UserError, match="fixed size"):
            decode(llama, ids, new_cache(llama, parse("full")), 4)
        with pytest.raises(IndexError):
            generated(llama, ids, cache)  # ten tokens where eight fit
    with pytest.raises(UserError, match="sliding window"):
        new_cache(models.tiny("mistral"), parse("full"), room=8)


@pytest.mark.parametrize("begun", [0, 6])
def test_chunks_of_a_prompt_by_number(llama, begun):
    """All tokens but the last, from where the cache stands; the stores are told while more of the prompt is to come."""
    ids, told, said, kept = models.tokens(1, 31), [], [], []
    with manyheads.use(llama):
        cache = new_cache(llama, parse("full"))
        if begun:
            prefill(llama, ids[:, : begun + 1], cache)

        def note(_, args, given):
            said.append(given["input_ids"].shape[1])
            kept.append(given["logits_to_keep"])
            told.append(stores(cache)[0].prefilling)

        handle = llama.register_forward_pre_hook(note, with_kwargs=True)
        counts = []
        prefill(llama, ids, cache, 8, counts.append)
        handle.remove()
        assert cache.get_seq_length() == 30
    assert said == counts == ([8, 8, 8, 6] if not begun else [8, 8, 8]) and set(kept) == {1}
    assert told == [True] * (len(said) - 1) + [False]


def test_decoding_looks_now_and_then(llama):
    """Every 32 tokens it tells how many there are, and there alone it stops where all rows have ended."""
    ids, told = models.tokens(2, 20), []
    with manyheads.use(llama):
        cache, alone = (new_cache(llama, parse("full"), room=80) for _ in range(2))
        prefill(llama, ids, cache)
        free = decode(llama, ids, cache, 70, progress=told.append)
        assert free.shape == (2, 70) and told == [32, 64]
        first = int(free[0, 0])
        prefill(llama, ids[:1], alone)
        assert decode(llama, ids[:1], alone, 70, eos=first).tolist() == [[first] * 32]


@pytest.mark.parametrize("most", [1, 2, 5])
def test_greedy_reads_what_it_makes_but_for_the_last(llama, most):
    """The tokens of ``generate``, and each ends it where it has to: the number, an end, what is settled."""
    ids = models.tokens(1, 12)
    want = llama.generate(ids, max_new_tokens=5, do_sample=False)[0, 12:].tolist()
    with manyheads.use(llama):
        for piece in (None, 5):
            cache = new_cache(llama, parse("full"))
            assert greedy(llama, cache, ids, max_new_tokens=most, piece=piece) == want[:most]
            assert cache.get_seq_length() == 12 + most - 1
        end = next(i for i, token in enumerate(want) if token not in want[:i] and i == want.index(want[most - 1]))
        cache = new_cache(llama, parse("full"))
        assert greedy(llama, cache, ids, max_new_tokens=5, ends=(want[end],)) == want[:end]
        assert cache.get_seq_length() == 12 + end
        cache, seen = new_cache(llama, parse("full")), []
        made = greedy(
            llama, cache, ids, max_new_tokens=5, ends=(), settled=lambda x: seen.append(len(x)) or len(x) == most
        )
        assert made == want[:most] and cache.get_seq_length() == 12 + most - 1
        assert seen == list(range(1, min(most, 4) + 1))
