# SPDX-License-Identifier: Apache-2.0
"""DHSA and its rivals: choices against their formulas, the sparse result against a mask, and the trained boundaries."""

import dataclasses
import itertools
import math

import pytest
import torch

import manyheads
from manyheads import UserError, parse
from manyheads.attention.block_pattern import Rule
from manyheads.attention.reference import attention, causal_mask
from manyheads.call import AttentionCall, Site
from manyheads.integrations.transformers import new_cache
from manyheads.mixers._sparse import Row
from manyheads.mixers.dhsa import Boundaries, fit_boundaries
from manyheads.mixers.dhsa import boundaries as predictor
from manyheads.mixers.dhsa.boundaries import BoundaryConfig, BoundaryNet, cut, labels, soft_label
from manyheads.mixers.dhsa.dhsa import chunk_scores, even, summed
from oracles import models
from oracles.caches import step
from oracles.test_restored import EXITS, is_restored
from tolerance import FORMULA, HALF, HALF_FACTOR, SAME, WRONG, assert_close, error, mean_error

SIZES = "budget=16,block=8,first=4,local=8,last=8"
RIVALS = ("block_mean", "a_shape", "vertical_slash", "random", "oracle")
SPECS = (
    f"dhsa:{SIZES},chunk=4",
    f"dhsa:{SIZES},chunk=4,index=kv",
    f"dhsa:{SIZES},chunk=5,index=query,norm=sum",
    *(f"dhsa.rival:by={by},{SIZES},chunk=4" for by in RIVALS),
    f"dhsa.rival:by=minference,index=query,{SIZES},chunk=4",
    f"dhsa.rival:by=vertical_slash,index=kv,{SIZES}",
)
SITE = Site("layer", 0, 0, "self", True, 4, 2)
LENGTH = 75  # whole blocks and a part of one


def call(queries=LENGTH, keys=None, *, site=SITE, dtype=torch.float64, seed=0, batch=1, **fields):
    source, keys = torch.Generator().manual_seed(seed), keys or queries
    draw = {
        name: torch.randn(batch, heads, length, 6, generator=source, dtype=torch.float64).to(dtype)
        for name, heads, length in (("q", 4, queries), ("k", 2, keys), ("v", 2, keys))
    }
    fields = {"is_causal": True, "step": keys - queries, "scale": 0.7, **fields}
    return AttentionCall(site, **{**draw, **fields})


def masked(strategy, c):
    """The dense formula under the mask of what is read, the tail's rows whole: ``[1, T, H, dv]``."""
    ((_, _, _, row),) = strategy.rows(c)
    mask = causal_mask(c.q.shape[2], c.k.shape[2])[None, None].expand(1, 4, -1, -1).clone()
    if row.rule.window is not None:
        columns = torch.arange(c.k.shape[2])
        mask &= row.rule.allows(columns[-c.q.shape[2] :, None], columns)
    few, keys = row.queries.shape[1], row.keys.shape[1]
    mask[:, :, :few, :keys] &= strategy.pattern(row).to_mask()
    return attention(c.q, c.k, c.v, scale=c.scale, mask=mask)


def row_of(strategy, c):
    return next(strategy.rows(c))[3]


# ---- what is computed


@pytest.mark.parametrize("spec", SPECS)
def test_gathered_keys_are_the_dense_formula_under_the_same_mask(spec):
    strategy, c = parse(spec), call()
    assert_close(strategy.attend(c), masked(strategy, c), FORMULA)
    assert error(strategy.attend(c), c.attend()) > 1e-2  # something is left out
    other = dataclasses.replace(strategy, local=strategy.local - 1)
    assert error(other.attend(c), masked(strategy, c)) > 1e-6  # control: one key more or less shows


@pytest.mark.parametrize("spec", SPECS)
def test_a_budget_that_covers_all_is_dense(spec):
    strategy, c = dataclasses.replace(parse(spec), budget=LENGTH), call()
    row = row_of(strategy, c)
    rule = Rule()
    size = row.keys.shape[1]
    assert torch.equal(strategy.pattern(row).to_mask(rule).all(1)[0], causal_mask(size, size))
    assert strategy.attend(c) is None  # the model itself attends
    few = dataclasses.replace(strategy, budget=size - 30)  # control
    assert not torch.equal(few.pattern(row).to_mask(rule).all(1)[0], causal_mask(size, size))


