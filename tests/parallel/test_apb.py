# SPDX-License-Identifier: Apache-2.0
"""APB: every oracle of its attention in one process, and processes that give the same bits."""

import itertools

import pytest
import torch
from torch.nn.functional import cosine_similarity, normalize

import manyheads
import tolerance
from manyheads.errors import UserError
from manyheads.parallel import Processes
from manyheads.parallel.apb import APB, Blocks
from manyheads.parallel.apb.heads import causal_importance, features
from manyheads.parallel.apb.hosts import in_turn
from manyheads.parallel.apb.scorers import SCORERS, Block, selected
from parallel import apb_worker as worker

EXACT = 1e-12  # float64: the same numbers, added in another order
needs_gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)


def seen_by(blocks, chosen):
    """Keys of each kv head that tokens see, bool ``[Hkv, n, n]``, and which see the anchor; from the paper's words."""
    n, document = blocks.length, blocks.document
    seen = torch.ones(worker.KV_HEADS, n, n, dtype=torch.bool).tril()
    anchored = torch.zeros(n, dtype=torch.bool)
    for host, (start, stop) in enumerate(blocks.bounds):
        anchored[start:stop] = host > 0
        for head in range(worker.KV_HEADS):
            passed = torch.zeros(n, dtype=torch.bool)
            for earlier in range(host):
                passed[blocks.bounds[earlier][0] + chosen[earlier][head]] = True
            seen[head, start:stop, :start] = passed[:start]
    assert anchored[:document].sum() == document - blocks.size(0)
    return seen, anchored


def reference(layer, blocks, chosen):
    """Attention by the formula, with the anchor's keys in front of all: ``[B, n, H, dv]``."""
    groups = worker.HEADS // worker.KV_HEADS
    seen, anchored = seen_by(blocks, chosen)
    k, v = layer.k, layer.v
    if layer.anchor is not None:
        k, v = (torch.cat([a, b], 2) for a, b in zip(layer.anchor, (k, v), strict=True))
        front = anchored[:, None].expand(-1, layer.anchor[0].shape[2])
        seen = torch.cat([front.expand(worker.KV_HEADS, -1, -1), seen], 2)
    x = layer.q @ k.repeat_interleave(groups, 1).mT * layer.scale
    x = x.masked_fill(~seen.repeat_interleave(groups, 0), -torch.inf)
    return (x.softmax(-1) @ v.repeat_interleave(groups, 1)).transpose(1, 2)


def naive(apb, layer, blocks):
    """Smallest keys of each block, outside the anchor: indices by host, row and head."""
    norms = layer.k.norm(dim=-1)
    return [
        [[norms[row, head, start:stop][blocks.barred(host):].argsort()[: blocks.counts[host]] + blocks.barred(host)
          for head in range(worker.KV_HEADS)] for host, (start, stop) in enumerate(blocks.bounds)]
        for row in range(worker.BATCH)
    ]  # fmt: skip


WAYS = list(itertools.product((1, 2, 5), (0, 4, 61), (0, 3, 1.0), (0, 2, 0.3, 1.0)))


@pytest.mark.parametrize(("hosts", "query", "anchor", "passed"), WAYS)
def test_attention_is_that_of_the_formula(hosts, query, anchor, passed):
    apb = APB(hosts=hosts, query=query, anchor=anchor, passed=passed, scorer="knorm", pooling=1, sinks=1)
    blocks = apb.blocks(worker.LENGTH)
    layer = worker.drawn(blocks)
    got = in_turn(blocks, layer, apb.choose)
    for row, chosen in enumerate(naive(apb, layer, blocks)):
        want = reference(layer, blocks, chosen)[row]
        assert (got[row] - want).abs().max() < EXACT
    if hosts == 5 and query == 4 and passed == 2:  # the control: the tokens of another row
        assert (got[0] - reference(layer, blocks, naive(apb, layer, blocks)[1])[0]).abs().max() > 1e-2


