# SPDX-License-Identifier: Apache-2.0
"""Gists: the mask by definition, segment by segment as in one pass, and what they become at the edges."""

import functools
import math
from dataclasses import dataclass, field

import pytest
import torch

import manyheads
from manyheads import UserError
from manyheads.caches.gist import Gist, Gists, Segments
from manyheads.caches.gist.one_pass import GistPass
from manyheads.integrations.transformers import load_cache, new_cache, save_cache
from manyheads.recipes.gist import new_gists
from manyheads.strategy import AttentionWatch
from oracles import models
from oracles.caches import step, stores
from tolerance import CLOSE, DEEP, assert_close, error, is_far

KINDS = [(granularity, positions) for granularity in ("fine", "coarse") for positions in ("compressed", "original")]
kinds = pytest.mark.parametrize(("granularity", "positions"), KINDS)


def segments(granularity="fine", positions="compressed", length=8, ratio=2):
    return Segments(length=length, ratio=ratio, granularity=granularity, positions=positions)


def drawn(model, geometry, seed=0):
    """Gists with weights that change everything."""
    gists = new_gists(model, geometry, lora=2)
    generator = torch.Generator().manual_seed(seed)
    for p in gists.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator)
    return gists.to(next(model.parameters()).dtype).requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Drawn(Gist):
    """``gist`` with gists at hand."""

    gists: str = "drawn"
    held: tuple[Gists, ...] = field(default=(), compare=False, repr=False)

    @functools.cached_property
    def trained(self):
        return self.held[0]


def loop(gists):
    return Drawn(held=(gists,))


@pytest.fixture(scope="module")
def llama():
    return models.tiny("llama", torch.float64)


def one_pass(model, gists, ids, kind=GistPass):
    with manyheads.use(model, kind(trained=gists)), torch.no_grad():
        return model(ids, use_cache=False).logits


def by_segment(model, gists, ids, sizes=None):
    """Logits, and the cache, of a text that comes in parts."""
    with manyheads.use(model, strategy := loop(gists)):
        cache = new_cache(model, strategy)
        return torch.cat([step(model, part, cache) for part in ids.split(sizes or ids.shape[1], 1)], 1), cache


