# SPDX-License-Identifier: Apache-2.0
"""A prompt in chunks is compressed as the same prompt at once: after its last chunk, and not after the first."""

import copy
import threading

import pytest
import torch

import manyheads
from manyheads import parse
from manyheads.caches._store import PolicyStore
from manyheads.integrations import prompt_chunks
from manyheads.integrations.transformers import new_cache, prefill
from oracles import caches, models
from tolerance import CLOSE, assert_close

SPECS = [
    "snapkv:budget=0.3,window_size=8", "keydiff:budget=0.3", "expected_attention:budget=0.3", "pyramidkv:budget=0.3",
    "fireq:bits=int4", "hedge:budget=0.4,whole=0", "fireq:base=snapkv,budget=0.4",
]  # fmt: skip
LENGTH, CHUNK = 120, 32
each = pytest.mark.parametrize("spec", SPECS)


@pytest.fixture(scope="module")
def llama():
    return models.build("llama", dtype=torch.float64, head_dim=16)


def generated(model, spec, **how):
    """Logits of what follows a prompt of two rows, one padded, and positions that each layer holds."""
    ids, mask = models.tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :13] = 0
    with manyheads.use(model, spec):
        cache = new_cache(model, parse(spec))
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, min_new_tokens=6, do_sample=False,
            output_logits=True, return_dict_in_generate=True, **how,
        )  # fmt: skip
        held = [store.live.positions().sort(-1).values for store in caches.stores(cache)]
    return torch.stack(out.logits), held


@each
def test_generate(llama, spec):
    want, kept = generated(llama, spec)
    got, held = generated(llama, spec, prefill_chunk_size=CHUNK)
    assert all(torch.equal(a, b) for a, b in zip(held, kept, strict=True))
    assert_close(got, want, CLOSE)


@each
def test_prefill(llama, spec):
    ids = models.tokens(1, LENGTH)

    def read(chunk):
        with manyheads.use(llama, spec):
            cache = new_cache(llama, parse(spec))
            prefill(llama, ids, cache, chunk)
            return caches.step(llama, ids[:, -1:], cache)

    assert_close(read(CHUNK), read(LENGTH), CLOSE)


@pytest.mark.parametrize("spec", ["hashevict:budget=0.3", "h2o:budget=0.3"])
def test_a_fraction_is_of_the_whole_prompt(llama, spec):
    """What replaces tokens as they come holds as many in the end, chosen on the way."""
    _, kept = generated(llama, spec)
    _, held = generated(llama, spec, prefill_chunk_size=CHUNK)
    assert [x.shape for x in held] == [x.shape for x in kept]
    assert (held[0] >= 0).sum() == (kept[0] >= 0).sum()


def test_control(llama, monkeypatch):
    """Who does not wait for the last chunk keeps nearly everything, as it was before."""
    monkeypatch.setattr(prompt_chunks._Prompt, "length", property(lambda _: 0, lambda _, value: None))
    _, kept = generated(llama, SPECS[0])
    _, held = generated(llama, SPECS[0], prefill_chunk_size=CHUNK)
    assert held[0].shape[-1] > 2 * kept[0].shape[-1]


def test_the_chunk_size_of_the_models_own_configuration(llama):
    want, kept = generated(llama, SPECS[0])
    llama.generation_config.prefill_chunk_size = CHUNK
    try:
        got, held = generated(llama, SPECS[0])
    finally:
        llama.generation_config.prefill_chunk_size = None
    assert torch.equal(held[0], kept[0])
    assert_close(got, want, CLOSE)


def test_a_configuration_given_by_place(llama):
    config = copy.deepcopy(llama.generation_config)
    config.update(prefill_chunk_size=CHUNK, max_new_tokens=2, do_sample=False)
    ids = models.tokens(1, LENGTH)
    with manyheads.use(llama, SPECS[0]):
        cache = new_cache(llama, parse(SPECS[0]))
        llama.generate(ids, config, attention_mask=torch.ones_like(ids), past_key_values=cache)
        assert (caches.stores(cache)[0].live.positions() >= 0).sum(-1).max() < 0.3 * LENGTH + 3


def test_the_input_of_an_encoder_is_no_prompt():
    """A decoder that begins with one token is told of no chunks, however long its encoder's input is."""
    model, seen = models.tiny("t5"), []
    with manyheads.use(model):
        noted = vars(model)["generate"]
        noted.generate = lambda *_, **__: seen.append(prompt_chunks._prompt.length)
        model.generate(models.tokens(1, 50), attention_mask=torch.ones(1, 50), prefill_chunk_size=8)
        model.generate(models.tokens(1, 50), decoder_input_ids=models.tokens(1, 20), prefill_chunk_size=8)
    assert seen == [0, 20]


def test_a_second_turn_and_what_is_left_behind(llama):
    """A turn in chunks after a kept prompt is kept, as one at once is; ``generate`` is the model's own again."""
    first, second = models.tokens(1, 60), models.tokens(1, 100)
    held = []
    for how in ({}, {"prefill_chunk_size": 16}):
        with manyheads.use(llama, SPECS[0]):
            cache = new_cache(llama, parse(SPECS[0]))
            for ids in (first, second):
                llama.generate(
                    ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2, do_sample=False,
                    **how,
                )  # fmt: skip
            held.append([store.live.positions() for store in caches.stores(cache)])
    assert all(torch.equal(a, b) for a, b in zip(*held, strict=True))
    assert "generate" not in vars(llama) and prompt_chunks._prompt.more is None


def test_threads_have_prompts_of_their_own(llama):
    found, ready = {}, threading.Barrier(2)
    wants = {chunk: generated(llama, "full", prefill_chunk_size=chunk)[0] for chunk in (16, 48)}
    ids = models.tokens(2, LENGTH)

    def work(chunk):
        ready.wait()
        cache = new_cache(llama, parse(SPECS[0]))
        llama.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2, do_sample=False,
            prefill_chunk_size=chunk,
        )  # fmt: skip
        found[chunk] = [store.live.positions() for store in caches.stores(cache)]

    with manyheads.use(llama, SPECS[0]):
        threads = [threading.Thread(target=work, args=(chunk,)) for chunk in wants]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found[16], found[48], strict=True))
    assert isinstance(caches.stores(new_cache(llama, parse(SPECS[0])))[0], PolicyStore)
