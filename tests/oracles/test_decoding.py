# SPDX-License-Identifier: Apache-2.0
"""However a sequence is cut into forwards, the cache answers as the definition says; gradients flow through it."""

import copy

import pytest
import torch

import manyheads
from manyheads.integrations.transformers import new_cache
from oracles import models
from oracles.caches import greedy, prefilled, step, stores
from oracles.strategies import Attend, CopyEdit, Mute, Sharpen, Watch
from tolerance import SAME, assert_close, error

LENGTH = 21
CUTS = {
    "token by token": [1] * LENGTH,
    "prompt and tokens": [12] + [1] * 9,
    "chunks": [8, 8, 5],
    "prompt and question": [14, 7],
}
HASH = "hashevict:budget=8,num_global=2,num_recent=3"


def cut(model, strategy, sizes, ids=None):
    """Logits of all positions, fed in pieces of the given sizes."""
    ids = models.tokens(2, LENGTH) if ids is None else ids
    with manyheads.use(model):
        cache = new_cache(model, manyheads.parse(strategy))
        return torch.cat([step(model, piece, cache) for piece in ids.split(sizes, 1)], 1), cache


@pytest.mark.parametrize("sizes", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("name", models.DECODERS)
def test_full_in_pieces_is_one_forward(name, sizes):
    model = models.tiny(name)
    with torch.no_grad():
        whole = model(models.tokens(2, LENGTH)).logits
    pieces, _ = cut(model, "full", sizes)
    assert_close(pieces, whole, 5 * SAME)


def test_control_of_pieces():
    model = models.tiny("llama")
    pieces, _ = cut(model, "random:budget=6,schedule=step", CUTS["token by token"])
    with torch.no_grad():
        assert error(pieces, model(models.tokens(2, LENGTH)).logits) > 1e-2


@pytest.mark.parametrize("probe", ["query", "key"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "deepseek_v3"])
def test_hashevict_many_tokens_at_once_is_token_by_token(name, probe):
    """A forward of many tokens replaces slots one after the other; each query sees what it would have seen alone."""
    model, strategy = models.tiny(name), f"{HASH},probe={probe}"
    want, one = cut(model, strategy, [12] + [1] * 9)
    for sizes in ([12, 9], [12, 2, 1, 4, 1, 1], [12, 1, 1, 1, 6]):
        got, many = cut(model, strategy, sizes)
        assert_close(got, want, 5 * SAME)
        for x, y in zip(stores(many), stores(one), strict=True):
            assert torch.equal(
                x.padded.positions().sort(-1).values[..., -8:], y.padded.positions().sort(-1).values[..., -8:]
            )


@pytest.mark.parametrize(
    "strategy", ["random:budget=7,schedule=chunk", "streaming_llm:budget=7,schedule=chunk,sinks=2"]
)
def test_scores_that_do_not_change_keep_the_same_tokens_in_chunks(strategy):
    """Best of the best: with scores that depend on the position alone, chunked prefill keeps what one shot keeps.

    Later layers compute other keys, because later chunks saw less: positions are equal there, values are not.
    """
    model = models.tiny("llama")
    _, whole = cut(model, strategy, [LENGTH])
    _, chunks = cut(model, strategy, [8, 8, 5])
    for x, y in zip(stores(chunks), stores(whole), strict=True):
        assert torch.equal(x.padded.positions(), y.padded.positions())
    assert_close(stores(chunks)[0].keys, stores(whole)[0].keys)
    assert error(stores(chunks)[1].keys, stores(whole)[1].keys) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_chunked_prefill_of_generate(name):
    """``prefill_chunk_size``: the logits of one shot for full, padded batch too."""
    model, given = models.tiny(name), models.inputs(name)
    made, want = greedy(model, given["input_ids"], given["attention_mask"])
    with manyheads.use(model, "full"):
        _, got = greedy(model, given["input_ids"], given["attention_mask"], forced=made, prefill_chunk_size=6)
    assert_close(got, want, 10 * SAME)


@pytest.mark.parametrize(
    "spec", ["keydiff:budget=8,schedule=chunk", "snapkv:budget=8,window_size=4,schedule=chunk", HASH]
)
def test_chunked_prefill_evicts_per_chunk(spec):
    """``generate`` in chunks is the loop over chunks by hand."""
    model, ids = models.tiny("llama", torch.float64), models.tokens(2, LENGTH)
    logits, _ = cut(model, spec, [6, 6, 6, 3])
    with manyheads.use(model, spec):
        _, scores = greedy(model, ids, count=2, prefill_chunk_size=6)
    assert_close(scores[:, 0], logits[:, -1])


ONE_SLOT = (
    "random:budget=1", "keydiff:budget=1,schedule=step", "snapkv:budget=1,window_size=1",
    "hashevict:budget=1,num_global=0,num_recent=0", "streaming_llm:budget=1,sinks=0",
)  # fmt: skip
LITTLE = (
    "full", "random:budget=0.5", "keydiff:budget=3,schedule=step", "snapkv:budget=0.9,window_size=1",
    "streaming_llm:budget=2,sinks=1", "hashevict:budget=3,num_global=1,num_recent=1",
)  # fmt: skip


@pytest.mark.parametrize("spec", ONE_SLOT)
def test_one_slot(spec):
    model = models.tiny("llama")
    with manyheads.use(model, spec):
        made, logits = greedy(model, models.tokens(2, 9))
    assert bool(logits.isfinite().all()) and made.shape == (2, 8)
    _, cache = cut(model, spec, [9, 1, 1], models.tokens(2, 11))
    for store in stores(cache):
        limit = 1 if "schedule" in spec or "hash" in spec or "stream" in spec else 3
        assert bool(((store.padded.positions() >= 0).sum(-1) == limit).all())


@pytest.mark.parametrize("spec", LITTLE)
def test_a_prompt_of_one_token(spec):
    model = models.tiny("llama")
    with manyheads.use(model, spec):
        _, logits = greedy(model, models.tokens(1, 1), count=6)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("spec", ["full", "keydiff:budget=0.5", "snapkv:budget=6,window_size=2", HASH])
def test_a_row_of_padding_alone_harms_no_other(spec):
    """A row that is all padding gives finite numbers, and its neighbours what they give without it."""
    model, ids, mask = models.tiny("llama", torch.float64), models.tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[1] = 0
    with manyheads.use(model, spec):
        both, logits = greedy(model, ids, mask)
        _, alone = greedy(model, ids[:1], forced=both[:1])
    assert_close(logits[:1], alone, 10 * SAME)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("spec", ["full", "random:budget=0.5,layers=1", "keydiff:budget=6,layers=0"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_some_layers_only(name, spec):
    """The mask is made for the layer that transformers looks at first; the other layers must still fit."""
    model, given = models.tiny(name), models.inputs(name)
    with manyheads.use(model, spec):
        made, logits = greedy(model, given["input_ids"], given["attention_mask"])
        _, alone = greedy(model, given["input_ids"][1:, 5:], forced=made[1:])
    assert_close(logits[1:], alone, 10 * SAME)
    assert bool(logits.isfinite().all())


def test_two_stores_on_different_layers():
    model, given = models.tiny("llama"), models.inputs("llama")
    results = []
    for specs in (
        ("keydiff:budget=6,layers=0", "random:budget=5,layers=1"),
        ("random:budget=5,layers=1", "keydiff:budget=6,layers=0"),
    ):
        with manyheads.use(model, *specs):
            results.append(greedy(model, given["input_ids"], given["attention_mask"])[1])
    assert torch.equal(*results)


@pytest.mark.parametrize("strategy", [Attend(), CopyEdit(), Watch()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("spec", ["keydiff:budget=7", "random:budget=0.5,schedule=2", HASH])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "deepseek_v3"])
def test_a_cache_and_another_strategy_hold_together(name, spec, strategy):
    """The call that a cache has masked says all there is to know: the reference attention answers it alike."""
    model, given = models.tiny(name), models.inputs(name)
    with manyheads.use(model, spec):
        made, logits = greedy(model, given["input_ids"], given["attention_mask"])
    with manyheads.use(model, spec, strategy):
        _, again = greedy(model, given["input_ids"], given["attention_mask"], forced=made)
    assert_close(again, logits, 5 * SAME)


def test_prompt_lookup():
    """Guessing ahead crops the cache: right while nothing was dropped, refused afterwards."""
    model, ids = models.build("llama", dtype=torch.float64), models.tokens(1, 7).repeat(1, 3)
    guess = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 12, "do_sample": False}
    want = model.generate(ids, max_new_tokens=12, do_sample=False)
    for spec in ("full", "keydiff:budget=60", "hashevict:budget=60"):
        with manyheads.use(model, spec):
            assert torch.equal(model.generate(ids, **guess), want), spec
    with manyheads.use(model, "keydiff:budget=6"), pytest.raises(manyheads.UserError, match="without an assistant"):
        model.generate(ids, **guess)


def gradients(model, ids, sizes, *strategies, spec="full"):
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    with manyheads.use(model, *strategies):
        cache = new_cache(model, manyheads.parse(spec)) if spec else None
        pieces = [model(inputs_embeds=x, past_key_values=cache).logits for x in embedded.split(sizes, 1)]
        loss = torch.cat(pieces, 1).log_softmax(-1)[..., 3].sum()
    (grad,) = torch.autograd.grad(loss, embedded)
    return grad


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "gpt_oss"])
def test_gradients_flow_through_the_cache(name):
    model, ids = models.tiny(name), models.tokens(2, LENGTH)
    want = gradients(model, ids, [LENGTH], spec=None)
    assert_close(gradients(model, ids, [12, 1, 8]), want, 1e-4)