def test_blocks_have_every_token_once():
    for length, hosts, query in itertools.product((1, 2, 9, 64, 65), (1, 2, 3, 8), (0, 1, 7, 70)):
        blocks = Blocks.of(length, hosts, query, 0.5, 0.5)
        assert blocks.bounds[0][0] == 0 and blocks.document + blocks.query == length
        assert blocks.query == min(query, max(0, length - hosts))
        assert all(a[1] == b[0] for a, b in itertools.pairwise(blocks.bounds))
        sizes = [blocks.size(host) for host in range(hosts)]
        assert max(sizes) - min(sizes) <= 1 and len(blocks.anchor.unique()) == len(blocks.anchor)
        assert all(0 <= c <= n for c, n in zip(blocks.counts, sizes, strict=True)) and blocks.counts[-1] == 0


def test_pairs_are_those_of_the_mask():
    blocks = Blocks.of(61, 4, 5, 0.5, 3)
    chosen = [[torch.arange(count) + blocks.barred(host)] * worker.KV_HEADS for host, count in enumerate(blocks.counts)]
    seen, anchored = seen_by(blocks, chosen)
    anchor = len(blocks.anchor)
    total = int(seen[0].sum()) + int(anchored.sum()) * anchor + 3 * anchor * (anchor + 1) // 2
    assert sum(blocks.pairs(host) for host in range(4)) == total
    assert Blocks.of(61, 1, 5, 0.5, 3).pairs(0) == Blocks.causal(61)


