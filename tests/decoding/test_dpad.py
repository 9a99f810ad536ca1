# SPDX-License-Identifier: Apache-2.0
"""Blocks of masks and dropped suffixes: a naive float64 decoder, masked full forwards, counts, and edges."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import manyheads
from manyheads import UserError, parse
from manyheads.decoding._blocks import shares
from manyheads.decoding.dpad import keep_probability
from manyheads.integrations.decoding import write
from manyheads.integrations.masked_diffusion import TokenDenoiser, mask_token, predicts_next
from manyheads.writing import Request
from tiny import chat
from tiny.compare import make_tokenizer, tiny
from tiny.denoisers import MASK, PROMPT, SIZES, VOCAB, model, naive, tokens, written
from tolerance import assert_close, is_far


def test_probabilities_are_those_of_the_formula_and_fall():
    p = keep_probability(256)
    want = [min(1.0, 2 * math.exp(-((4 * j / 255) ** 2) / 2) / math.sqrt(2 * math.pi)) for j in range(256)]
    assert_close(p, torch.tensor(want, dtype=torch.float64))
    assert (p.diff() <= 0).all() and round(float(p.sum()), 1) == 64.1 and round(float(p[64]), 2) == 0.48
    assert round(float(keep_probability(256, 3.0, 1.6).sum()), 1) == 68.1
    assert is_far(keep_probability(255), want[:255])
    assert (keep_probability(8, scale=1e9)[:4] == 1).all()


def test_a_block_draws_once_by_its_seed_and_as_many_as_the_formula_says():
    dpad, uniform = parse("dpad:window=64"), parse("dpad:window=64,decay=uniform")

    def drawn(strategy, seed, behind=100):
        return strategy.kept(behind, torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(dpad, 3), drawn(dpad, 3)) and not torch.equal(drawn(dpad, 3), drawn(dpad, 4))
    p = keep_probability(64)
    for behind in (100, 20):
        mean = float(p[:behind].sum())
        deviation = float((p * (1 - p))[:behind].sum().sqrt()) + 1.0  # a uniform one's is larger by less than that
        for strategy in (dpad, uniform):
            counts = torch.tensor([len(drawn(strategy, s, behind)) for s in range(400)], dtype=torch.float64)
            assert abs(float(counts.mean()) - mean) < 4 * deviation / 20
    far = [torch.cat([drawn(s, seed) for seed in range(100)]).double().mean() for s in (dpad, uniform)]
    assert far[0] < 0.7 * far[1] < 0.7 * 64  # nearer on average; neither beyond the window
    assert drawn(parse("dpad:window=9,decay=none"), 0).tolist() == list(range(9))
    assert not len(drawn(parse("dpad:window=0"), 0))


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_dropping_is_hiding_from_all_in_every_layer_with_positions_kept(name, request):
    """Exact: what is dropped may neither be seen nor shift what is kept."""
    net = request.getfixturevalue(name)
    ids = torch.cat([PROMPT, torch.full((1, 20), MASK)], 1)
    kept = torch.tensor([*range(9), 10, 13, 14, 20, 24])
    seen = torch.zeros(25, dtype=torch.bool)
    seen[kept] = True
    hidden = net(ids, attention_mask=seen.expand(1, 1, 25, 25)).logits
    first = 5 - predicts_next(net.config)
    want = hidden[:, first : first + 4].index_fill(-1, torch.tensor([MASK]), -torch.inf).float()
    got = TokenDenoiser(net)(ids[:, kept], kept, 5, 9)
    finite = torch.isfinite(want)
    assert torch.equal(finite, torch.isfinite(got))
    assert_close(got[finite], want[finite])
    for wrong in (torch.arange(len(kept)), kept + (torch.arange(len(kept)) > 11)):  # closed up; one place off
        assert is_far(TokenDenoiser(net)(ids[:, kept], wrong, 5, 9)[finite], want[finite])
    assert is_far(net(ids).logits[:, first : first + 4].float()[finite], want[finite])


@pytest.mark.parametrize("name", ["llada", "dream"])
@pytest.mark.parametrize("spec", ["dpad:window=12,block=5,steps=2", "dpad:block=7"])
def test_a_naive_decoder_in_float64_writes_the_same_and_counts_the_same(name, spec, request):
    net, strategy = request.getfixturevalue(name), parse(spec)

    def kept(behind, number):
        return strategy.kept(behind, torch.Generator().manual_seed(4 * 1_000_003 + number)).tolist()

    want = naive(net, PROMPT, 24, strategy.block, strategy.steps, kept)
    (got,) = written(net, spec, seed=4)
    assert (got.tokens, got.forwards, got.notes["tokens_read"]) == want and MASK not in got.tokens
    assert naive(net, PROMPT, 24, strategy.block, 1, kept)[0] != got.tokens


def test_a_wide_window_without_decay_is_the_full_suffix_and_none_is_none(llada):
    full = written(llada, "block_diffusion:block=6")[0]
    for same in ("window=18,decay=none", "window=64,scale=1e9,k_sigma=1"):
        assert written(llada, f"dpad:block=6,{same}")[0] == full
    alone = written(llada, "dpad:block=6,window=0")[0]
    assert alone.tokens != full.tokens and alone.notes["suffix_read"] == 0
    # Behind the last block there is nothing to drop.
    assert tokens(llada, "dpad:block=24,window=0") == tokens(llada, "block_diffusion:block=24")
    assert alone.tokens[:6] == tokens(llada, "block_diffusion:block=6", most=6)[0]


def test_steps_forwards_tokens_and_flops_are_those_of_the_formula(llada):
    assert shares(8, 3) == [3, 3, 2] and shares(3, 8) == [1, 1, 1] and shares(4, 0) == [1] * 4
    (made,) = written(llada, "dpad:block=6,window=10,steps=4,decay=none")
    behind = [min(10, 24 - end) for end in (6, 12, 18, 24)]
    lengths = [5 + end + kept for end, kept in zip((6, 12, 18, 24), behind, strict=True)]
    assert made.forwards == 16 and made.notes == {
        "tokens_read": 4 * sum(lengths), "suffix_read": 4 * sum(behind), "blocks": 4
    }  # fmt: skip
    eager = model(attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        written(eager, "dpad:block=6,window=10,steps=4,decay=none")
    linear = sum(p.numel() for name, p in llada.named_parameters() if p.ndim == 2 and ".layers." in name)
    want = sum(4 * (2 * linear * n + 2 * (4 * 32 * n * n)) for n in lengths) + 2 * VOCAB * 32 * 16 * 6
    assert counter.get_total_flops() == want


def test_rows_are_what_they_are_alone(llada):
    rows = torch.cat([PROMPT, PROMPT + 13, PROMPT.flip(1)])
    alone = [tokens(llada, "block_diffusion:block=6", prompt=row[None])[0] for row in rows]
    end = alone[0][7]
    for spec in ("dpad:block=6,window=9", "dpad:block=6,threshold=0.3", "dpad:block=6,temperature=0.7,steps=3"):
        together = written(llada, spec, prompt=rows, seed=3, ends={end})
        for row, made in zip(rows, together, strict=True):
            assert made == written(llada, spec, prompt=row[None], seed=3, ends={end})[0]
    drawn = [tokens(llada, "dpad:block=6,temperature=0.7", seed=s)[0] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


class Mapping(nn.Module):
    """Nothing of transformers: logits from tokens and places."""

    def __init__(self, config):
        super().__init__()
        self.config, self.table, self.where = config, nn.Embedding(VOCAB, VOCAB), nn.Embedding(64, VOCAB)

    def forward(self, input_ids, position_ids):
        return self.table(input_ids).mean(1, keepdim=True) + self.where(position_ids)


def test_any_model_with_positions_and_a_mask_will_do():
    torch.manual_seed(2)
    net = Mapping(SimpleNamespace(model_type="llada", mask_token_id=MASK))
    made = write(parse("dpad:block=4"), Request(net, None, PROMPT, 10, seed=1))
    assert len(made.tokens) == 10 and made.forwards == 10 and MASK not in made.tokens
    net.where.weight.data[8, 21] = 99.0  # the place of the fourth token
    assert tokens(net, "dpad:block=4", most=10)[0][3] == 21
    assert mask_token(SimpleNamespace(model_type="llada")) == 126336
    assert mask_token(SimpleNamespace(model_type="Dream")) == 151666
    assert predicts_next(SimpleNamespace(model_type="Dream")) and not predicts_next(net.config)


def test_a_decoder_and_a_model_without_positions_are_refused():
    with pytest.raises(UserError, match="no masked diffusion language model"):
        written(tiny(), "dpad")
    with pytest.raises(UserError, match="position_ids"):
        TokenDenoiser(nn.Embedding(4, 4), 1)
    with pytest.raises(UserError, match="at least one token"):
        TokenDenoiser(model(predicts_next=True))(torch.full((1, 4), MASK), torch.arange(4), 0, 4)


@pytest.mark.parametrize("spec", ["dpad:block=0", "dpad:window=-1", "block_diffusion:threshold=2", "dpad:scale=-1"])
def test_wrong_settings_are_refused(spec):
    with pytest.raises(UserError, match=r"block is at least 1|not negative"):
        parse(spec)


def test_a_reply_is_one_line_and_caches_do_not_go_with_it():
    torch.manual_seed(3)
    reader = make_tokenizer(chat.PROSE)
    net = LlamaForCausalLM(
        LlamaConfig(**{**SIZES, "vocab_size": 1500, "is_causal": False, "mask_token_id": 1499})
    ).eval()  # fmt: skip
    plain = manyheads.reply(net, reader, "Who was seen", max_new_tokens=12)
    assert plain and plain == manyheads.reply(net, reader, "Who was seen", "block_diffusion", max_new_tokens=12)
    assert plain != manyheads.reply(net, reader, "Who was seen", "dpad:block=4,window=2", max_new_tokens=12)
    with pytest.raises(UserError, match="without a cache"):
        manyheads.reply(net, reader, "Who was seen", "dpad + keydiff:budget=0.5", max_new_tokens=4)