@pytest.mark.parametrize("spec", SPECS)
def test_every_block_reads_as_many_tokens_whatever_chose_them(spec):
    strategy = parse(spec)
    row = row_of(strategy, call(140))
    pattern = strategy.pattern(row)
    blocks = pattern.blocks()
    begin = torch.arange(0, row.queries.shape[1], 8)
    own = (begin + 8).clamp(max=row.queries.shape[1]) - begin
    between = (begin - 8 - 4).clamp(min=0)
    wanted = begin.clamp(max=12) + own + between.clamp(max=16)
    wanted = torch.maximum(wanted, torch.tensor(4))  # the first tokens are named even where they are not seen yet
    assert torch.equal(blocks.sum(-1), wanted.expand_as(blocks.sum(-1)))
    assert int(blocks.sum(-1).max()) <= strategy.most
    assert blocks[..., :4].all()
    assert pattern.to_mask(Rule()).diagonal(dim1=2, dim2=3).all()  # every query reads at least itself


@pytest.mark.parametrize("spec", [s for s in SPECS if "vertical" not in s and "minference" not in s])
def test_the_future_changes_nothing(spec):
    """Neither the output nor the choice of earlier blocks. Lines are estimated from the end, so they look ahead."""
    strategy = dataclasses.replace(parse(spec), last=0)
    c = call(80)
    k, v, q = c.k.clone(), c.v.clone(), c.q.clone()
    for x in (q, k, v):
        x[:, :, 48:] = torch.randn_like(x[:, :, 48:])
    changed = strategy.attend(c.replace(q=q, k=k, v=v))
    assert_close(changed[:, :48], strategy.attend(c)[:, :48], FORMULA)
    assert error(changed[:, 48:], strategy.attend(c)[:, 48:]) > 0.1
    if "rival" in spec:
        return
    seen = call(80).replace(is_causal=False)  # control: attention that is not causal is refused
    with pytest.raises(UserError, match="causal"):
        strategy.attend(seen)


@pytest.mark.parametrize("index", ["shared", "kv", "query"])
def test_chunks_of_one_token_are_an_exact_top_k_of_the_products(index):
    strategy = parse(f"dhsa:chunk=1,block=1,budget=5,first=2,local=3,last=0,index={index}")
    c = call(40)
    row = row_of(strategy, c)
    got = strategy.pattern(row).blocks()[0]
    q, k = c.q[0], c.k[0].repeat_interleave(2, 0)
    if index == "shared":
        q, k = q.mean(0, keepdim=True), c.k[0].mean(0, keepdim=True)
    elif index == "kv":
        q, k = q.unflatten(0, (2, 2)).mean(1).repeat_interleave(2, 0), k
    products = q @ k.mT
    for t in range(40):
        allowed = range(2, t - 3)
        for h in range(len(q)):
            best = sorted(allowed, key=lambda s: -float(products[h, t, s]))[:5]
            assert set(got[h, t].nonzero()[:, 0].tolist()) == {0, 1, *range(max(0, t - 3), t + 1), *best}
    wrong = dataclasses.replace(strategy, index="shared" if index == "kv" else "kv")  # control
    assert not torch.equal(got.expand(4, -1, -1), wrong.pattern(row).blocks()[0].expand(4, -1, -1))


def test_sums_by_prefix_are_sums():
    x, bounds = torch.randn(2, 50, 6), torch.tensor([0, 3, 4, 20, 50])
    for norm, power in (("sqrt", 0.5), ("mean", 1.0), ("sum", 0.0)):
        pieces = [x[:, a:b].double().sum(1) / (b - a) ** power for a, b in itertools.pairwise(bounds.tolist())]
        assert_close(summed(x, bounds, norm), torch.stack(pieces, 1).float(), 1e-6)
    far = torch.cat([torch.full((1, 100_000, 1), 100.0), x[:1, :, :1]], 1)  # after much that is large
    ends = torch.tensor([0, 100_000, 100_003, 100_050])
    assert_close(summed(far, ends)[:, 1:], summed(x[:1, :, :1], torch.tensor([0, 3, 50])), 1e-5)
    naive = torch.nn.functional.pad(far.cumsum(1), (0, 0, 1, 0))  # control: prefix sums in float32
    assert error((naive[:, 100_003] - naive[:, 100_000]) / math.sqrt(3), summed(far, ends)[:, 1]) > 1e-3


