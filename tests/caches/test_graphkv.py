# SPDX-License-Identifier: Apache-2.0
"""GraphKV: scores decay by similarity to the best, against loops, the paper's figure, and what must not change."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import manyheads
from caches.formula import DIM, agrees, drive, sequences, site
from manyheads import UserError, parse
from manyheads.attention import reference
from manyheads.caches._view import CacheView
from manyheads.caches.graphkv import GraphKV, propagate
from oracles import caches, models
from tolerance import CLOSE, assert_close


def by_hand(scores, keys, nodes, sources, neighbours, rounds, update):
    """Scores of one head in loops: lists of numbers, keys as vectors, nodes as the indices that take part."""
    scores, unit = list(scores), [x / x.norm() for x in keys.double()]
    for _ in range(rounds):
        best = sorted(nodes, key=lambda j: (scores[j], j), reverse=True)[:sources]
        left = [1.0] * len(scores)
        for i in best:
            edges = {j: float(unit[i] @ unit[j]) for j in nodes if j not in best}
            for j in sorted(edges, key=edges.get, reverse=True)[:neighbours]:
                e = min(1.0, max(0.0, edges[j]))
                left[j] = left[j] * (1 - e) if update == "mul" else left[j] - e
        scores = [s * x for s, x in zip(scores, left, strict=True)]
    return scores


def one(scores, keys, sources, neighbours, rounds=1, update="mul", nodes=None):
    """``propagate`` of a single head."""
    scores = torch.as_tensor(scores, dtype=torch.float32)
    nodes = torch.ones_like(scores, dtype=torch.bool) if nodes is None else nodes
    heads = [x[None, None] for x in (scores, keys, nodes)]
    number = torch.tensor([[sources]]), torch.tensor([[neighbours]])
    return propagate(*heads, *number, rounds=rounds, update=update)[0, 0]


# The paper's figure: seven tokens, sources 4 and 7 (counted from 1), token 6 like both, 3 like one, 5 like the other.
FIGURE = [0.1, 0.6, 0.3, 1.2, 0.3, 0.7, 1.1]


def figure_keys():
    axes = torch.eye(7)
    keys = axes.clone()
    keys[5] = 0.5 * axes[3] + 0.6 * axes[6] + math.sqrt(1 - 0.25 - 0.36) * axes[5]
    keys[2] = 0.7 * axes[3] + math.sqrt(1 - 0.49) * axes[2]
    keys[4] = 0.4 * axes[6] + math.sqrt(1 - 0.16) * axes[4]
    return keys * torch.linspace(0.5, 3.0, 7)[:, None]  # a cosine does not see lengths


@pytest.mark.parametrize("neighbours", [2, 6])
@pytest.mark.parametrize(
    ("update", "want"),
    [("add", [0.1, 0.6, 0.09, 1.2, 0.18, -0.07, 1.1]), ("mul", [0.1, 0.6, 0.09, 1.2, 0.18, 0.14, 1.1])],
)
def test_figure(update, want, neighbours):
    got = one(FIGURE, figure_keys(), 2, neighbours, update=update)
    assert_close(got, torch.tensor(want), CLOSE)
    assert sorted(got.topk(3).indices.tolist()) == [1, 3, 6]
    assert sorted(torch.tensor(FIGURE).topk(3).indices.tolist()) == [3, 5, 6]  # what the base would keep


@given(
    size=st.integers(1, 14), sources=st.integers(0, 15), neighbours=st.integers(1, 15), rounds=st.integers(0, 3),
    update=st.sampled_from(["mul", "add"]), seed=st.integers(0, 50),
)  # fmt: skip
def test_against_loops(size, sources, neighbours, rounds, update, seed):
    generator = torch.Generator().manual_seed(seed)
    scores, keys = torch.rand(size, generator=generator), torch.randn(size, DIM, generator=generator)
    nodes = torch.rand(size, generator=generator) < 0.8
    got = one(scores, keys, sources, neighbours, rounds, update, nodes)
    inside = nodes.nonzero()[:, 0].tolist()
    want = by_hand(scores.tolist(), keys, inside, sources, neighbours, rounds, update)
    assert_close(got.double(), torch.tensor(want, dtype=torch.float64), CLOSE)


def test_heads_have_their_own_numbers():
    """K and m differ by row and head; each head is what it would be alone."""
    generator = torch.Generator().manual_seed(1)
    scores, keys = torch.rand(2, 3, 20, generator=generator), torch.randn(2, 3, 20, DIM, generator=generator)
    nodes, sources = torch.ones(2, 3, 20, dtype=torch.bool), torch.tensor([[1, 4, 0], [7, 2, 3]])
    neighbours = torch.tensor([[3, 1, 2], [1, 19, 5]])
    got = propagate(scores, keys, nodes, sources, neighbours, rounds=2, update="mul")
    for b in range(2):
        for h in range(3):
            alone = one(scores[b, h], keys[b, h], int(sources[b, h]), int(neighbours[b, h]), 2)
            assert_close(got[b, h], alone, CLOSE)


def test_blocks_change_nothing(monkeypatch):
    _, k, _ = sequences(2, 4, 40)
    scores, nodes = torch.rand(2, 2, 40), torch.ones(2, 2, 40, dtype=torch.bool)
    number = torch.tensor([[9, 12], [1, 30]]), torch.tensor([[4, 1], [40, 2]])
    want = propagate(scores, k, nodes, *number, rounds=2, update="add")
    monkeypatch.setitem(reference._SCRATCH, "cpu", 500)
    assert_close(propagate(scores, k, nodes, *number, rounds=2, update="add"), want, CLOSE)


# What must hold


def view(k, positions=None):
    batch, heads, size = k.shape[:3]
    positions = torch.arange(size).expand(batch, heads, size) if positions is None else positions
    return CacheView(k, k, positions, (positions[:, 0] >= 0).sum(-1), None, DIM**-0.5, None, None, site())


@pytest.mark.parametrize("fields", ["num_sources=0", "rounds=0", "neighbours=0"])
def test_nothing_to_do_is_the_base(fields):
    _, k, _ = sequences(2, 4, 30)
    base = parse("keydiff:budget=10").score(view(k))
    assert torch.equal(parse(f"graphkv:base=keydiff,budget=10,{fields}").score(view(k)), base)
    assert not torch.equal(parse("graphkv:base=keydiff,budget=10").score(view(k)), base)


def test_orthogonal_keys_change_nothing():
    keys = torch.eye(8)[torch.randperm(8)] * 3
    scores = torch.rand(8)
    for update in ("mul", "add"):
        assert torch.equal(one(scores, keys, 3, 7, 2, update), scores)
    assert not torch.equal(one(scores, keys + 0.5, 3, 7), scores)


def test_copies_of_a_source_go_first():
    _, k, _ = sequences(1, 4, 12)
    keys, scores = k[0, 0], torch.linspace(1.0, 2.0, 12)
    keys[[2, 5, 9]] = keys[11].clone()  # the best and its copies
    got = one(scores, keys, 1, 3)
    others = [0, 1, 3, 4, 6, 7, 8, 10, 11]
    assert got[[2, 5, 9]].abs().max() < 1e-5 and torch.equal(got[others], scores[others])


def test_a_shuffled_graph_knows_no_copies():
    """The control: as many tokens lose as much, and which ones has nothing to do with their keys."""
    k = torch.randn(1, 1, 64, 16)
    k[:, :, 32:] = k[:, :, :32]  # every token has one copy, its key the only one like it
    graphs = [GraphKV(base="keydiff", budget=16, edges=edges) for edges in ("keys", "shuffled")]
    own, shuffled = (graph.keys(view(k)) for graph in graphs)
    assert torch.equal(own, k) and not torch.equal(shuffled, k)
    assert torch.equal(own.flatten().sort().values, shuffled.flatten().sort().values)
    assert torch.equal(shuffled, graphs[1].keys(view(k)))
    placed = [
        graphs[1].keys(dataclasses.replace(view(k), site=dataclasses.replace(view(k).site, layer=layer)))
        for layer in (None, 0, 1, 2)
    ]
    assert torch.equal(placed[0], placed[1])  # layers, as well as seeds, have orders of their own
    assert not torch.equal(placed[1], placed[2]) and not torch.equal(placed[2], placed[3])
    assert not torch.equal(dataclasses.replace(graphs[1], seed=1).keys(view(k)), shuffled)
    alike = torch.nn.functional.cosine_similarity(shuffled[..., :32, :], shuffled[..., 32:, :], dim=-1)
    assert (alike > 0.99).float().mean() < 0.2


def test_each_cluster_keeps_one():
    """Two clusters of copies and room for two: the base keeps two of the better one, the graph one of each."""
    _, k, _ = sequences(1, 4, 2)
    keys = k[0, 0].repeat_interleave(6, 0)
    scores = torch.cat([torch.linspace(2.0, 3.0, 6), torch.linspace(1.0, 1.5, 6)])
    assert all(i < 6 for i in scores.topk(2).indices.tolist())
    assert sorted(i // 6 for i in one(scores, keys, 1, 11).topk(2).indices.tolist()) == [0, 1]


@given(seed=st.integers(0, 100), sources=st.integers(1, 9), neighbours=st.integers(1, 20), rounds=st.integers(1, 3))
def test_order_lengths_and_bounds(seed, sources, neighbours, rounds):
    """Tokens may be permuted and keys scaled; no score grows or becomes negative, and those of the best stay."""
    generator = torch.Generator().manual_seed(seed)
    scores, keys = torch.rand(20, generator=generator), torch.randn(20, DIM, generator=generator)
    got = one(scores, keys, sources, neighbours, rounds)
    order = torch.randperm(20, generator=generator)
    assert_close(one(scores[order], keys[order], sources, neighbours, rounds), got[order], CLOSE)
    scaled = keys * torch.rand(20, 1, generator=generator).add(0.1)
    assert_close(one(scores, scaled, sources, neighbours, rounds), got, CLOSE)
    assert bool((got <= scores).all() and (got >= 0).all())
    best = scores.topk(sources).indices
    assert torch.equal(got[best], scores[best])
    again = one(scores, keys, sources, neighbours, 1).argsort(descending=True)[:sources]
    assert again.tolist() == scores.argsort(descending=True)[:sources].tolist()


def test_control_of_the_bounds():
    """Unclipped cosines of opposite keys would make scores grow; the figure's sums may fall below zero."""
    keys = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [1.0, 0.1], [1.0, -0.1]])
    assert one([3.0, 1.0, 2.9, 2.0], keys, 2, 3, update="mul")[1] == 1.0
    assert one([3.0, 1.0, 2.9, 2.0], keys, 2, 3, update="add")[3] < 0