@pytest.mark.parametrize("strategy", [Attend(), Sharpen(), Mute(), CopyEdit()], ids=lambda s: type(s).__name__)
def test_gradients_flow_through_strategies(strategy):
    """Against a difference quotient along a random direction."""
    model, ids = models.build("gpt2").double(), models.tokens(1, 12)
    base = model.get_input_embeddings()(ids).detach()
    direction = torch.randn_like(base)

    def loss(x):
        with manyheads.use(model, strategy), torch.no_grad():
            return model(inputs_embeds=x).logits.log_softmax(-1)[..., 3].sum()

    x = base.clone().requires_grad_(True)
    with manyheads.use(model, strategy):
        (grad,) = torch.autograd.grad(model(inputs_embeds=x).logits.log_softmax(-1)[..., 3].sum(), x)
    h = 1e-5
    quotient = (loss(base + h * direction) - loss(base - h * direction)) / (2 * h)
    assert abs(float((grad * direction).sum() - quotient)) <= 1e-6 * abs(float(quotient))


def test_hashevict_in_place_and_out_of_place_agree():
    """While decoding, the slot is overwritten in place; a cache under autograd must not be. Both give the same."""
    model, ids = models.build("llama", dtype=torch.float64), models.tokens(2, 24)
    model.model.layers[0].self_attn.k_proj.weight.requires_grad_(True)  # now keys require grad
    with manyheads.use(model):
        inside, outside = (new_cache(model, manyheads.parse(HASH)) for _ in range(2))
        for piece in ids.split([12] + [1] * 12, 1):
            with torch.no_grad():
                a = model(piece, past_key_values=inside).logits
            b = model(piece, past_key_values=outside).logits
            assert_close(b.detach(), a)
        b.sum().backward()
    assert float(model.model.layers[0].self_attn.k_proj.weight.grad.norm()) > 0
    for x, y in zip(stores(inside), stores(outside), strict=True):
        last = [s.padded.positions().sort(-1).values[..., -8:] for s in (x, y)]
        assert torch.equal(*last)