@pytest.mark.parametrize("norm", ["sqrt", "mean", "sum"])
def test_the_root_makes_scores_of_noise_alike_whatever_the_length(norm):
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([1, 4, 16, 64])
    bounds = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    k = torch.randn(4000, int(bounds[-1]), 1, generator=generator)
    squares = summed(k, bounds, norm)[..., 0].square()
    errors = [mean_error(squares[:, c], 1.0, math.sqrt(2)) for c in range(4)]
    assert (max(errors) < 4) == (norm == "sqrt")
    if norm != "sqrt":
        assert max(errors) > 3 * WRONG


def test_blocks_and_chunks_meet_in_their_means():
    c = call(32)
    strategy = parse("dhsa:block=8,last=0,first=0,local=0,budget=4")
    row, bounds = row_of(strategy, c), torch.tensor([0, 5, 7, 32])
    got = chunk_scores(row, bounds, 8)
    q, k = c.q[0].mean(0), c.k[0].mean(0)
    for b in range(4):
        for i, (start, stop) in enumerate(((0, 5), (5, 7), (7, 32))):
            mean = q[8 * b : 8 * b + 8].mean(0) @ k[start:stop].mean(0)
            assert float(got[0, b, i]) == pytest.approx(float(mean) * math.sqrt(8 * (stop - start)))


