# SPDX-License-Identifier: Apache-2.0
"""Skim-Attention against its formula, what follows from layout alone, and its mask in an encoder as it is."""

import math

import pytest
import torch
from transformers import BertConfig, BertModel

from manyheads import UserError, parse, use
from manyheads.call import MixerConfig
from manyheads.mixers import skim_attention as skim
from manyheads.mixers.skim_attention import skim_attention as module
from manyheads.mixers.skim_attention.skim_attention import _read
from manyheads.models.decoder import Decoder, DecoderConfig
from manyheads.models.page import PageConfig, PageEncoder
from oracles.mixers import scattered
from tolerance import DEEP, PROJECTED, SAME, assert_close, error, is_far

CONFIG = PageConfig(19, dim=24, layers=3, heads=4, hidden=24, length=20, labels=5)
OWN = "skim_attention:resolution=50"


def pages(count=2, words=13, seed=0):
    """Words and boxes ``[count, words, 5]``."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 800, (count, words, 2), generator=generator)
    size = torch.randint(5, 200, (count, words, 2), generator=generator)
    ids = torch.randint(CONFIG.vocab, (count, words, 1), generator=generator)
    return torch.cat([ids, corner, corner + size], 2)


def encoder(spec=OWN):
    torch.manual_seed(0)
    return scattered(PageEncoder(spec, CONFIG))


def literal(mixer, boxes, resolution=50, term="xyxyhw", norm=True):
    """Weights ``[heads, T, T]`` of one page, every pair of words by itself."""
    tables = {name: table.weight for name, table in mixer.layout.tables.items()}
    rows = []
    for x0, y0, x1, y1 in boxes.tolist():
        values = dict(enumerate((x0, y0, x1, y1, y1 - y0, x1 - x0)))
        total = sum(tables[name][value * resolution // 1001] for name, value in zip(term, values.values(), strict=True))
        if norm:
            total = (total - total.mean()) / (total.var(unbiased=False) + 1e-5).sqrt()
            total = total * mixer.layout_norm.weight + mixer.layout_norm.bias
        rows.append(total)
    q, k = ([p.weight @ row for row in rows] for p in (mixer.q_proj, mixer.k_proj))
    out = torch.zeros(4, len(rows), len(rows), dtype=torch.float64)
    for h in range(4):
        part = slice(6 * h, 6 * h + 6)
        for t, query in enumerate(q):
            scores = [math.exp(float(query[part] @ key[part]) / math.sqrt(6)) for key in k]
            out[h, t] = torch.tensor(scores, dtype=torch.float64) / sum(scores)
    return out


def weights_of(model, ids):
    first = model.blocks[0].mixer
    return first.prepare(model.embed(ids[..., 0]), layout=ids[..., 1:])[1]["page"].weights


def test_weights_are_the_formula():
    model, ids = encoder(), pages()
    first = model.blocks[0].mixer
    for page, got in zip(ids, weights_of(model, ids), strict=True):
        assert_close(got, literal(first, page[:, 1:]), PROJECTED)
    page, got = ids[0, :, 1:], weights_of(model, ids)[0]
    wrong = [literal(first, page, term="yxxyhw"), literal(first, page, term="xyxywh"), literal(first, page, norm=False),
             literal(first, page, resolution=48)]  # fmt: skip
    assert all(is_far(got, other, PROJECTED) for other in wrong)


def test_every_layer_reads_its_values_by_those_weights():
    model, ids = encoder(), pages(1)
    weights = literal(model.blocks[0].mixer, ids[0, :, 1:])
    x = model.embed(ids[0, :, 0])
    for block in model.blocks:
        v = block.mixer_norm(x) @ block.mixer.v_proj.weight.T
        mixed = torch.cat([weights[h] @ v[:, 6 * h : 6 * h + 6] for h in range(4)], 1)
        x = x + mixed @ block.mixer.out_proj.weight.T
        x = x + block.ffn(block.ffn_norm(x))
    want = model.head(model.norm(x))
    assert_close(model(ids)[0][0], want, DEEP)
    assert is_far(encoder(f"{OWN},shared=false")(ids)[0][0], want, DEEP)


def test_a_full_table_knows_every_step_and_a_smaller_one_rounds():
    exact, coarse = skim.LayoutEmbedding(8), skim.LayoutEmbedding(8, resolution=10)
    a, b = torch.tensor([[[110, 0, 210, 9]]]), torch.tensor([[[111, 0, 211, 9]]])
    at = torch.zeros(1, 1, dtype=torch.long)
    assert not torch.equal(exact(a, at), exact(b, at)) and torch.equal(coarse(a, at), coarse(b, at))
    assert_close(exact(a, at)[0, 0], sum(exact.tables[n].weight[i] for n, i in zip("xyxyhw", (110, 0, 210, 9, 9, 100),
                 strict=True)))  # fmt: skip
    edge = torch.tensor([[[1000, 1000, 1000, 1000]]])
    assert coarse(edge, at).isfinite().all() and exact(edge, at).isfinite().all()


@pytest.mark.parametrize("spec", [OWN, f"{OWN},context=1", f"{OWN},shared=false"])
def test_what_is_looked_at_does_not_know_the_words(spec):
    model, ids = encoder(spec), pages()
    other = ids.clone()
    other[..., 0] = (other[..., 0] + 5) % CONFIG.vocab
    first = model.blocks[0].mixer
    maps = [
        first.weights(first.prepare(model.embed(x[..., 0]), layout=x[..., 1:])[1]["page"]) for x in (ids, other)
    ]  # fmt: skip
    assert torch.equal(*maps) and error(model(ids)[0], model(other)[0]) > 1e-3
    moved = ids.clone()
    moved[..., 1:] = (moved[..., 1:] + 37).clamp(max=1000)  # control
    assert not torch.equal(
        maps[0], first.weights(first.prepare(model.embed(ids[..., 0]), layout=moved[..., 1:])[1]["page"])
    )


@pytest.mark.parametrize(("spec", "times"), [(OWN, 1), (f"{OWN},shared=false", 3)])
def test_one_softmax_serves_all_layers(monkeypatch, spec, times):
    calls, inner = [], module.layout_weights
    monkeypatch.setattr(module, "layout_weights", lambda *a: calls.append(1) or inner(*a))
    encoder(spec)(pages())
    assert len(calls) == times


def test_the_order_of_words_plays_no_part():
    ids, turn = pages(), torch.randperm(13, generator=torch.Generator().manual_seed(1))
    for spec in (
        OWN,
        f"{OWN},context=2",
        f"{OWN},axes=centre",
        "skim_attention.embeddings:position=none,resolution=50",
    ):
        model = encoder(spec)
        assert_close(model(ids[:, turn])[0], model(ids)[0][:, turn], DEEP)
    for spec in (
        f"{OWN},axes=order",
        "skim_attention.embeddings:resolution=50",
        "softmax",
        f"{OWN},window=4",
    ):  # controls
        model = encoder(spec)
        assert is_far(model(ids[:, turn])[0], model(ids)[0][:, turn], DEEP)


def test_words_in_one_place_are_a_bag():
    ids = pages()
    ids[..., 1:] = ids[:1, :1, 1:]
    even = torch.full((2, 4, 13, 13), 1 / 13, dtype=torch.float64)
    assert_close(weights_of(encoder(), ids), even, PROJECTED)
    assert_close(weights_of(encoder(f"{OWN},axes=none"), pages()), even, PROJECTED)
    assert is_far(weights_of(encoder(), pages()), even, PROJECTED)  # control


@pytest.mark.parametrize(("axes", "moved", "still"), [("x", (1, 3), (2, 4)), ("y", (2, 4), (1, 3))])
def test_an_axis_alone_knows_nothing_of_the_other(axes, moved, still):
    model, ids = encoder(f"{OWN},axes={axes}"), pages()
    for columns, changes in ((moved, True), (still, False)):
        other = ids.clone()
        other[..., list(columns)] = other[..., list(columns)] // 2
        assert (error(weights_of(model, other), weights_of(model, ids)) > 1e-3) == changes


@pytest.mark.parametrize("length", [1, 4, 5, 13, 21])
def test_a_window_is_the_map_cut(length):
    generator = torch.Generator().manual_seed(length)
    q, k = (2 * torch.randn(2, 4, length, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    v = torch.randn(2, 4, length, 6, generator=generator, dtype=torch.float64)
    scores = q @ k.mT / math.sqrt(6)
    apart = (torch.arange(length)[:, None] - torch.arange(length)).abs()
    got = _read(skim.layout_weights(q, k, None, 5), v, 5)
    want = (scores.masked_fill(apart >= 5, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert_close(got, want, PROJECTED)
    if length > 5:
        wrong = (scores.masked_fill(apart >= 6, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        assert is_far(got, wrong, PROJECTED)
    assert_close(
        _read(skim.layout_weights(q, k, None, 32), v, 32),
        (scores.softmax(-1) @ v).transpose(1, 2).flatten(2),
        PROJECTED,
    )


@pytest.mark.parametrize("spec", [OWN, f"{OWN},window=4,context=1", "skim_attention.embeddings:resolution=50"])
def test_padding_of_pages_changes_nothing(spec):
    model, ids = encoder(spec), pages(1)
    wide, mask = torch.full((1, 19, 5), 7), torch.zeros(1, 19, dtype=torch.bool)
    columns = [*range(2, 8), *range(11, 18)]
    wide[0, columns], mask[0, columns] = ids[0], True
    assert_close(model(wide, mask=mask)[0][0, columns], model(ids)[0][0], DEEP)
    assert is_far(model(wide)[0][0, columns], model(ids)[0][0], DEEP)  # control


def test_half_precision_is_near():
    model, ids = encoder(), pages()
    want = model(ids)[0]
    assert error(model.to(torch.bfloat16)(ids)[0], want) < 0.05


# --- the mask


def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=8, intermediate_size=37,
        initializer_range=0.3,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of a page encoder, and the encoder."""
    model, folder = encoder().float(), tmp_path_factory.mktemp("pages")
    model.save(folder)
    return folder, model


