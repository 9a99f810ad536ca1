# SPDX-License-Identifier: Apache-2.0
"""Plain sampling beside transformers' own warpers, and the loop that all choosers of tokens share."""

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import manyheads
from manyheads import UserError, parse
from manyheads.decoding.sampling import kept
from manyheads.integrations.decoding import processor, write
from manyheads.integrations.transformers import new_cache, prefill
from manyheads.writing import Request
from tiny import chat
from tiny.compare import tiny

CUTS = [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}, {"top_k": 9, "top_p": 0.6, "min_p": 0.1}]


def warped(logits, top_k=0, top_p=1.0, min_p=0.0):
    for on, warper in ((top_k, TopKLogitsWarper), (top_p < 1 and top_p, TopPLogitsWarper), (min_p, MinPLogitsWarper)):
        logits = warper(on)(None, logits) if on else logits
    return logits > -torch.inf


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_what_may_be_drawn_is_what_transformers_leaves(cut):
    logits = torch.randn(40, 30, generator=torch.Generator().manual_seed(1)) * 2
    found = kept(logits, **cut)
    assert torch.equal(found, warped(logits, **cut)) and found.any(-1).all()
    if cut:
        assert not found.all() and not torch.equal(found, warped(logits.roll(1, -1), **cut))


def draws(spec, logits, count=20_000):
    generator = torch.Generator().manual_seed(2)
    chosen = parse(spec).choose(logits.expand(count, -1), torch.zeros(count, 1, dtype=torch.long), generator)
    return torch.bincount(chosen, minlength=logits.shape[-1]).double() / count


def test_draws_have_the_probabilities_of_the_formula():
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    sharp = logits.double()[0] / 0.5
    expected = sharp.masked_fill(~warped(sharp[None].float(), top_p=0.9)[0], -torch.inf).softmax(-1)
    found = draws("sampling:temperature=0.5,top_p=0.9", logits)
    error = (found - expected).abs().max()
    assert error < 4 * (0.25 / 20_000) ** 0.5
    assert (draws("sampling", logits) - expected).abs().max() > 10 * error


def written(model, ids, spec, seed=0, most=12):
    with manyheads.use(model):
        cache = new_cache(model, parse("full"))
        prefill(model, ids, cache)
        return write(parse(spec), Request(model, None, ids, most, seed=seed, cache=cache))


def test_one_loop_writes_what_generate_of_transformers_does_with_the_same_chooser():
    model, ids = tiny(), torch.tensor([[5, 7, 9, 11, 3]])
    strategy = parse("sampling:temperature=0.8,top_k=20")
    made = written(model, ids, strategy.spec, seed=4)
    given = LogitsProcessorList([processor(strategy, seed=4)])
    theirs = model.generate(
        ids, logits_processor=given, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0
    )
    assert made.tokens == theirs[0, 5:].tolist() and made.forwards == 12
    assert written(model, ids, strategy.spec, seed=4).tokens == made.tokens
    assert written(model, ids, strategy.spec, seed=5).tokens != made.tokens


def test_in_one_line_beside_a_cache_and_not_beside_another():
    model, reader = tiny(), chat.tokenizer()
    how = {"max_new_tokens": 8, "seed": 1}
    plain = manyheads.reply(model, reader, "Who was seen near the river", **how)
    drawn = manyheads.reply(model, reader, "Who was seen near the river", "sampling:temperature=3", **how)
    assert plain and drawn and plain != drawn
    assert manyheads.reply(model, reader, "Who was seen near the river", "sampling + keydiff:budget=0.5", **how)
    with pytest.raises(UserError, match="cannot hold together"):
        manyheads.reply(model, reader, "Who was it", "sampling + sampling:top_k=3", **how)
    with pytest.raises(UserError, match="manyheads generate"), manyheads.use(model, "sampling"):
        pass


@pytest.mark.parametrize("spec", ["temperature=0", "top_k=-1", "top_p=0", "min_p=1.5"])
def test_wrong_settings_are_refused(spec):
    with pytest.raises(UserError, match=r"temperature|top_k"):
        parse(f"sampling:{spec}")