# Over a base


def formula(base, budget, sinks=0, recent=0, share=0.3, neighbours=None, rounds=1, update="mul"):
    """Scores of held tokens: the base's, shifted to zero, propagated among what is not protected."""

    def score(held, k, q, seen):
        scores = base(held, k)
        nodes = [i for i, s in enumerate(held) if sinks <= s < seen - recent]
        low = min([0.0, *(scores[i] for i in nodes)])
        room = min(budget, seen) if isinstance(budget, int) else math.ceil(round(budget * seen, 9))
        fixed = len(held) - len(nodes)
        sources = math.ceil(round(share * max(0, room - fixed), 6))
        reach = max(1, math.ceil(round(0.1 * len(nodes) / max(1, sources), 6))) if neighbours is None else neighbours
        return by_hand([s - low for s in scores], k[held], nodes, sources, reach, rounds, update)

    return score


def keydiff(held, k):
    unit = [k[s] / k[s].norm() for s in held]
    anchor = sum(unit)
    return [-float(u @ anchor / anchor.norm()) for u in unit]


def knorm(held, k):
    return [-float(k[s].norm()) for s in held]


@pytest.mark.parametrize("padding", [(0, 0), (0, 5), (3, 0)])
@pytest.mark.parametrize("heads", [2, 8])
@pytest.mark.parametrize(
    ("spec", "score"),
    [
        ("graphkv:base=keydiff,budget=6", formula(keydiff, 6)),
        ("graphkv:base=knorm,budget=0.6,schedule=step", formula(knorm, 0.6)),
        ("graphkv:base=knorm,budget=6,schedule=3,neighbours=4,rounds=2,num_sources=0.5,update=add",
         formula(knorm, 6, neighbours=4, rounds=2, share=0.5, update="add")),
        ("graphkv:base=keydiff,budget=7,schedule=chunk,sinks=2,recent=3", formula(keydiff, 7, sinks=2, recent=3)),
    ],
)  # fmt: skip
def test_caches_against_loops(spec, score, heads, padding):
    agrees(parse(spec), score, heads, padding)


