# SPDX-License-Identifier: Apache-2.0
"""Watermarks by cross-attention: layers against a forward written by hand, the reader, edits, and a tiny training."""

import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import manyheads
from manyheads import UserError, parse
from manyheads.decoding.xattn_watermark import EDITS, Embedder, Extractor, Substituted, XattnWatermark, edited
from manyheads.decoding.xattn_watermark.edits import origins, sentences
from manyheads.decoding.xattn_watermark.extractor import token_table
from manyheads.decoding.xattn_watermark.losses import distortion, drawn
from manyheads.integrations.transformers import find_sites, new_cache
from manyheads.recipes.xattn_watermark import new_watermark, train_watermark, written
from manyheads.writing import binomial_tail
from oracles import models
from tolerance import DRAWN, FORMULA, SAME, WRONG, assert_close, is_close, is_far, nearly, share_error

KINDS = {"between": XattnWatermark, "within": Substituted}


def opened(model, place="between", bits=3, **settings):
    """Layers with open gates in both blocks."""
    torch.manual_seed(1)
    sites = [site for site, _ in find_sites(model)]
    made = Embedder.of(
        model.config.hidden_size, sites, every=1, first=0, bits=bits, width=8, heads=2, place=place, **settings
    )
    for name, p in made.named_parameters():
        if name.endswith("gate"):
            torch.nn.init.constant_(p, 0.6)
    for layer in made.kv_heads:
        made.layer(layer).size.fill_(0.8)
    return made.requires_grad_(False).eval()


def marked(embedder, message="101", **more):
    return KINDS[embedder.config["place"]](live=embedder, message=message, **more)


@torch.no_grad()
def logits(model, ids, *strategies, **given):
    with manyheads.use(model, *strategies):
        return model(ids, **{"use_cache": False, **given}).logits


