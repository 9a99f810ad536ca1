# SPDX-License-Identifier: Apache-2.0
"""Blocks of masks filled surest first: a naive float64 decoder, thresholds, ends, and a cache of the prefix."""

import pytest
import torch

from manyheads import parse
from manyheads.integrations.masked_diffusion import TokenDenoiser
from tiny.denoisers import MASK, PROMPT, VOCAB, model, naive, tokens, written
from tolerance import assert_close, is_far


@pytest.mark.parametrize("name", ["llada", "dream"])
@pytest.mark.parametrize("spec", ["block_diffusion:block=6,steps=4", "block_diffusion:block=7"])
def test_a_naive_decoder_in_float64_writes_the_same_and_counts_the_same(name, spec, request):
    net, strategy = request.getfixturevalue(name), parse(spec)

    def kept(behind, number):
        return strategy.kept(behind, torch.Generator().manual_seed(4 * 1_000_003 + number)).tolist()

    want = naive(net, PROMPT, 24, strategy.block, strategy.steps, kept)
    (got,) = written(net, spec, seed=4)
    assert (got.tokens, got.forwards, got.notes["tokens_read"]) == want and MASK not in got.tokens
    assert naive(net, PROMPT, 24, strategy.block, 1, kept)[0] != got.tokens


def test_the_fullest_step_fills_the_surest_places_and_a_threshold_all_that_are_surer(llada):
    one = written(llada, "block_diffusion:block=8,threshold=1", most=16)[0]
    assert one.tokens == tokens(llada, "block_diffusion:block=8", most=16)[0] and one.forwards == 16
    quick = written(llada, "block_diffusion:block=8,threshold=0.000001", most=16)[0]
    assert quick.forwards == 2 and quick.tokens == tokens(llada, "block_diffusion:block=8,steps=1", most=16)[0]
    between = written(llada, "block_diffusion:block=8,threshold=0.3", most=16)[0]
    assert 2 < between.forwards < 16 and between.tokens != one.tokens


def test_it_stops_behind_the_block_with_an_end_and_says_the_same_as_if_it_went_on(llada):
    said = tokens(llada, "block_diffusion:block=6")[0]
    end = said[8]
    cut = said.index(end)
    short, whole = (written(llada, f"block_diffusion:block=6,stop={s}", ends={end})[0] for s in ("true", "false"))
    assert short.tokens == whole.tokens == said[:cut]
    blocks = cut // 6 + 1
    assert (short.forwards, short.notes["blocks"], whole.forwards, whole.notes["blocks"]) == (6 * blocks, blocks, 24, 4)
    assert blocks < 4
    # The end of a prompt ends nothing.
    asked = torch.cat([PROMPT, torch.tensor([[end]])], 1)
    assert written(llada, "block_diffusion:block=6", most=6, prompt=asked, ends={end})[0].notes["blocks"] == 1


def test_a_cache_of_the_prefix_is_exact_where_the_prefix_sees_nothing_of_the_block():
    """A causal model's keys do not change with what follows; a bidirectional one's do, so that it approximates."""

    def logits(net, cached):
        denoiser, places = TokenDenoiser(net, MASK), torch.arange(12)
        ids = torch.cat([PROMPT, torch.full((1, 7), MASK)], 1)
        later = ids.clone()
        later[0, 5:7] = torch.tensor([17, 19])
        if not cached:
            return denoiser(later, places, 5, 9)
        _, past = denoiser.begin(ids, places, 5, 9)
        first = denoiser(later, places, 5, 9, past)
        assert past.get_seq_length() == 5 - denoiser.shifted
        again = denoiser(later, places, 5, 9, past)
        assert torch.equal(first, again)
        return again

    seen = [i for i in range(VOCAB) if i != MASK]
    for more in ({}, {"predicts_next": True}):
        causal, both = model(is_causal=True, **more), model(**more)
        assert_close(logits(causal, True)[..., seen], logits(causal, False)[..., seen])
        assert is_far(logits(both, True)[..., seen], logits(both, False)[..., seen])
        # One step a block: what is cached is not used again.
        one = "block_diffusion:block=6,steps=1"
        assert tokens(both, one) == tokens(both, f"{one},prefix_cache=true")
        made = written(both, "block_diffusion:block=6,steps=3,prefix_cache=true", most=12)[0]
        extra = bool(more)
        assert made.notes["tokens_read"] == 17 + 2 * (12 + extra) + 17 + 2 * (6 + extra)