def test_control_of_caches_against_loops():
    for other in ({"share": 0.9}, {"neighbours": 6}, {"recent": 2}):
        with pytest.raises(AssertionError):
            agrees(parse("graphkv:base=knorm,budget=6"), formula(knorm, 6, **other))


@pytest.mark.parametrize(
    "base", ["snapkv(window_size=4,kernel_size=3)", "pyramidkv(base=knorm,beta=3)", "h2o", "d2o(sinks=1)"]
)
def test_room_for_everything_is_full(base):
    caches.off_means_off(models.tiny("llama"), f"graphkv:base={base},budget=1.0", f"graphkv:base={base},budget=1000")


def test_the_window_of_the_base_stays():
    q, k, v = sequences(2, 4, 40)
    _, kept, _ = drive(parse("graphkv:base=snapkv(window_size=6,kernel_size=3),budget=12,sinks=2"), q, k, v, [40])
    for head in kept[0].flatten(0, 1).tolist():
        assert {0, 1, *range(34, 40)} <= set(head) and len(set(head)) == 12


def test_it_takes_copies_out_of_snapkv():
    """Two runs of copies draw all votes; the graph leaves room for the third key that the window asks for."""
    q, k, v = sequences(1, 2, 48, seed=2)
    k, q = k * 0.1, q * 0.1
    towards = torch.nn.functional.normalize(torch.randn(2, DIM, generator=torch.Generator().manual_seed(4)), dim=-1)
    k[:, :, 10:20], k[:, :, 30], q[:, :, -8:] = 9 * towards[0], 8 * towards[1], 3 * (towards[0] + towards[1])
    base = "snapkv(window_size=8,kernel_size=1)"
    _, plain, _ = drive(parse("snapkv:budget=12,window_size=8,kernel_size=1"), q, k, v, [48])
    _, graph, _ = drive(parse(f"graphkv:base={base},budget=12,neighbours=9"), q, k, v, [48])
    assert all(30 not in head for head in plain[0][0].tolist())
    assert all(30 in head for head in graph[0][0].tolist())


