# SPDX-License-Identifier: Apache-2.0
"""TKL against its formulas: chunks as a mask, saturation as a logarithm, windows, regions, and what must not matter."""

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from manyheads import UserError, parse
from manyheads.attention.chunks import cores, pack_chunks, unpack_chunks
from manyheads.call import MixerConfig
from manyheads.mixers.tkl_local import TKL
from manyheads.mixers.tkl_local._scoring import PassageScore, Saturation, best_regions, kernels, window_sums
from manyheads.strategy import RankerConfig
from tolerance import DEEP, FORMULA, assert_close, error, is_far

DIM, HEADS = 12, 3


def scattered(module):
    torch.manual_seed(1)
    for p in module.parameters():
        nn.init.normal_(p, std=0.4)
    return module.double().eval().requires_grad_(False)


def mixer(**fields):
    return scattered(TKL(**fields).build(MixerConfig(DIM, HEADS, HEADS, DIM // HEADS, 0, 1, 64, False)))


def ranker(layers=2, seed=0, **fields):
    """A ranker in float64 as it is born, with scores that words decide."""
    torch.manual_seed(seed)
    made = TKL(**fields).ranker(RankerConfig(dim=DIM, heads=HEADS, layers=layers, hidden=8)).double()
    nn.init.normal_(made.passages.dense.weight, std=0.3)
    nn.init.normal_(made.words.mixed, 0.5, std=0.1)
    return made.eval().requires_grad_(False)


def texts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    real = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randn(*real.shape, DIM, generator=generator, dtype=torch.float64) * real[..., None], real


def scores(made, query, query_real, document, real):
    return made.score(made.query(query, query_real), query_real, made.document(document, real), real)


def chunk_mask(length, chunk, overlap):
    """The formula: i of chunk c sees j in [c chunk - overlap, (c + 1) chunk + overlap)."""
    first = torch.arange(length)[:, None] // chunk * chunk
    j = torch.arange(length)
    return (j >= first - overlap) & (j < first + chunk + overlap)


@pytest.mark.parametrize(("chunk", "overlap"), [(6, 2), (5, 0), (40, 5), (1, 0), (4, 9)])
@pytest.mark.parametrize("length", [1, 5, 30, 83])
def test_a_layer_is_dense_attention_under_the_chunks_mask(length, chunk, overlap):
    mine = mixer(chunk=chunk, overlap=overlap)
    x = texts(length)[0]

    def dense(mask):
        """Each word's own places: those of its chunk, from its first word."""
        at = torch.arange(length) - torch.arange(length)[:, None] // chunk * chunk + overlap
        keys = x[0] + mine.places[at.clamp(0, chunk + 2 * overlap - 1)]  # [T, T, dim]
        q = mine.q_proj(keys.diagonal().T).view(length, HEADS, -1)
        k, v = (p(keys).view(length, length, HEADS, -1) for p in (mine.k_proj, mine.v_proj))
        logits = torch.einsum("thd,tshd->hts", q, k) * (DIM // HEADS) ** -0.5
        weights = logits.masked_fill(~mask, -math.inf).softmax(-1)
        return mine.out_proj(torch.einsum("hts,tshd->thd", weights, v).flatten(1))[None]

    assert_close(mine(x)[0], dense(chunk_mask(length, chunk, overlap)), FORMULA)
    if length > chunk + overlap and overlap:  # control: an overlap on the left alone
        assert error(dense(chunk_mask(length, chunk, overlap).tril(chunk - 1)), mine(x)[0]) > 1e-3


def test_density_is_the_specs():
    assert chunk_mask(200, 40, 5).double().mean().item() == pytest.approx(0.24, abs=0.005)
    assert set(chunk_mask(200, 40, 5).sum(1).tolist()) == {45, 50}


def test_packing_leaves_out_padding_and_changes_nothing():
    x, real = texts(9, 31, 0, 14)
    for chunk, overlap in ((8, 3), (4, 0)):
        packed, held, kept = pack_chunks(x, real, chunk, overlap)
        every = -(-31 // chunk)
        want = [-(-n // chunk) for n in (9, 31, 0, 14)]
        assert kept.view(4, every).sum(1).tolist() == want and len(packed) == sum(want)
        assert_close(unpack_chunks(cores(packed, overlap), kept, 4, 31), x, FORMULA)
        assert held.sum() >= real.sum()
    made = ranker(chunk=8, overlap=3)
    alone = torch.cat([made.document(x[i : i + 1], real[i : i + 1]) for i in range(4)])
    assert_close(made.document(x, real), alone, DEEP)
    unpacked = made.words._read(  # all chunks, those of padding too
        pad(x, (0, 0, 3, 4)).unfold(1, 14, 8).mT.flatten(0, 1), pad(real, (3, 4)).unfold(1, 14, 8).flatten(0, 1),
        made.words.document_places,
    )  # fmt: skip
    assert_close(made.document(x, real), unpacked[:, 3:-3].unflatten(0, (4, -1)).flatten(1, 2)[:, :31], DEEP)


def test_a_word_is_known_within_its_extended_chunk_alone():
    """Through both layers, as each chunk is read by itself."""
    made = ranker(chunk=8, overlap=3)
    x, real = texts(40)
    other = x.clone()
    other[0, 20] = 3.0  # of chunk 2, and in reach of no other
    changed = (made.document(other, real) - made.document(x, real)).abs().amax(-1)[0] > 0
    assert changed.nonzero()[:, 0].tolist() == list(range(16, 24))
    other = x.clone()
    other[0, 22] = 3.0  # chunk 3 begins at 24 and reads three before
    changed = (made.document(other, real) - made.document(x, real)).abs().amax(-1)[0] > 0
    assert changed.nonzero()[:, 0].tolist() == list(range(16, 32))
    layers = nn.ModuleList([mixer(chunk=8, overlap=3), mixer(chunk=8, overlap=3)])  # control: layers that cut anew
    y, z = x, other
    for layer in layers:
        y, z = layer(y)[0], layer(z)[0]
    assert ((y - z).abs().amax(-1)[0] > 0).nonzero()[:, 0].tolist() != list(range(16, 32))


def test_words_are_mixed_as_the_formula_says():
    made = ranker(layers=1, chunk=0)
    x, real = texts(7, 4)
    layer = made.words.layers[0]
    theirs = nn.TransformerEncoderLayer(DIM, HEADS, 8, dropout=0.0, batch_first=True).double()
    names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out.", "linear1.": "up.", "linear2.": "down."}
    held = layer.state_dict()
    weights = {name + kind: held[own + kind] for name, own in names.items() for kind in ("weight", "bias")}
    theirs.load_state_dict(weights | {name: x for name, x in held.items() if name.startswith("norm")})
    y = theirs(x + made.words.query_places[:7], src_key_padding_mask=~real)
    m = made.words.mixed
    assert_close(made.query(x, real), (m * x + (1 - m) * y) * real[..., None], DEEP)
    assert error(made.query(x, real), ((1 - m) * x + m * y) * real[..., None]) > 1e-3


@pytest.mark.parametrize("length", [30, 31, 33, 64, 200])
def test_windows_are_summed_as_cut_out(length):
    x = torch.rand(2, 3, length, dtype=torch.float64) ** 8
    want = x.unfold(-1, 30, 2).sum(-1)
    assert_close(window_sums(x, 30), want, FORMULA)
    running = pad(x.cumsum(-1), (1, 0))
    starts = torch.arange(0, length - 29, 2)
    assert_close(running[..., starts + 30] - running[..., starts], want, DEEP)


def test_control_a_running_sum_loses_what_the_logarithm_looks_at():
    x = torch.cat([torch.ones(400), torch.full((100,), 1e-8)])
    want = x.double().unfold(0, 30, 2).sum(-1)[-20:].log()
    assert error(window_sums(x, 30)[-20:].clamp(min=1e-10).log(), want) < 1e-5
    running = pad(x.cumsum(0), (1, 0))
    starts = torch.arange(0, 471, 2)
    assert error((running[starts + 30] - running[starts])[-20:].clamp(min=1e-10).log(), want) > 0.1


def test_saturation_begins_as_a_logarithm():
    torch.manual_seed(0)
    made = Saturation(DIM).double().requires_grad_(False)
    x = torch.logspace(-1, math.log10(30), 50, dtype=torch.float64)[None, None, None]
    query, words = torch.randn(1, 4, DIM, dtype=torch.float64), torch.full((1, 50), 30.0, dtype=torch.float64)
    assert (made(x.expand(1, 4, 1, 50), query, words) - x.log()).abs().max() < 0.15
    nn.init.zeros_(made.curve.weight)
    exact = made(x.expand(1, 4, 1, 50), query, words)
    assert_close(exact[:, :1], 100 * (x**0.01 - 1), FORMULA, unit=100.0)
    assert (exact - x.log()).abs().max() < 0.06  # 100 (30^0.01 - 1) is 3.459, ln 30 is 3.401
    made.curve.bias[1] = 10.0  # control: b = 10
    assert (made(x.expand(1, 4, 1, 50), query, words) - x.log()).abs().max() > 1


def test_best_regions_are_apart_and_nothing_is_counted_twice():
    score = torch.zeros(3, 60)
    score[0, [5, 7, 30, 59]] = torch.tensor([9.0, 8.0, 7.0, 6.0])  # 7 is too near to 5
    score[1, 0], score[2] = -1.0, -torch.arange(60.0)
    there = torch.ones(3, 60, dtype=torch.bool)
    there[1, 1:] = False  # one window alone
    at, held = best_regions(score, there, 3, 15)
    assert at[0, 0].tolist() == [5, 30, 59]
    assert held[0].sum(1).tolist() == [3, 3, 2, 3, 2]  # behind 59 there is none
    assert held[1].sum().item() == 1 and at[1, 0, 0].item() == 0
    assert at[2, 0].tolist() == [0, 15, 30] and held[2, :, 0].tolist() == [True, False, True, False, True]
    nothing = best_regions(score, torch.zeros_like(there), 3, 15)[1]
    assert not nothing.any()


def test_a_score_of_zero_is_a_score():
    """The released code takes it for an empty window."""
    score = torch.full((1, 40), -5.0)
    score[0, 20] = 0.0
    at, held = best_regions(score, torch.ones(1, 40, dtype=torch.bool), 1, 15)
    assert at[0, 0, 0].item() == 20 and held.all()


def test_the_score_is_the_formulas():
    torch.manual_seed(0)
    head = PassageScore(DIM, window=6, regions=2, saturation="log").double().requires_grad_(False)
    for p in head.parameters():
        p += 0.1 * torch.randn_like(p).abs()
    (q, q_real), (d, d_real) = texts(3, seed=1), texts(17, seed=2)
    cosine = torch.nn.functional.cosine_similarity(q[0][:, None], d[0][None], dim=-1)
    assert_close(head.centres, [1, 0.9, 0.7, 0.5, 0.3, 0.1, -0.1, -0.3, -0.5, -0.7, -0.9], 1e-7)
    each = torch.stack([torch.exp(-((cosine - mu) ** 2) / 0.02) for mu in head.centres])  # [K, Q, T]
    windows = []
    for start in range(0, 13, 2):
        sums = each[:, :, start : start + 6].sum(-1) * head.saturation.factor[:, None]
        windows.append((head.dense.weight[0] * sums.clamp(min=1e-10).log().sum(1)).sum())
    windows = torch.stack(windows)
    first = int(windows.argmax())
    far = windows.clone()
    far[max(0, first - 2) : first + 3] = -math.inf
    total = 0.0
    for column, peak in enumerate((first, int(far.argmax()))):
        for row, step in enumerate((0, -1, 1, -2, 2)):
            if 0 <= peak + step < len(windows):
                total += windows[peak + step] * head.places[row, column]
    got = head(q, q_real, d, d_real)
    assert_close(got, total[None], DEEP)
    assert_close(kernels(cosine[None], head.centres)[0].transpose(0, 1), each, FORMULA)
    head.places[1] *= 2  # control
    assert is_far(head(q, q_real, d, d_real), total[None], DEEP)


@pytest.mark.parametrize("fields", [{}, {"regions": 0}, {"chunk": 0}, {"saturation": "log", "chunk": 4, "overlap": 1}])
@pytest.mark.parametrize("length", [1, 3, 29, 31, 90])
def test_padding_does_not_matter(fields, length):
    made = ranker(**fields)
    (q, q_real), (d, d_real) = texts(4, seed=1), texts(length, seed=2)
    want = scores(made, q, q_real, d, d_real)
    for more in (1, 2, 41):
        longer, longer_real = pad(d, (0, 0, 0, more)), pad(d_real, (0, more))
        assert_close(scores(made, q, q_real, longer, longer_real), want, DEEP, unit=10.0)
    asked, asked_real = pad(q, (0, 0, 0, 3)), pad(q_real, (0, 3))
    assert_close(scores(made, asked, asked_real, d, d_real), want, DEEP, unit=10.0)
    counted = scores(made, q, q_real, pad(d, (0, 0, 0, 41)), pad(d_real, (0, 41), value=True))
    assert is_far(counted, want, DEEP, unit=10.0)  # control: padding that is taken for words


@pytest.mark.parametrize("fields", [{}, {"chunk": 0}, {"regions": 0}])
def test_texts_without_a_known_word_have_a_score(fields):
    made = ranker(**fields)
    (q, q_real), (d, d_real) = texts(4, 4, seed=1), texts(9, 9, seed=2)
    for empty in (q_real, d_real):
        empty[1] = False
    got = scores(made, q * q_real[..., None], q_real, d * d_real[..., None], d_real)
    assert got[0] != 0 and got[1] == 0


def test_one_relevant_region_scores_the_same_wherever_it_lies():
    """By whole chunks, as positions begin anew in each; but for the edges of a document, in which others may lie."""
    made, far = ranker(regions=1), ranker(chunk=0, regions=1)
    q, q_real = texts(3, seed=1)
    filler = texts(40, seed=5)[0].repeat(1, 10, 1)
    found = {}
    for kind, each in (("chunks", made), ("all", far)):
        for at in (120, 160, 240):
            d = filler.clone()
            d[:, at + 10 : at + 13] = q
            found[kind, at] = scores(each, q, q_real, d, torch.ones(d.shape[:2], dtype=torch.bool))
    assert_close(found["chunks", 120], found["chunks", 160], DEEP)
    assert_close(found["chunks", 120], found["chunks", 240], DEEP)
    assert is_far(found["all", 120], found["all", 240], DEEP)  # control: full attention tells places apart


def test_the_order_of_a_query_is_told_by_positions_alone():
    made = ranker()
    (q, q_real), (d, d_real) = texts(5, seed=1), texts(60, seed=2)
    order = torch.tensor([3, 1, 4, 0, 2])
    want = scores(made, q, q_real, d, d_real)
    assert is_far(scores(made, q[:, order], q_real, d, d_real), want, DEEP)
    made.words.query_places.zero_()
    want = scores(made, q, q_real, d, d_real)
    assert_close(scores(made, q[:, order], q_real, d, d_real), want, DEEP)


def test_gradients_reach_every_parameter():
    made = ranker().requires_grad_(True)
    (q, q_real), (d, d_real) = texts(5, seed=1), texts(90, seed=2)
    scores(made, q, q_real, d, d_real).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    without = {name for name, p in made.named_parameters() if not p.grad.any()}
    assert without == set()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tkl_local:chunk=-1", "0 or more"), ("tkl_local:terms=0", "1 or more"), ("tkl_local:window=7", "even"),
        ("tkl_local:saturation=idf", "embedding' or 'log"),
    ],
)  # fmt: skip
def test_errors(spec, message):
    with pytest.raises(UserError, match=message):
        parse(spec)


def test_a_decoder_refuses_it():
    with pytest.raises(UserError, match="encoder attention"):
        TKL().build(MixerConfig(DIM, HEADS, HEADS, DIM // HEADS, 0, 1, 64))
    with pytest.raises(UserError, match="do not part"):
        TKL().ranker(RankerConfig(dim=10, heads=4))