def by_hand(layer, memory, message, x, uniform=False):
    """What a layer adds, a token and a head at a time."""
    bits = torch.stack([memory[i, int(bit)] for i, bit in enumerate(message)])
    bits = (bits - bits.mean(1, keepdim=True)) / (bits.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    k, v, added = layer.k(bits), layer.v(bits), torch.zeros_like(x)
    for b in range(len(x)):
        for t in range(x.shape[1]):
            row = x[b, t]
            q, found = layer.q(row / (row.square().mean() + 1e-6).sqrt()), []
            for cut in (slice(0, 4), slice(4, 8)):
                weights = (k[:, cut] @ q[cut] / 2).softmax(0)
                weights = torch.full_like(weights, 1 / len(weights)) if uniform else weights
                found.append(weights @ v[:, cut])
            y = layer.size * math.tanh(layer.gate) * layer.out(torch.cat(found))
            normed = (row + y) / ((row + y).square().mean() + 1e-6).sqrt()
            h = layer.up(normed)
            h = h * 0.5 * (1 + torch.erf(h / 2**0.5))
            added[b, t] = y + layer.size * math.tanh(layer.feed_gate) * layer.down(h)
    return added


@pytest.fixture(scope="module")
def llama():
    return models.tiny("llama", torch.float64)


@torch.no_grad()
def test_a_layer_is_its_formula(llama):
    embedder = opened(llama).double()
    layer, x = embedder.layer(0), torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    message = torch.tensor([[1.0, 0.0, 1.0]])
    added = layer(x, *layer.memory(embedder.embedded(message, layer)))
    assert_close(added, by_hand(layer, embedder.memory, "101", x), 2 * FORMULA)
    for wrong in (by_hand(layer, embedder.memory, "100", x), by_hand(layer, embedder.memory, "101", x, uniform=True)):
        assert is_far(added, wrong, 1e-3)
    layer.uniform = True
    assert_close(
        layer(x, *layer.memory(embedder.embedded(message, layer))),
        by_hand(layer, embedder.memory, "101", x, uniform=True), 2 * FORMULA,
    )  # fmt: skip


@torch.no_grad()
def test_layers_stand_between_blocks_or_within_them(llama):
    ids, eager = models.tokens(2, 9), models.build("llama", attn="eager", dtype=torch.float64)
    length = ids.shape[1]
    future = torch.ones(length, length).triu(1).bool()
    mask = torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(future, torch.finfo(torch.float64).min)
    found = {}
    for place in KINDS:
        embedder = opened(llama, place)
        found[place] = logits(llama, ids, marked(embedder))
        exact, x = opened(llama, place).double(), eager.model.embed_tokens(ids)
        tables = eager.model.rotary_emb(x, torch.arange(length)[None])
        for i, block in enumerate(eager.model.layers):
            x = x + block.self_attn(block.input_layernorm(x), position_embeddings=tables, attention_mask=mask)[0]
            if place == "within":
                x = x + by_hand(exact.layer(i), exact.memory, "101", x)
            x = x + block.mlp(block.post_attention_layernorm(x))
            if place == "between":
                x = x + by_hand(exact.layer(i), exact.memory, "101", x)
        assert_close(found[place], eager.lm_head(eager.model.norm(x)), SAME)
    assert is_far(found["within"], found["between"], 1e-3)


@pytest.mark.parametrize("place", KINDS)
def test_closed_gates_or_no_strength_leave_every_bit(llama, place):
    ids, embedder = models.tokens(2, 9), opened(llama, place)
    plain = logits(llama, ids)
    assert torch.equal(logits(llama, ids, marked(embedder, strength=0)), plain)
    assert is_far(logits(llama, ids, marked(embedder)), plain, 1e-3)
    for name, p in embedder.named_parameters():
        if name.endswith("gate"):
            p.zero_()
    embedder._placed.clear()
    for message in ("000", "101"):
        assert torch.equal(logits(llama, ids, marked(embedder, message)), plain)


def test_rows_have_messages_of_their_own_and_a_cache_changes_nothing(llama):
    ids, embedder = models.tokens(2, 9), opened(llama)
    both = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    found = logits(llama, ids, marked(embedder, rows=both))
    for row, message in enumerate(("101", "001")):
        alone = logits(llama, ids[row : row + 1], marked(embedder, message))
        assert is_close(found[row : row + 1], alone, SAME)
        assert is_far(found[1 - row][None], logits(llama, ids[1 - row : 2 - row], marked(embedder, message)), 1e-3)
    strategy = marked(embedder)
    with manyheads.use(llama, strategy) as port, torch.no_grad():
        whole = llama(ids, use_cache=False).logits
        cache = new_cache(llama, parse("full"))
        first = llama(ids[:, :5], past_key_values=cache).logits
        kept = [state["memory"] for state in port.state(strategy).values()]
        later = llama(ids[:, 5:], past_key_values=cache).logits
        again = [state["memory"] for state in port.state(strategy).values()]
    assert_close(torch.cat([first, later], 1), whole, SAME)
    assert len(kept) == 2 and all(a is b for a, b in zip(kept, again, strict=True))  # the message is read once


def reader(bits=4, vocabulary=30, channels=6, seed=3):
    torch.manual_seed(seed)
    made = Extractor(vocabulary, channels, bits, dim=16, heads=2)
    made.table.copy_(torch.randn(vocabulary, channels))
    return made.double().eval().requires_grad_(False)


@torch.no_grad()
def test_the_reader_pools_what_queries_see_and_nothing_else():
    made, ids = reader(), torch.randint(0, 30, (2, 9), generator=torch.Generator().manual_seed(4))
    real = torch.arange(9) < torch.tensor([[9], [6]])
    found = made(made.embedded(ids), real)
    hidden = {}
    handle = made.layers[-1].register_forward_hook(lambda *given: hidden.update(x=given[2]))
    short = made(made.embedded(ids[1:, :6]), real[1:, :6])
    handle.remove()
    assert_close(found[1:], short, 4 * FORMULA)  # padding, whatever stands there, is not read
    assert is_far(made(made.embedded(ids[1:]), torch.ones(1, 9, dtype=torch.bool)), short, 1e-3)
    x = hidden["x"][0]
    by_formula = []
    for bit in range(4):
        weights = (made.keys(x) @ made.queries[bit]).softmax(0)
        by_formula.append(float(made.scale[bit] * weights @ (x @ made.answer[bit]) + made.bias[bit]))
    assert short[0].tolist() == nearly(by_formula, steps=200)  # of the largest: in a small one, larger terms cancel
    text = torch.nn.functional.one_hot(ids, 30).double()
    assert_close(made(made.embedded(text), real), found, 4 * FORMULA)


@torch.no_grad()
def test_queries_in_another_order_read_bits_in_that_order():
    made, ids = reader(), torch.randint(0, 30, (3, 9), generator=torch.Generator().manual_seed(4))
    real, order = torch.ones(3, 9, dtype=torch.bool), torch.tensor([2, 0, 3, 1])
    found = made(made.embedded(ids), real)
    for name in ("queries", "answer", "scale", "bias"):
        parameter = getattr(made, name)
        parameter.copy_(parameter[order].clone())
    assert_close(made(made.embedded(ids), real), found[:, order], FORMULA)
    assert is_far(found, found[:, order], 1e-3)


def test_the_table_is_whitened():
    torch.manual_seed(0)
    table = token_table(torch.randn(200, 8) @ torch.randn(8, 8), 5).double()
    assert table.shape == (200, 5)
    assert_close(table.mT @ table / 200, torch.eye(5), 1e-5)


def test_draws_have_the_probabilities_and_a_gradient():
    torch.manual_seed(5)
    scores = torch.randn(1, 1, 6, requires_grad=True)
    for temperature in (0.5, 2.0):  # smooths the gradient alone
        text = drawn(scores, temperature, times=20_000)
        assert share_error(text.detach().sum((0, 1)), scores.detach()[0, 0].softmax(0)) < DRAWN
    assert share_error(text.detach().sum((0, 1)), (scores.detach()[0, 0] / 2).softmax(0)) > WRONG
    assert bool(((text == 0) | (text > 0.999)).all()) and text.shape == (20_000, 1, 6)
    (text * torch.arange(6)).sum().backward()
    assert float(scores.grad.abs().sum()) > 0


def test_divergence_is_the_formula():
    torch.manual_seed(6)
    q, p = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    want = (q.double().softmax(-1) * (q.double().softmax(-1) / p.double().softmax(-1)).log()).sum(-1)
    assert_close(distortion(q, p), want) and is_far(distortion(p, q), want, 1e-2)
    assert torch.equal(distortion(q, q), torch.zeros(2, 3))


def test_edits_do_what_they_say():
    text, rng = list(range(100, 140)), np.random.default_rng(0)
    cut = edited(text, "deletion", 0.25, rng, [7])
    assert len(cut) == 30 and cut == sorted(cut) and set(cut) <= set(text)
    put = edited(text, "insertion", 0.25, rng, [7])
    assert len(put) == 50 and [x for x in put if x != 7] == text
    new = edited(text, "substitution", 0.25, rng, [7])
    assert [a == b for a, b in zip(new, text, strict=True)].count(False) == 10 == new.count(7)
    moved = edited(text, "swap", 0.25, rng, [7])
    assert sorted(moved) == text and sum(a != b for a, b in zip(moved, text, strict=True)) == 10
    other = edited(text, "reorder", 0.25, rng, [7], ends={109, 125})
    assert Counter(other) == Counter(text) and other != text
    assert sentences(text, {109, 125}) == [(0, 10), (10, 26), (26, 40)]
    pairs = {(a, b) for a, b in pairwise(text)} - set(pairwise(other))
    assert pairs <= {(109, 110), (125, 126)}  # sentences stay whole
    assert edited(text, "none", 0.25, rng, [7]) == text and len(EDITS) == 6
    with pytest.raises(UserError, match="deletion"):
        origins(9, "translation", 0.1, rng)


def test_p_values_are_exact_and_hold_for_drawn_messages():
    assert binomial_tail(0, 8) == 1 and binomial_tail(8, 8) == 2**-8 and binomial_tail(9, 8) == 0
    assert binomial_tail(7, 8) == nearly(9 / 256)
    every = [[*map(int, f"{n:06b}")] for n in range(64)]
    read = [1, 0, 0, 1, 1, 1]  # whatever a text without a message reads as
    found = [binomial_tail(sum(a == b for a, b in zip(read, m, strict=True)), 6) for m in every]
    loose = [binomial_tail(1 + sum(a == b for a, b in zip(read, m, strict=True)), 6) for m in every]
    for level in (0.02, 0.11, 0.35, 0.66):
        assert sum(p <= level for p in found) / 64 <= level
    assert any(sum(p <= level for p in loose) / 64 > level for level in (0.02, 0.11, 0.35))


@pytest.fixture(scope="module")
def trained():
    """Two bits, trained on a tiny model for a second or two, and texts that carry them."""
    model = models.tiny("llama", torch.float32)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    prompts = models.tokens(96, 4)
    pool = torch.cat([prompts, written(model, None, prompts, 21, seed=1)], 1)
    made = train_watermark(
        model, lambda i: pool[torch.randint(96, (16,), generator=torch.Generator().manual_seed(i % 2**31))], bits=2,
        budget=60, width=16, every=1, channels=32, dim=32, draws=2, allowed=0.5, texts=64, lr=1e-2,
    )  # fmt: skip
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    messages = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).repeat(16, 1)
    texts = written(model, made.strategy(rows=messages), prompts[:64], 24, seed=9).tolist()
    return model, made, [f"{int(a)}{int(b)}" for a, b in messages.tolist()], texts