def sequence(tokens, length, ratio, granularity):
    """The text as it is read: (segment, number within it, whether a gist)."""
    made = []
    for first in range(0, tokens, length):
        segment, whole = first // length, first + length <= tokens
        behind = []
        for number in range(min(length, tokens - first)):
            made.append((segment, number, False))
            if whole and (number + 1) % ratio == 0:
                gist = (segment, number // ratio, True)
                (made if granularity == "fine" else behind).append(gist)
        made += behind
    return made


@pytest.mark.parametrize("granularity", ["fine", "coarse"])
@pytest.mark.parametrize("tokens", [5, 8, 21, 24])
def test_mask_by_definition(granularity, tokens):
    """Who sees whom, from the order in which everything is read."""
    order = sequence(tokens, 8, 2, granularity)
    last, rows = (tokens - 1) // 8, sorted(order, key=lambda x: (x[2], x[0], x[1]))
    gists = [x for x in rows if x[2]]
    want = []
    for query in rows:
        at = order.index(query)
        own = [
            key[0] == query[0] and order.index(key) <= at and (not key[2] or query[2] or query[0] < last)
            for key in rows
        ]  # fmt: skip
        want.append(own + [key[0] < query[0] for key in gists])
    found = segments(granularity).mask(tokens)
    assert found.tolist() == want
    other = segments("coarse" if granularity == "fine" else "fine").mask(tokens)
    assert tokens <= 8 or not torch.equal(found, other)


@kinds
def test_segment_by_segment_as_in_one_pass(llama, granularity, positions):
    """The key property: with a cache in which only gists stay, what one forward under the explicit mask gives."""
    gists, ids = drawn(llama, segments(granularity, positions)), models.tokens(2, 29)
    want = one_pass(llama, gists, ids)
    got, _ = by_segment(llama, gists, ids)
    assert_close(got, want, DEEP)
    for other in KINDS:  # any other geometry is another model
        changed = new_gists(llama, segments(*other), lora=2).double()
        changed.load_state_dict(gists.state_dict() | {"embedding": changed.embedding}, strict=True)
        changed.embedding.data = gists.embedding.data[:1].expand_as(changed.embedding).clone()
        if other != (granularity, positions):
            assert is_far(one_pass(llama, changed.requires_grad_(False), ids), want, 100 * DEEP)

    class Unturned(GistPass):
        """Wrong: keys stay where they were in their own segment."""

        def edit(self, call):
            self.trained.now.piece.rotary = None
            return super().edit(call)

    assert positions == "original" or is_far(one_pass(llama, gists, ids, Unturned), want, 100 * DEEP)


@pytest.mark.parametrize("sizes", [(8, 21), (3, 5, 8, 13), (1,) * 29, (11, 1, 1, 9, 7)])
def test_in_parts_as_at_once(llama, sizes):
    """Coarse gists: a text may come in any parts. Fine ones: what is held has one form, and the last part sees that
    tokens read with nothing behind them see no gists of their own segment.
    """
    ids = models.tokens(2, 29)
    for granularity in ("coarse", "fine"):
        gists = drawn(llama, segments(granularity))
        (want, whole), (got, parts) = by_segment(llama, gists, ids), by_segment(llama, gists, ids, sizes)
        assert [s.keys.shape for s in stores(parts)] == [s.keys.shape for s in stores(whole)]
        if granularity == "coarse":
            assert_close(got, want, DEEP)
        else:
            assert is_far(got, want)
    alone, _ = by_segment(llama, gists, ids[:, :16], (16,))
    both, _ = by_segment(llama, gists, ids[:, :16], (8, 8))
    with_more, _ = by_segment(llama, gists, ids, (16, 13))
    assert_close(with_more[:, :16], alone, DEEP)
    assert is_far(both, alone)


def test_one_segment_is_the_model(llama):
    """Up to L tokens, untrained LoRA: to the bit what the model gives; a token more, and it is not."""
    gists = new_gists(llama, segments()).requires_grad_(False).double()
    for length in (5, 8, 9):
        ids = models.tokens(2, length)
        with torch.no_grad():
            want = llama(ids).logits
        got, cache = by_segment(llama, gists, ids)
        assert is_far(got, want) if length > 8 else error(got, want) <= DEEP
        assert stores(cache)[0].gists == length // 8 * 4


@pytest.mark.parametrize("length", [7, 8, 29, 32])
def test_what_is_held(llama, length):
    """floor(T / L) t gists and the tokens behind them: so many bytes, and no others are kept alive."""
    gists = drawn(llama, segments())
    _, cache = by_segment(llama, gists, models.tokens(2, length))
    slots = length // 8 * 4 + length % 8
    config = llama.config
    for store in stores(cache):
        assert store.seen == length and store.keys.shape[2] == slots
        assert store.keys.untyped_storage().nbytes() == 2 * config.num_key_value_heads * slots * config.head_dim * 8
    assert cache.bytes() == 2 * config.num_hidden_layers * store.keys.untyped_storage().nbytes()


class Forced(GistPass):
    """Gists whose keys and values are those of the tokens they stand for."""

    def edit(self, call):
        piece = self.trained.now.piece
        for x in (call.k, call.v):
            x[:, :, piece.given :] = x[:, :, : x.shape[2] - piece.given]
        return super().edit(call)


def test_gists_of_one_token_are_full_attention(llama):
    ids = models.tokens(2, 24)
    gists = new_gists(llama, segments("coarse", "original", ratio=1)).requires_grad_(False).double()
    with torch.no_grad():
        want = llama(ids).logits
    assert_close(one_pass(llama, gists, ids, Forced), want, DEEP)
    assert is_far(one_pass(llama, gists, ids), want)
    half = new_gists(llama, segments("coarse", "original", ratio=2)).requires_grad_(False).double()
    assert is_far(one_pass(llama, half, ids, GistPass), want)


class Detached(GistPass):
    """No gradient passes through the memory."""

    def edit(self, call):
        given = super().edit(call)
        size = call.k.shape[2]
        parts = ((x[:, :, :size], x[:, :, size:].detach()) for x in (given.k, given.v))
        k, v = (torch.cat(pair, 2) for pair in parts)
        return given.replace(k=k, v=v)


@pytest.mark.parametrize("granularity", ["fine", "coarse"])
def test_nothing_leaks_but_through_gists(llama, granularity):
    """What comes after a segment depends on its tokens through the keys and values of its gists alone."""
    gists, ids = drawn(llama, segments(granularity)), models.tokens(1, 20)
    found = {}
    for kind in (GistPass, Detached):
        x = llama.get_input_embeddings()(ids).detach().requires_grad_()
        with manyheads.use(llama, kind(trained=gists)):
            llama(inputs_embeds=x, use_cache=False).logits[:, 17].square().sum().backward()
        found[kind] = x.grad[0].norm(dim=-1)
    assert torch.equal(found[Detached][:16], torch.zeros(16, dtype=torch.float64))
    assert (found[Detached][16:18] > 0).all() and (found[GistPass][:16] > 0).all()
    assert torch.equal(found[GistPass][18:], torch.zeros(2, dtype=torch.float64))


class Look(AttentionWatch):
    def watch(self, call, out):
        call.state.update(call=call, out=out)


def test_attention_by_hand(llama):
    """The first layer in loops: keys of gists turned by the angle of their way into the memory, softmax over the mask.

    Channels i and i + d/2 turn by theta_i = base^(-2i/d) per position.
    """
    geometry, ids = segments(), models.tokens(1, 20)
    look, given = Look(), []

    class Before(GistPass):
        def edit(self, call):
            given.append(call)
            return super().edit(call)

    with manyheads.use(llama, look, Before(trained=drawn(llama, geometry))) as port, torch.no_grad():
        llama(ids, use_cache=False)
        out = next(iter(port.state(look).values()))["out"][0]
    q, k, v = (x[0] for x in (given[0].q, given[0].k, given[0].v))
    base, half = llama.config.rope_parameters["rope_theta"], k.shape[-1] // 2
    theta = base ** (-torch.arange(half, dtype=torch.float64) / half)
    memory = []
    for number in range(8):  # two whole segments of 4 gists; a gist at token 2j + 1 of its segment
        segment, j = divmod(number, 4)
        angle = ((segment * 4 + j) - (segment * 4 + 2 * j + 1)) * theta
        a, b = k[:, 20 + number].split(half, -1)
        memory.append(torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1))
    k, v = torch.cat([k, torch.stack(memory, 1)], 1), torch.cat([v, v[:, 20:]], 1)
    mask, groups = geometry.mask(20), q.shape[0] // k.shape[0]
    for head in range(q.shape[0]):
        logits = q[head] @ k[head // groups].T * given[0].scale
        want = logits.masked_fill(~mask, -math.inf).softmax(-1) @ v[head // groups]
        assert_close(out[:, head], want, CLOSE)  # the model's cosines are float32
        blind = logits.tril().masked_fill(torch.zeros_like(mask), 0).softmax(-1) @ v[head // groups]
        assert is_far(out[:, head], blind, CLOSE)


def test_generate_save_reorder_and_crop(llama, tmp_path):
    """Greedy tokens as one pass gives them, beams, a cache on disk, and how far back it can go."""
    gists, ids = drawn(llama, segments("coarse")), models.tokens(2, 19)
    strategy = loop(gists)
    with manyheads.use(llama, strategy):
        made = llama.generate(ids, max_new_tokens=9, do_sample=False, attention_mask=torch.ones_like(ids))
        beams = llama.generate(ids, max_new_tokens=3, num_beams=2, attention_mask=torch.ones_like(ids))
        assert beams.shape[1] == 22
        cache = new_cache(llama, strategy)
        step(llama, ids, cache)
        save_cache(cache, tmp_path / "cache")
        again = load_cache(tmp_path / "cache", llama, strategy)
        assert_close(step(llama, made[:, 19:24], again), step(llama, made[:, 19:24], cache), DEEP)
        with pytest.raises(UserError, match="cannot go back"):
            cache.crop(-1)
        step(llama, made[:, 24:26], cache)
        cache.crop(-1)
        assert stores(cache)[0].seen == 25
        with pytest.raises(UserError, match="rows of one length"):
            llama(ids, attention_mask=torch.tensor([[0] + [1] * 18, [1] * 19]))
    with manyheads.use(llama), pytest.raises(UserError, match=r"inside manyheads\.use"):
        step(llama, ids[:, :1], cache)
    want = one_pass(llama, gists, made[:, :-1])[:, 18:].argmax(-1)
    assert torch.equal(made[:, 19:], want)


def test_refusals(llama, tmp_path):
    with pytest.raises(UserError, match="needs gists=FOLDER"):
        manyheads.parse("gist")
    with pytest.raises(UserError, match="leave layers= away"):
        manyheads.parse("gist:gists=x,layers=0")
    with pytest.raises(UserError, match="holds no gists"):
        _ = manyheads.parse(f"gist:gists={tmp_path}").trained
    with pytest.raises(UserError, match="whole number of gists"):
        segments(length=8, ratio=3)
    gemma = models.tiny("gemma2")
    with pytest.raises(UserError, match="has a window"), manyheads.use(gemma, loop(drawn(gemma, segments()))):
        gemma(models.tokens(1, 4))
    wide = models.build("llama", dtype=torch.float64, hidden_size=64)
    with pytest.raises(UserError, match="another shape"):
        manyheads.use(wide, loop(drawn(llama, segments()))).__enter__()
    with pytest.raises(UserError, match="use_cache=True"), manyheads.use(llama, loop(drawn(llama, segments()))):
        llama(models.tokens(1, 4), use_cache=False)