@pytest.mark.parametrize("spec", SPECS)
def test_lists_hold_the_first_the_chosen_and_the_local_tokens(spec):
    strategy, c = parse(spec), call()
    ((_, _, _, row),) = strategy.rows(c)
    found = strategy.pattern(row).blocks()[0]

    def wanted(local):
        (begin, end), columns = strategy._edges(row), torch.arange(row.keys.shape[1])
        near = (columns >= begin[:, None] - local) & (columns <= end[:, None])
        tokens = strategy.choose(row).tokens() | near | (columns < strategy.first)
        return tokens.repeat_interleave(len(found) // len(tokens), 0)

    assert torch.equal(found, wanted(strategy.local))
    assert not torch.equal(found, wanted(strategy.local - 1))


def test_the_rest_of_a_budget_goes_to_the_first_tokens_of_the_next_chunk():
    strategy = parse("dhsa:block=4,last=0,first=2,local=2,budget=7")
    row = Row(torch.randn(4, 24, 6), torch.randn(2, 24, 6), 0, 1.0, Rule(), 0)
    bounds = torch.tensor([0, 5, 9, 14, 24])
    scores = torch.tensor([1.0, 3.0, 2.0, 9.0]).expand(1, 6, 4)
    got = strategy.filled(scores, bounds, row).tokens()[0, 5].nonzero()[:, 0].tolist()  # from column 2 to 18
    assert got == [5, 6, 7, 14, 15, 16, 17]
    assert not strategy.filled(scores, bounds, row, 0).tokens().any()


def test_a_sliding_window_is_kept():
    site = dataclasses.replace(SITE, window=30)
    for spec in SPECS[:2]:
        strategy, c = dataclasses.replace(parse(spec), budget=6), call(site=site)
        assert_close(strategy.attend(c), masked(strategy, c), FORMULA)
        assert error(strategy.attend(call()), masked(strategy, c)) > 1e-3  # control: the same without a window


def test_lines_are_what_the_last_queries_attend_to():
    """A column and a distance that the end of the prompt looks at are read by all blocks; others by chance."""
    length, d = 96, 8
    q, k = torch.zeros(1, length, d), torch.zeros(1, length, d)
    q[0, :, 0], k[0, 10, 0] = 1.0, 50.0  # a column
    strategy = parse(f"dhsa.rival:by=vertical_slash,{SIZES},index=query")
    row = Row(q, k, 8, 1.0, Rule(), 0)
    read = strategy.pattern(row).blocks()[0, 0]
    assert read[3:, 10].all()
    strategy = parse("dhsa.rival:by=vertical_slash,budget=8,block=8,first=4,local=8,last=8,index=query,vertical=0")
    apart, eye = 24, 20 * torch.eye(length)
    row = Row(eye[None], torch.roll(eye, -apart, 0)[None], 8, 1.0, Rule(), 0)  # query t finds key t - apart
    got = strategy.pattern(row).to_mask(Rule())[0, 0]
    hits = [bool(got[t, t - apart]) for t in range(40, 88)]
    assert sum(hits) >= 0.9 * len(hits)
    blind = parse("dhsa.rival:by=a_shape,budget=8,block=8,first=4,local=8,last=8")  # control
    assert sum(bool(blind.pattern(row).to_mask(Rule())[0, 0][t, t - apart]) for t in range(40, 88)) < sum(hits)


def test_the_oracle_holds_most_attention_and_chance_less_than_it():
    c, held = call(200, seed=3), {}
    weights = (c.q[0] @ c.k[0].repeat_interleave(2, 0).mT * c.scale).masked_fill(~causal_mask(200, 200), -torch.inf)
    weights = weights.softmax(-1)
    for spec in SPECS:
        strategy = parse(spec)
        mask = strategy.pattern(row_of(strategy, c)).to_mask(Rule())[0]
        held[spec] = float(torch.where(mask, weights[:, :192, :192], 0.0)[:, 100:].sum())
    best = f"dhsa.rival:by=oracle,{SIZES},chunk=4"
    shared = {spec: value for spec, value in held.items() if "index" not in spec}
    assert max(shared, key=lambda spec: shared[spec]) == best
    assert held[f"dhsa.rival:by=random,{SIZES},chunk=4"] < 0.9 * held[best]


# ---- in a model


@pytest.mark.parametrize("spec", SPECS)
def test_on_means_on_and_a_batch_padded_left_equals_its_rows(spec):
    model = models.build("llama")
    source = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, models.VOCAB, (n,), generator=source) for n in (90, 61, 77)]
    ids, mask = torch.full((3, 90), 7), torch.zeros(3, 90, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 90 - len(row) :], mask[i, 90 - len(row) :] = row, 1
    with torch.no_grad():
        plain = model(rows[0][None]).logits
        with manyheads.use(model, spec):
            together = model(ids, attention_mask=mask).logits
            alone = [model(row[None]).logits[0] for row in rows]
    for i, row in enumerate(rows):
        assert_close(together[i, 90 - len(row) :], alone[i], 10 * SAME)
    assert error(alone[0][None], plain) > 1e-3


def test_padding_on_the_right_and_masks_of_ones_own():
    model, spec = models.build("llama"), SPECS[0]
    ids = torch.randint(3, models.VOCAB, (1, 80), generator=torch.Generator().manual_seed(4))
    padded = torch.cat([ids, torch.full((1, 9), 5)], 1)
    told = torch.ones_like(padded)
    told[:, 80:] = 0
    with torch.no_grad(), manyheads.use(model, spec):
        want = model(ids).logits
        assert_close(model(padded, attention_mask=told).logits[:, :80], want, 10 * SAME)
        told[:, 30] = 0
        with pytest.raises(UserError, match="padding at the ends"):
            model(padded, attention_mask=told)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3_text"])