def read_by_bert(words=13):
    """Ids and boxes of pages between two special tokens and, in the second row, before padding."""
    boxes = torch.zeros(2, words + 2, 4, dtype=torch.long)
    boxes[:, 1 : words + 1] = pages(2, words)[..., 1:]
    boxes[1, 9:] = 0
    real = torch.ones(2, words + 2, dtype=torch.long)
    real[1, 10:] = 0  # [SEP] at 9
    return torch.randint(5, 99, (2, words + 2), generator=torch.Generator().manual_seed(0)), boxes, real


def test_each_word_sees_the_k_words_that_the_map_gives_most_to(trained):
    folder, model = trained
    _, boxes, _ = read_by_bert()
    seen = parse(f"skim_attention.mask:weights={folder},top_k=3").on_pages(boxes).seen
    for row, count in ((0, 13), (1, 8)):
        words = slice(1, 1 + count)
        want = weights_of(model, torch.cat([torch.zeros(1, count, 1).long(), boxes[row : row + 1, words]], 2))[0]
        got = seen[row, :, words, words]
        assert (got.sum(-1) == 3).all()
        least = want.masked_fill(~got, math.inf).amin(-1)
        assert (least >= want.masked_fill(got, -math.inf).amax(-1)).all()
        assert not (least >= want.roll(1, -1).masked_fill(got, -math.inf).amax(-1)).all()  # control: another map
    assert seen[:, :, 0].all() and seen[..., 0].all() and seen[1, ..., 9:].all()  # stand nowhere