def test_hashevict_under_autograd_after_decoding_in_place():
    """A cache that was overwritten in place can go on under autograd: gradients are those of the out-of-place path."""
    model, ids, grads = models.build("llama", dtype=torch.float64), models.tokens(2, 20), []
    weight = model.model.layers[0].self_attn.k_proj.weight.requires_grad_(True)
    with manyheads.use(model):
        for pieces in ([12, 1, 1, 1, 1, 1, 1, 1, 1], [12, 1, 1, 1, 5]):  # the last five with gradients
            cache = new_cache(model, manyheads.parse(HASH))
            parts = list(ids.split(pieces, 1))
            for piece in parts[:4]:
                step(model, piece, cache)
            logits = [model(piece, past_key_values=cache).logits for piece in parts[4:]]
            grads.append(torch.autograd.grad(torch.cat(logits, 1).log_softmax(-1)[..., 3].sum(), weight)[0])
    assert_close(grads[0], grads[1], 1e-4)


def test_a_cache_can_be_deep_copied():
    """The prefix-sharing recipe of transformers' own documentation."""
    model = models.tiny("llama")
    with manyheads.use(model):
        for spec in ("full", "snapkv:budget=8,window_size=4,schedule=step", HASH):
            cache = prefilled(model, spec, models.tokens(1, 18))
            twin = copy.deepcopy(cache)
            want = [step(model, models.tokens(1, 1, seed=t), twin) for t in range(3)]
            twice = [step(model, models.tokens(1, 1, seed=t), cache) for t in range(3)]
            assert all(torch.equal(x, y) for x, y in zip(want, twice, strict=True))


@pytest.mark.parametrize("spec", ["full", "keydiff:budget=6", HASH])
def test_reset_makes_a_cache_new(spec):
    model = models.tiny("llama")
    with manyheads.use(model):
        cache = prefilled(model, spec, models.tokens(2, 18))
        step(model, models.tokens(2, 1), cache)
        cache.reset()
        assert cache.get_seq_length() == 0 and cache.bytes() == 0
        for seed in range(3):
            ids = models.tokens(1, 15 if seed == 0 else 1, seed=seed)
            if seed == 0:
                fresh = new_cache(model, manyheads.parse(spec))
            assert torch.equal(step(model, ids, cache), step(model, ids, fresh))