def test_architectures_and_either_implementation(name, attn):
    model = models.build(name, attn=attn)
    ids = torch.randint(3, models.VOCAB, (2, 70), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        plain = model(ids).logits
        with manyheads.use(model, "dhsa:budget=70,block=8,first=4,local=8,last=8"):
            assert_close(model(ids).logits, plain, 10 * SAME)
        with manyheads.use(model, "dhsa:budget=3,block=4,first=1,local=1,last=2,chunk=2"):
            assert error(model(ids).logits, plain) > 1e-3


def test_caps_and_sinks_are_refused():
    for name, attn in (("gemma2", "eager"), ("gpt_oss", "eager")):
        model = models.build(name, attn=attn)
        with pytest.raises(UserError, match="sparse attention does not know"), manyheads.use(model, SPECS[0]):
            models.forward(name, model)
    with pytest.raises(UserError, match="at random"):
        parse(SPECS[0]).attend(call(dropout=0.1))
    with pytest.raises(UserError, match="finds no attention"), manyheads.use(models.build("bert"), SPECS[0]):
        pass


@pytest.mark.parametrize("leave", EXITS)
def test_restored(leave):
    is_restored(models.build("llama"), parse("dhsa:budget=2,block=2,first=1,local=1,last=1,chunk=2"), leave)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    strategy, c = parse(f"dhsa.rival:by=a_shape,{SIZES}"), call(dtype=dtype)
    wide = c.replace(**{name: getattr(c, name).double() for name in "qkv"})
    plain = masked(strategy, c)
    limit = max(HALF[dtype], HALF_FACTOR * error(plain.double(), masked(strategy, wide)))
    assert error(strategy.attend(c).double(), masked(strategy, wide)) <= limit
    assert strategy.attend(c).dtype == dtype


def test_gradients_are_those_of_the_masked_formula():
    strategy, c = parse(SPECS[1]), call()
    for x in (c.q, c.k, c.v):
        x.requires_grad_(True)
    weight = torch.randn(1, LENGTH, 4, 6, dtype=torch.float64)
    found = torch.autograd.grad((strategy.attend(c) * weight).sum(), (c.q, c.k, c.v))
    want = torch.autograd.grad((masked(strategy, c) * weight).sum(), (c.q, c.k, c.v))
    for x, y in zip(found, want, strict=True):
        assert_close(x, y, FORMULA)


def test_decoding_is_dense_or_chooses_for_each_token():
    model = models.build("llama")
    ids = torch.randint(3, models.VOCAB, (2, 70), generator=torch.Generator().manual_seed(6))
    for decode in ("dense", "sparse"):
        spec = f"dhsa:{SIZES},chunk=4,decode={decode}"
        with torch.no_grad(), manyheads.use(model, spec):
            cache = new_cache(model, parse("full"))
            step(model, ids, cache)
            calls = []
            with manyheads.use(model, _Calls(calls)):
                step(model, ids[:, :1], cache)
        strategy = parse(spec)
        for c, out in calls:
            if decode == "dense":
                assert_close(out, c.attend())
            else:
                mask = torch.cat([strategy.pattern(row).to_mask() for _, _, _, row in strategy.rows(c)])
                assert int(mask.sum(-1).max()) == 4 + 16 + 8 + 1
                assert_close(out, attention(c.q, c.k, c.v, scale=c.scale, mask=mask))
                assert error(out, c.attend()) > 1e-3


class _Calls(manyheads.strategy.AttentionWatch):
    def __init__(self, found):
        object.__setattr__(self, "layers", None)
        object.__setattr__(self, "found", found)

    def watch(self, call, out):
        self.found.append((call, out))


def test_a_prompt_in_pieces_reads_the_past_sparsely():
    strategy, c = parse(SPECS[0]), call(40, 110)
    assert_close(strategy.attend(c), masked(strategy, c), FORMULA)
    assert strategy._tail(c) == 8 and strategy._tail(call(1, 110)) == 1
    assert dataclasses.replace(strategy, decode="sparse")._tail(call(1, 110)) == 0


def test_an_evicted_cache_can_be_decoded_after_a_sparse_prompt_but_not_read_sparsely():
    model = models.build("llama")
    ids = torch.randint(3, models.VOCAB, (1, 90), generator=torch.Generator().manual_seed(7))
    evicting = "snapkv:budget=0.5,window_size=4"
    with torch.no_grad(), manyheads.use(model, SPECS[0], evicting):
        made = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape[1] == 94
    with (
        torch.no_grad(), manyheads.use(model, SPECS[0] + ",decode=sparse", evicting),
        pytest.raises(UserError, match="dropped"),
    ):  # fmt: skip
        model.generate(ids, max_new_tokens=4, do_sample=False)


@pytest.mark.parametrize(
    "spec",
    [
        "dhsa:chunk=0", "dhsa:theta=0.5", "dhsa:block=0", "dhsa:budget=-1", "dhsa.rival:by=minference",
        "dhsa.rival:vertical=2", "dhsa.rival:estimate=0",
    ],
)  # fmt: skip
def test_refused(spec):
    with pytest.raises(UserError):
        parse(spec)


# ---- boundaries


def test_bounds_are_sorted_whole_and_so_far_apart_as_asked():
    scores = torch.randn(201, generator=torch.Generator().manual_seed(0))
    for nms in (1, 3, 8):
        every = cut(scores, nms)
        assert every[0] == 0 and every[-1] == 200
        assert (every.diff() > 0).all() and every[1:-1].diff().min() >= nms
        few = cut(scores, nms, most=5)
        assert len(few) == 7 and set(few.tolist()) <= set(every.tolist())
        assert scores[few[1:-1]].min() >= scores[[i for i in every.tolist()[1:-1] if i not in few.tolist()]].max()
        over = cut(scores, nms, theta=1.1)
        assert over.tolist() == [0, *(i for i in every.tolist()[1:-1] if scores[i] > 4 * math.log(1.1)), 200]
    assert cut(torch.zeros(41), 8).tolist() == [0, 1, 40]  # of equal scores the earlier stays
    assert cut(torch.full((41,), -torch.inf), 8).tolist() == [0, 40]
    near = torch.zeros(41)
    near[20], near[24] = 2.0, 1.0
    assert 20 in cut(near, 8).tolist() and 24 not in cut(near, 8).tolist()
    assert 24 in cut(near, 4).tolist()  # control: a shorter distance lets it stay


def test_labels_are_the_attention_of_later_rows():
    size, w = 30, 4
    weights = torch.rand(size, size, dtype=torch.float64).masked_fill(~causal_mask(size, size), 0.0)
    got = labels(weights, w)
    for gap in range(w, size - w):
        left = weights[gap + w :, gap - w : gap].sum()
        right = weights[gap + w :, gap : gap + w].sum()
        assert float(got[gap]) == pytest.approx(float(1 / (1 + (min(left, right) / max(left, right)) ** 4)), rel=1e-4)
    assert not got[:w].isfinite().any() and not got[size - w :].isfinite().any()


def test_exchanging_the_sides_changes_no_label():
    a, b = torch.rand(2, 50, dtype=torch.float64)
    assert torch.equal(soft_label(a, b), soft_label(b, a))
    assert torch.equal(soft_label(a, a), torch.full_like(a, 0.5))
    assert not torch.equal((4 * (a / b).log()).sigmoid(), (4 * (b / a).log()).sigmoid())  # control: a signed ratio


@pytest.mark.parametrize("pool", ["mean", "gated"])
def test_all_gaps_at_once_are_gap_by_gap(pool):
    torch.manual_seed(0)
    net = BoundaryNet(BoundaryConfig(channels=16, hidden=8, pool=pool)).eval()
    keys = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = net(keys)
        sides = [(net.encode(keys[None, gap - 4 : gap]), net.encode(keys[None, gap : gap + 4])) for gap in range(4, 37)]
        assert_close(got[4:37], torch.cat([net.compare(left, right) for left, right in sides]))
        assert error(got[4:37], torch.cat([net.compare(right, left) for left, right in sides])) > 1e-3  # control
    assert got.isfinite().sum() == 40 - 2 * 4 + 1
    assert not net(keys[:7]).isfinite().any()


def test_windows_are_encoded_by_self_attention():
    torch.manual_seed(0)
    net, windows = BoundaryNet(BoundaryConfig(channels=16)).eval(), torch.randn(5, 4, 16)
    x = torch.nn.functional.rms_norm(windows, (16,))
    with torch.no_grad():
        want = net.norm(x + net.attention(x, x, x, need_weights=False)[0]).mean(1)
        assert_close(net.encode(windows), want)
        assert error(net.encode(windows.flip(2)), want) > 1e-3  # control


def planted(length=160, every=20, channels=16):
    """Keys of runs, each around a direction of its own, and attention that later rows give to every second run."""
    generator = torch.Generator().manual_seed(2)
    run = torch.arange(length) // every
    keys = torch.randn(length // every, channels, generator=generator)[run]
    keys = keys + 0.1 * torch.randn(length, channels, generator=generator)
    liked = torch.where(run % 2 == 0, 1.0, 0.05)
    weights = liked.expand(length, length).masked_fill(~causal_mask(length, length), 0.0)
    return keys, weights / weights.sum(1, keepdim=True)


def test_a_predictor_finds_planted_boundaries():
    keys, weights = planted()
    gaps = predictor._Gaps.of([(keys, labels(weights, 4))], 4, torch.device("cpu"))
    torch.manual_seed(0)
    net = BoundaryNet(BoundaryConfig(channels=16, hidden=32))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    before = gaps.judged(net)
    for _ in range(150):
        optimizer.zero_grad()
        predictor.focal_loss(gaps.logits(net, torch.arange(len(gaps.label))), gaps.label).backward()
        optimizer.step()
    after = gaps.judged(net.eval())
    assert after["held_out_loss"] < 0.2 * after["held_out_loss_of_the_mean"] < before["held_out_loss"]
    with torch.no_grad():
        bounds = cut(net(keys), 8, most=6)[1:-1].tolist()
    assert {round(b / 20) * 20 for b in bounds} == set(bounds)
    even_ones = even(160, 24).tolist()[1:-1]  # control: chunks of one length miss them
    assert {round(b / 20) * 20 for b in even_ones} != set(even_ones)


def test_the_focal_weight_spares_what_is_right():
    label, logits = torch.tensor([1.0, 1.0]), torch.tensor([5.0, -1.0])
    each = [float(predictor.focal_loss(logits[i : i + 1], label[i : i + 1])) for i in range(2)]
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, label, reduction="none")
    p = logits.sigmoid()
    assert each == pytest.approx(((1 - p) ** 2 * plain).tolist(), rel=1e-5)


def test_fitted_saved_loaded_and_used(tmp_path):
    model = models.build("llama")
    ids = torch.randint(3, models.VOCAB, (3, 96), generator=torch.Generator().manual_seed(8))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    made = fit_boundaries(model, ids, port=manyheads.use, steps=5, batch=32, pool="gated")
    again = fit_boundaries(model, ids, port=manyheads.use, steps=5, batch=32, pool="gated")
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
    keys = torch.randn(2, 50, 8)
    assert torch.equal(made.scores(keys), again.scores(keys))
    assert set(made.about) >= {"held_out_loss", "held_out_loss_of_the_mean", "held_out_correlation", "seed"}
    made.save(tmp_path / "made")
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == ["config.json", "model.safetensors"]
    loaded = Boundaries.load(tmp_path / "made")
    assert torch.equal(loaded.scores(keys), made.scores(keys)) and loaded.about == made.about
    spec = f"dhsa:{SIZES},boundaries={tmp_path / 'made'}"
    strategy = parse(spec)
    row = Row(torch.randn(4, 90, 8), torch.randn(2, 90, 8), 8, 1.0, Rule(), 0)
    assert torch.equal(strategy.bounds(row), cut(made.scores(row.keys), 8, most=82 // 8 * 8))
    with torch.no_grad():
        plain = model(ids).logits
        with manyheads.use(model, spec):
            assert error(model(ids).logits, plain) > 1e-3
            out = model(ids).logits
        with manyheads.use(model, f"dhsa:{SIZES},chunk=10"):  # control: chunks of one length
            assert error(model(ids).logits, out) > 1e-3
    with pytest.raises(UserError, match="fit them to this model"):
        loaded.scores(torch.randn(4, 50, 8))
    with pytest.raises(UserError, match="no boundaries"):
        strategy = parse(f"dhsa:{SIZES},boundaries={tmp_path / 'none'}")
        strategy.bounds(row)
    with pytest.raises(UserError, match="two texts"):
        fit_boundaries(model, ids[:1], port=manyheads.use)