def test_it_is_the_mask_of_every_layer_of_an_encoder(trained):
    """As transformers computes with a mask of pairs of its own, one head's for all; by heads of the map in turn."""
    ids, boxes, real = read_by_bert()
    model = bert()
    with torch.no_grad():
        plain = model(ids, attention_mask=real).last_hidden_state
        for by in ("nearest", "random"):
            mask = parse(f"skim_attention.mask:top_k=3,by={by}").on_pages(boxes)
            pairs = mask.seen & real[:, None, None].bool()
            want = model(ids, attention_mask=pairs).last_hidden_state
            with use(model, mask):
                assert_close(model(ids, attention_mask=real).last_hidden_state[real.bool()], want[real.bool()], SAME)
            assert is_far(plain[real.bool()], want[real.bool()], SAME)
        mask = parse(f"skim_attention.mask:weights={trained[0]},top_k=3").on_pages(boxes)
        pairs = mask.seen.repeat(1, 2, 1, 1) & real[:, None, None].bool()
        want = model(ids, attention_mask=pairs).last_hidden_state
        twice = model(ids, attention_mask=mask.seen.repeat_interleave(2, 1) & real[:, None, None].bool())
        with use(model, mask):
            got = model(ids, attention_mask=real).last_hidden_state
        assert_close(got[real.bool()], want[real.bool()], SAME)
        assert is_far(twice.last_hidden_state[real.bool()], want[real.bool()], SAME)  # control: other heads
        assert torch.equal(model(ids, attention_mask=real).last_hidden_state, plain)