def test_what_was_trained_reads_its_message_and_no_other(trained):
    model, made, said, texts = trained
    found = made.strategy().read(texts, said)
    right = np.mean([each.right(m) for each, m in zip(found, said, strict=True)])
    other = np.mean([each.right(m) for each, m in zip(found, said[2:] + said[:2], strict=True)])
    assert right > 0.75 and abs(other - 0.5) < 0.15
    assert {each.p_value for each in found} <= {0.25, 0.75, 1.0}
    plain = written(model, made.strategy(strength=0.0, message="00"), models.tokens(64, 4), 24, seed=9).tolist()
    assert np.mean([x.right(m) for x, m in zip(made.strategy().read(plain, said), said, strict=True)]) < right - 0.1


def test_a_text_that_knows_no_message_reads_half_of_all_messages(trained):
    _, made, _, _ = trained
    forced = [7, 9] * 12  # nothing was left to choose
    every = ["00", "01", "10", "11"]
    assert np.mean([x.right(m) for x, m in zip(made.strategy().read([forced] * 4, every), every, strict=True)]) == 0.5


def test_writes_and_reads_in_a_line_each(trained, tmp_path):
    model, made, _, _ = trained
    made.save(tmp_path)

    class Numbers:
        """Tokens are written as numbers."""

        chat_template = eos_token_id = None

        def encode(self, text, **_):
            return [int(word) for word in text.split()]

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    found = {}
    for message in ("00", "11"):
        mark = f"xattn_watermark:weights={tmp_path},message={message}"
        text = manyheads.reply(model, Numbers(), "5 9 23 4", f"{mark} + sampling", max_new_tokens=24, seed=3)
        found[message] = manyheads.detect(text, mark, Numbers())
        assert found[message].tokens == 24 and found[message].p_value in (0.25, 0.75, 1.0)
    assert sum(e > f for e, f in zip(found["11"].evidence, found["00"].evidence, strict=True)) == 2