def test_layers_and_heads_have_the_budgets_of_the_base():
    """Sources are counted from what the base gives a layer or head, and it gives what it would give alone."""
    model, ids = models.build("llama", num_hidden_layers=3), models.tokens(2, 40)

    def held(spec):
        with manyheads.use(model):
            layers = caches.stores(caches.prefilled(model, spec, ids))
            return [(layer.live.positions() >= 0).sum(-1).tolist() for layer in layers]

    given = held("pyramidkv:base=knorm,beta=4,budget=15")
    assert held("graphkv:base=pyramidkv(base=knorm,beta=4),budget=15") == given and given[0] != given[2]
    assert held("graphkv:base=d2o(sinks=1,merging=False),budget=15") == held("d2o:sinks=1,merging=False,budget=15")
    got = []

    class Noted(GraphKV):
        def _room(self, view, scores):
            got.append(GraphKV._room(self, view, scores).tolist())
            return torch.tensor(got[-1])

    for base in ("pyramidkv(base=knorm,beta=4)", "d2o(sinks=1,merging=False)", "knorm"):
        got.clear()
        assert held(Noted(base=base, budget=15)) == got


@pytest.mark.parametrize(
    "base", ["snapkv(window_size=2,kernel_size=3)", "h2o", "d2o(sinks=1)", "pyramidkv(base=keydiff)"]
)
def test_batch_equals_singles(base):
    caches.batch_equals_singles_padded_left(
        models.tiny("llama", torch.float64), f"graphkv:base={base},budget=0.6,rounds=2"
    )


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "deepseek_v3", "gemma3_text"])
def test_in_other_architectures(name):
    caches.batch_equals_singles_padded_left(
        models.tiny(name, torch.float64), "graphkv:base=keydiff,budget=6,schedule=step"
    )


@pytest.mark.parametrize(
    "fields",
    ["num_sources=1.5", "rounds=-1", "neighbours=-2", "update=max", "base=full", "base=hashevict", "budget=31"],
)
def test_refuses(fields):
    with pytest.raises(UserError):
        parse(f"graphkv:{fields}")


def test_specs_read_back():
    for spec in ("graphkv:base=snapkv(window_size=16),budget=0.25", "graphkv:budget=0.1,num_sources=0.4,neighbours=3"):
        assert parse(parse(spec).spec) == parse(spec)
