# SPDX-License-Identifier: Apache-2.0
"""Lenses count tokens as the model's cache does: what it allocates ahead, drops or has from before changes no table."""

import copy
from contextlib import suppress

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

import manyheads
from manyheads.errors import UserError
from manyheads.lens import TokenSpans
from oracles import models
from tolerance import is_close, is_far

LENSES = ("active_dormant", "reasoning_rhythm:nearest=2", "massive_values", "refined_massive_activations")
DECODERS = ("llama", "mistral", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3")
SPANS = TokenSpans({"system": [[(6, 9)]], "response": [[(19, 40)]]})


def generated(name, lens, **how):
    model = models.tiny(name)
    with manyheads.watch(model, lens, roles=SPANS) as seen:
        ids = model.generate(
            **models.inputs(name), max_new_tokens=14, do_sample=False, disable_compile=True, **how
        )  # fmt: skip
    return ids, seen.compute()


def same(got, want):
    """Whether two results have the same tables and series."""
    assert got.tables.keys() == want.tables.keys()
    for name, table in want.tables.items():
        assert got.tables[name].values.shape == table.values.shape, name
        if not is_close(got.tables[name].values, table.values):
            return False
    pairs = [(a, b) for name in want.series for a, b in zip(got.series[name], want.series[name], strict=True)]
    return all(is_close(a, b) for a, b in pairs)


@pytest.mark.parametrize("lens", [*LENSES, "strategy_attention"])
@pytest.mark.parametrize("name", DECODERS)
def test_an_allocated_cache_gives_what_a_growing_one_gives(name, lens):
    """Left padding, prompts beyond the window, layers of both kinds."""
    plain, want = generated(name, lens)
    again, got = generated(name, lens, cache_implementation="static")
    assert torch.equal(plain, again) and same(got, want)
    assert all(np.isfinite(table.values).any() for table in want.tables.values())


@pytest.mark.parametrize("lens", LENSES)
def test_slots_are_not_tokens(lens, monkeypatch):
    """The control: positions that count what is allocated give other tables, or none."""
    _, want = generated("llama", lens)
    monkeypatch.setattr("manyheads.integrations.sites.seen_by", lambda cache, *_: cache.get_max_length())
    with suppress(RuntimeError, IndexError, ValueError):
        assert not same(generated("llama", lens, cache_implementation="static")[1], want)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_encoders_and_decoders(name):
    """Cross-attention goes on with its sequence as the decoder's own cache says, from one token on."""
    runs = [generated(name, "active_dormant", **how) for how in ({}, {"cache_implementation": "static"})]
    assert torch.equal(runs[0][0], runs[1][0]) and same(runs[1][1], runs[0][1])
    model = models.tiny(name)
    with manyheads.watch(model, "active_dormant") as seen:
        for seed in (0, 1):
            model.generate(**models.inputs(name, seed=seed), max_new_tokens=6, do_sample=False)
    table = seen.compute().tables["sink"]
    assert len(table.values) == 4  # two batches of two rows are four prompts at every site, cross-attention too
    assert is_far(table.values[:2], table.values[2:])


def static(name, size):
    return StaticCache(config=models.tiny(name).config, max_cache_len=size)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_a_prompt_in_pieces(name):
    """Pieces of any size into a cache with room, a window that fills in the middle, and the bits of the model."""
    model, ids = models.tiny(name), models.tokens(2, 26)
    results = []
    for cache, pieces in ((DynamicCache(config=model.config), [26]), (static(name, 40), [5, 6, 1, 9, 1, 4])):
        with manyheads.watch(model, *LENSES) as seen, torch.no_grad():
            for piece in ids.split(pieces, 1):
                model(piece, past_key_values=cache)
        results.append([seen.compute(i) for i in (0, 2)])
    assert all(same(got, want) for got, want in zip(*results, strict=True))
    with torch.no_grad():
        plain = model(ids, past_key_values=static(name, 40)).logits
        with manyheads.watch(model, *LENSES):
            assert torch.equal(model(ids, past_key_values=static(name, 40)).logits, plain)


def test_edits_see_the_same_keys_too():
    """Places of a bias are tokens, not slots: `columns` and `rows` mean the same under both caches."""
    model, ids = models.tiny("llama"), models.tokens(1, 12)
    for spec in ("logit_bias:columns=3-5,rows=8-20,amount=3", "massive_values:damage=top", "ablate:heads=0.1,by=bos"):
        with manyheads.use(model, spec):
            grown = model.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True,
                                   return_dict_in_generate=True)  # fmt: skip
            held = model.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True, disable_compile=True,
                                  return_dict_in_generate=True, cache_implementation="static")  # fmt: skip
        plain = model.generate(ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
        assert is_close(torch.stack(grown.logits), torch.stack(held.logits)), spec
        assert is_far(grown.logits[0], plain.logits[0]), spec


def test_prompts_that_share_a_beginning():
    """Copies of the cache of a prompt are new prompts; one that is cut back has been counted, and is refused."""
    model, ids = models.tiny("llama"), models.tokens(1, 12)
    begun = DynamicCache(config=model.config)
    with torch.no_grad(), manyheads.watch(model, *LENSES) as seen:
        model(ids[:, :8], past_key_values=begun)
        for _ in range(2):
            model(ids[:, 8:], past_key_values=copy.deepcopy(begun))
    sink, waad = seen.compute(0).tables["sink"].values, seen.compute(1).series["waad"]
    assert len(sink) == 3 and is_close(sink[1], sink[2]) and is_far(sink[0], sink[1])
    assert [len(row) for row in waad] == [8, 4, 4]
    cache = DynamicCache(config=model.config)
    cut_back = pytest.raises(UserError, match="cut back from 12 tokens to 9")
    with cut_back, torch.no_grad(), manyheads.watch(model, "active_dormant"):
        model(ids, past_key_values=cache)
        cache.crop(-3)
        model(ids[:, 9:], past_key_values=cache)


def test_sequences_by_turns_are_refused():
    model, ids = models.tiny("llama"), models.tokens(1, 12)
    first, second = (DynamicCache(config=model.config) for _ in range(2))
    with pytest.raises(UserError, match="by turns"), torch.no_grad(), manyheads.watch(model, "active_dormant"):
        for cache in (first, second):
            model(ids, past_key_values=cache)
        model(ids[:, :2], past_key_values=second)
        model(ids[:, :2], past_key_values=first)