def test_reads_from_a_folder_what_it_reads_live(trained, tmp_path):
    model, made, said, texts = trained
    made.save(tmp_path)
    loaded = parse(f"xattn_watermark:weights={tmp_path},message=10")
    assert loaded.read(texts[:3], said[:3]) == made.strategy().read(texts[:3], said[:3])
    ids = models.tokens(2, 9)
    assert torch.equal(logits(model, ids, loaded), logits(model, ids, made.strategy(message="10")))
    assert not torch.equal(logits(model, ids, loaded), logits(model, ids, replace(loaded, message="11")))
    with pytest.raises(UserError, match="2 bits"):
        logits(model, ids, replace(loaded, message="101"))
    with pytest.raises(UserError, match="use that"):
        logits(model, ids, parse(f"xattn_watermark.substituted:weights={tmp_path},message=10"))


@pytest.mark.parametrize(
    ("spec", "says"),
    [("", "weights="), ("weights=no", "message"), ("weights=no,message=12", "zeros and ones"),
     ("weights=no,message=1,strength=-1", "negative")],
)  # fmt: skip
def test_refusals(spec, says):
    with pytest.raises(UserError, match=says):
        parse(f"xattn_watermark:{spec}")


def test_a_missing_folder_says_how_to_train(llama):
    with (
        pytest.raises(UserError, match=r"recipes\.xattn_watermark"),
        manyheads.use(llama, "xattn_watermark:weights=no,message=1"),
    ):
        pass
    with pytest.raises(UserError, match="heads divide"):
        new_watermark(llama, 0)