def block(tokens=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((4, tokens), (2, tokens), (2, tokens), (4, 3))
    q, k, v, asked = (torch.randn(2, h, t, 6, dtype=torch.float64, generator=generator) for h, t in shapes)
    return Block(q, k, v, asked, 0.4, window=4)


def test_scores_are_those_of_the_formulas():
    given = block()
    k = given.k.repeat_interleave(2, 1)
    query = (given.asked @ k.mT * 0.4).softmax(-1).unflatten(1, (2, 2)).mean((2, 3))
    assert tolerance.error(SCORERS["query"](given), query) < tolerance.FORMULA
    x = (given.q[:, :, -4:] @ k.mT * 0.4).masked_fill(~torch.ones(4, 40).tril(36).bool(), -torch.inf)
    window = x.softmax(-1).unflatten(1, (2, 2)).mean((2, 3))
    assert tolerance.error(SCORERS["snapkv"](given), window) < tolerance.FORMULA
    distinct = -cosine_similarity(given.k, normalize(given.k, dim=-1).mean(2, keepdim=True), dim=-1)
    assert tolerance.error(SCORERS["distinct"](given), distinct) < tolerance.FORMULA
    order = (distinct, query * given.v.norm(dim=-1))
    place = [(x[..., None] < x[..., None, :]).sum(-1) + 1 for x in order]  # how many are above
    assert torch.equal(SCORERS["hedge"](given), -torch.minimum(place[0] / 0.35, place[1] / 0.65))


@pytest.mark.parametrize("name", ["query", "knorm", "distinct", "hedge"])
def test_selection_follows_tokens_that_change_places(name):
    given, order = block(), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    moved = Block(given.q[:, :, order], given.k[:, :, order], given.v[:, :, order], given.asked, 0.4, window=4)

    def kept(pooling):
        first, other = (selected(SCORERS[name](x), 9, pooling=pooling) for x in (given, moved))
        return first, order[other].sort(-1).values

    assert torch.equal(*kept(1))
    assert not torch.equal(*kept(5))  # the control: neighbours are others


def test_a_row_is_chosen_for_as_if_alone():
    given = block()
    for name in ("query", "snapkv", "knorm", "distinct", "hedge", "random"):
        alone = Block(*(x[1:] for x in (given.q, given.k, given.v, given.asked)), 0.4, window=4)
        assert torch.equal(selected(SCORERS[name](given), 9)[1:], selected(SCORERS[name](alone), 9)), name


def test_what_is_barred_is_not_chosen_and_pooling_takes_neighbours():
    scores = torch.zeros(1, 1, 12)
    scores[..., 6] = 1
    assert selected(scores, 3, pooling=3).tolist() == [[[5, 6, 7]]]
    assert selected(scores, 2, barred=6, pooling=3).tolist() == [[[6, 7]]]
    assert selected(scores, 3).tolist() == [[[0, 1, 6]]]


@pytest.fixture(scope="module")
def llama():
    return worker.model()


@torch.no_grad()
def read(llama, spec):
    model, ids = llama
    with manyheads.use(model, spec):
        return model(ids).logits


@pytest.mark.parametrize("spec", [
    "apb:hosts=1", "apb:hosts=4,query=7,anchor=0,passed=1.0", "apb:hosts=7,query=0,anchor=0,passed=1.0,scorer=snapkv",
    "apb:hosts=3,query=7,anchor=0.5,passed=1.0,asked=false", "apb:hosts=3,query=75,anchor=0,passed=1",
])  # fmt: skip
def test_exact_where_everything_is_passed(llama, spec):
    with torch.no_grad():
        want = llama[0](llama[1]).logits
    assert tolerance.error(read(llama, spec), want) < tolerance.DEEP


def test_the_first_host_is_always_exact(llama):
    with torch.no_grad():
        want = llama[0](llama[1]).logits
    for spec in ("apb:hosts=4,query=7", "apb:hosts=4,query=7,scorer=random,passed=1"):
        got = read(llama, spec)
        assert tolerance.error(got[:, :17], want[:, :17]) < tolerance.DEEP
        assert tolerance.error(got[:, 17:34], want[:, 17:34]) > 1e-3


@torch.no_grad()
def by_parts(llama, hosts, query, front):
    """Logits of the query where each host reads ``[front ; block]`` alone by the plain model; caches are joined."""
    from transformers.cache_utils import DynamicCache

    model, ids = llama
    joined, start = DynamicCache(config=model.config), 0
    for host, size in enumerate([len(x) for x in torch.arange(ids.shape[1] - query).tensor_split(hosts)]):
        first = front if host else front[:0]
        at, rows = torch.arange(start, start + size), torch.cat([ids[:, first], ids[:, start : start + size]], 1)
        cache = DynamicCache(config=model.config)
        places = torch.cat([torch.arange(len(first)), at])[None].expand(len(ids), -1)
        causal = torch.ones(1, 1, len(places[0]), len(places[0]), dtype=torch.bool).tril()
        model(rows, position_ids=places, attention_mask=causal.expand(len(ids), -1, -1, -1), past_key_values=cache)
        for number, layer in enumerate(cache.layers):
            joined.update(layer.keys[:, :, len(first) :], layer.values[:, :, len(first) :], number)
        start += size
    return model(ids[:, start:], position_ids=torch.arange(start, ids.shape[1])[None], past_key_values=joined).logits


def test_nothing_passed_is_star_attention(llama):
    star = by_parts(llama, 4, 7, torch.arange(17))
    got = read(llama, "apb:hosts=4,query=7,anchor=1.0,passed=0,asked=false")[:, -7:]
    assert tolerance.error(got, star) < tolerance.DEEP
    asked = by_parts(llama, 4, 7, torch.cat([torch.arange(2), torch.arange(68, 75), torch.arange(2, 5)]))
    got = read(llama, "apb:hosts=4,query=7,anchor=5,passed=0,sinks=2")[:, -7:]
    assert tolerance.error(got, asked) < tolerance.DEEP
    assert tolerance.error(star, asked) > 1e-2 and tolerance.error(by_parts(llama, 4, 7, torch.arange(0)), star) > 1e-2


@torch.no_grad()
def test_decoding_goes_on_from_what_was_read_without_the_anchor(llama):
    model, ids = llama
    spec = "apb:hosts=4,query=7,scorer=hedge"
    with manyheads.use(model, spec):
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        out = model(ids, use_cache=True)
        cache, made = out.past_key_values, [out.logits[:, -1].argmax(-1)]
        assert cache.get_seq_length() == ids.shape[1]
    for _ in range(5):  # and exactly: the plain model goes on
        made.append(model(made[-1][:, None], past_key_values=cache).logits[:, -1].argmax(-1))
    assert torch.equal(whole[:, 75:], torch.stack(made, 1))
    alone = read((model, ids[1:]), spec)
    assert tolerance.error(read(llama, spec)[1:], alone) < tolerance.DEEP


def test_what_it_cannot_share_is_refused(llama):
    model, ids = llama
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with pytest.raises(UserError, match="leave padding away"), manyheads.use(model, "apb:query=7"):
        model(ids, attention_mask=padded)
    with pytest.raises(UserError, match="go together"):
        manyheads.parse("apb:scorer=retaining")
    with pytest.raises(UserError, match="odd number"):
        manyheads.parse("apb:pooling=4")
    with pytest.raises(UserError, match="leave layers= away"):
        manyheads.parse("apb:layers=0-3")


@needs_gloo
@pytest.mark.parametrize("size", [2, 4])
def test_processes_give_what_one_process_gives(size):
    with Processes(size, limit=120) as pool:
        for dtype, limit in ((torch.float64, EXACT), (torch.bfloat16, tolerance.HALF[torch.bfloat16])):
            for rank, found in enumerate(pool.run(worker.shared, dtype)):
                for case, (error, sent, formula) in found.items():
                    assert error < limit, (rank, case, error)
                    assert sent == formula and sent > 0, (rank, case)
        assert min(pool.run(worker.wrong_order)) > 1e-2
        if size > 2:
            return
        for spec in ("apb:query=7,scorer=hedge,hosts=4", "apb:query=0,passed=3,hosts=4", "apb:query=80,hosts=4"):
            for (logits, made, passed), (want, wanted, none) in pool.run(worker.read, spec):
                assert tolerance.error(logits, want) < EXACT and torch.equal(made, wanted)
                counts = manyheads.parse(spec.replace("hosts=4", "hosts=2")).blocks(75).counts
                assert passed == 3 * max(counts) * 2 * 2 * 16 * 8 and none == 0
        assert all("no gradients" in said for said in pool.run(worker.trained))


def test_heads_read_what_is_before_rotation_and_learn_what_will_be_looked_at(llama, tmp_path):
    from manyheads.recipes.apb import train_heads

    model, ids = llama
    heads = train_heads(model, lambda _: ids, budget=60, lr=3e-2, answer=20, hidden=16)
    untrained = train_heads(model, lambda _: ids, budget=1, lr=0.0, answer=20, hidden=16)
    assert heads.about["r2"] > 0.5 > untrained.about["r2"] + 0.3
    heads.save(tmp_path)
    spec = f"apb:hosts=4,query=7,scorer=retaining,heads={tmp_path},passed=3"
    trained = read(llama, spec)
    untrained.save(tmp_path / "other")
    other = read(llama, spec.replace(str(tmp_path), str(tmp_path / "other")))
    assert tolerance.error(trained, other) > 1e-3  # they choose something else
    with torch.no_grad():
        assert tolerance.error(trained[:, :17], model(ids).logits[:, :17]) < tolerance.DEEP


def test_what_heads_learn_is_the_formula():
    q, k, v, rotary = rotated()
    turned = [apply(x, rotary) for x in (q, k)]
    assert tolerance.error(features(*turned, v, rotary), torch.cat(
        [x.transpose(1, 2).flatten(2) for x in (q, k, v)], -1)) < tolerance.FORMULA  # fmt: skip
    x = turned[0] @ turned[1].repeat_interleave(2, 1).mT * 0.4
    want = [[max(float(x[0, h, t, s]) for h in (2 * kv, 2 * kv + 1) for t in range(max(s, 5), 9)) for s in range(9)]
            for kv in range(2)]  # fmt: skip
    want = torch.tensor(want, dtype=torch.float64)
    assert tolerance.error(causal_importance(*turned, 0.4, 4)[0], want) < tolerance.FORMULA


def rotated():
    """Queries, keys and values of 9 tokens, and a rotation of their positions."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 9, 6, dtype=torch.float64, generator=generator) for h in (4, 2, 2))
    angles = torch.rand(1, 9, 3, dtype=torch.float64, generator=generator) * 6
    angles = torch.cat([angles, angles], -1)
    return q, k, v, (angles.cos(), angles.sin())


def apply(x, rotary):
    """The rotation by complex numbers."""
    cos, sin = (t[:, None, :, :3] for t in rotary)
    z = torch.complex(x[..., :3], x[..., 3:]) * torch.complex(cos, sin)
    return torch.cat([z.real, z.imag], -1)