def test_all_words_are_ordinary_attention(trained):
    ids, boxes, real = read_by_bert()
    model, inside = bert(), real.bool()
    with torch.no_grad():
        want = model(ids, attention_mask=real).last_hidden_state[inside]
        for top_k, same in ((13, True), (500, True), (12, False)):
            with use(model, parse(f"skim_attention.mask:weights={trained[0]},top_k={top_k}").on_pages(boxes)):
                got = model(ids, attention_mask=real).last_hidden_state[inside]
            assert (error(got, want) < SAME) == same


def test_nearest_is_by_the_gap_between_boxes():
    row = torch.tensor([[[10, 10, 300, 20], [305, 10, 320, 20], [10, 60, 20, 70], [150, 12, 160, 18]]])
    seen = parse("skim_attention.mask:by=nearest,top_k=2").on_pages(row).seen[0, 0]
    assert seen[1].tolist() == [True, True, False, False]  # by middles it were the word at 150
    assert seen.diagonal().all()
    one, two = (parse(f"skim_attention.mask:by=random,top_k=2,seed={n}").on_pages(row).seen for n in (0, 1))
    assert (one.sum(-1) == 2).all() and not torch.equal(one, two)


def test_pieces_have_the_boxes_of_their_words():
    boxes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    got = skim.token_boxes([None, 0, 0, 1, None], boxes)
    assert got.tolist() == [[0] * 4, [1, 2, 3, 4], [1, 2, 3, 4], [5, 6, 7, 8], [0] * 4]


def test_errors(trained, tmp_path):
    ids, boxes, _ = read_by_bert()
    unbound = parse(f"skim_attention.mask:weights={trained[0]},top_k=3")
    with pytest.raises(UserError, match="give the boxes"), use(bert(), unbound):
        bound = bert()
        with use(bound, unbound):
            bound(ids)
    model = bert()
    with pytest.raises(UserError, match="bind the boxes of this call"), use(model, unbound.on_pages(boxes)):
        model(ids[:, 1:])
    for wrong, says in ((boxes[0], "one page is"), (boxes + 1000, "whole numbers"),
                        (boxes.float() + 0.5, "whole numbers"),
                        (boxes.flip(-1) + torch.tensor([1, 0, 0, 0]), "ends before")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            unbound.on_pages(wrong)
    with pytest.raises(UserError, match="compare --train"):
        parse("skim_attention.mask").on_pages(boxes)
    PageEncoder("softmax", CONFIG).save(tmp_path)
    with pytest.raises(UserError, match="was trained with softmax"):
        parse(f"skim_attention.mask:weights={tmp_path}").on_pages(boxes)
    for spec in ("skim_attention", "skim_attention.embeddings"):
        with pytest.raises(UserError, match="it is a layer of an Encoder"):
            Decoder(spec, DecoderConfig(9, 24, 1, 4))
    for spec in ("skim_attention:resolution=1", "skim_attention:window=0", "skim_attention:context=-1"):
        with pytest.raises(UserError, match="skim_attention"):
            parse(spec)
    with pytest.raises(UserError, match="top_k"):
        parse("skim_attention.mask:top_k=0")
    later = parse(OWN).build(MixerConfig(24, 4, 4, 6, 1, 2, 20, False))
    with pytest.raises(UserError, match="the page that the first one"):
        later(torch.zeros(1, 3, 24))
    with pytest.raises(UserError, match="a word and its box"):
        PageEncoder(OWN, CONFIG)(torch.zeros(1, 3, 4, dtype=torch.long))
    with pytest.raises(UserError, match="whole pages"):
        PageEncoder(OWN, CONFIG)(pages(), cu_seqlens=torch.tensor([0, 13]))
