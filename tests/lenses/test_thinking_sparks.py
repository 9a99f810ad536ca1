# SPDX-License-Identifier: Apache-2.0
"""Edge attribution and circuits: equal to explicit gradients of every edge, exact where the network is linear."""

import math

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.nn.functional import silu

import manyheads
from manyheads.errors import UserError
from manyheads.inspect.run import inspect_model
from manyheads.lenses.thinking_sparks import (
    Circuit,
    Pair,
    PairRuns,
    ThinkingSparks,
    cohorts,
    compared,
    effect,
    opening_pairs,
    strongest,
)
from manyheads.lenses.thinking_sparks.graph import run_model
from oracles import models
from tiny import chat
from tolerance import DEEP, assert_close, is_close, is_far, nearly

PAIR = Pair((5, 9, 3, 17, 22, 8, 41), (5, 9, 3, 11, 22, 30, 41), 2)
CHAIN = 16 * DEEP  # gradients of 60 products in a row, beside those of another order of summation


class Norm(nn.Module):
    """The model's own computes in float32 whatever it is given."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


def built(name="llama"):
    model = models.build(name, dtype=torch.float64)
    if name == "llama":
        for layer in model.model.layers:
            for norm in ("input_layernorm", "post_attention_layernorm"):
                setattr(layer, norm, Norm(getattr(layer, norm)))
        model.model.norm = Norm(model.model.norm)
    return model.requires_grad_(False)


def neox():
    config = transformers.GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.3, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPTNeoXForCausalLM(config).double().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def runs():
    return PairRuns(built(), manyheads.use, PAIR)


def dense(model, embeddings, read):
    """Logits ``[T, V]`` and all writers ``[T, D]`` of a tiny Llama whose reader r reads ``read(r, writers)``."""
    config, inner = model.config, model.model
    heads, kv, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = len(embeddings)
    cos, sin = (x[0] for x in inner.rotary_emb(embeddings[None], torch.arange(length)[None]))
    allowed = torch.ones(length, length, dtype=torch.bool).tril()

    def turned(x):
        half = torch.cat([-x[:, size // 2 :], x[:, : size // 2]], 1)
        return x * cos + half * sin

    def normed(x, norm):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * norm.weight

    writers, reader = [embeddings], 0
    for layer in inner.layers:
        attention, before, made = layer.self_attn, list(writers), []
        for linear, count in ((attention.q_proj, heads), (attention.k_proj, kv), (attention.v_proj, kv)):
            parts = linear.weight.unflatten(0, (count, size))
            made.append([normed(read(reader + i, before), layer.input_layernorm) @ parts[i].T for i in range(count)])
            reader += count
        out = attention.o_proj.weight.unflatten(1, (heads, size))
        for head in range(heads):
            group = head // (heads // kv)
            logits = turned(made[0][head]) @ turned(made[1][group]).T / math.sqrt(size)
            weights = logits.masked_fill(~allowed, -torch.inf).softmax(-1)
            writers.append(weights @ made[2][group] @ out[:, head].T)
        x, mlp = normed(read(reader, writers), layer.post_attention_layernorm), layer.mlp
        reader += 1
        writers.append((silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T)
    return normed(read(reader, writers), inner.norm) @ model.lm_head.weight.T, writers


def ends(model):
    clean, corrupted = (model.get_input_embeddings()(torch.tensor(ids)) for ids in (PAIR.clean, PAIR.corrupted))
    return clean, corrupted


def kl(model, logits):
    plain = dense(model, ends(model)[0], lambda r, writers: sum(writers))[0][PAIR.start :].log_softmax(-1)
    return (plain.exp() * (plain - logits[PAIR.start :].log_softmax(-1))).sum(-1).mean()


def edge_scores(model, graph, points):
    """The formula, one gate for each edge: d L / d gate of in(v) = sum of writers + gate (z_u - z'_u)."""
    clean, corrupted = ends(model)
    both = [dense(model, x, lambda r, writers: sum(writers))[1] for x in (clean, corrupted)]
    moved = [a - b for a, b in zip(*both, strict=True)]
    total = torch.zeros(graph.writers, graph.readers, dtype=torch.float64)
    for point in points:
        gates = torch.zeros_like(total).requires_grad_()

        def read(r, writers, gates=gates):
            return sum(w + gates[u, r] * moved[u] for u, w in enumerate(writers))

        logits, _ = dense(model, corrupted + point * (clean - corrupted), read)
        total += torch.autograd.grad(kl(model, logits), gates)[0] / len(points)
    return total


def test_scores_are_the_gradients_of_every_edge(runs):
    want = edge_scores(runs.model, runs.graph, [1 / 3, 2 / 3, 1])
    assert runs.graph.writers == 1 + 2 * 5 and runs.graph.readers == 2 * (4 + 2 + 2 + 1) + 1
    assert_close(runs.scores(3), want, CHAIN)
    assert torch.equal(want != 0, runs.graph.edges)  # and there are no others
    assert is_far(runs.scores(2), want, CHAIN)
    assert_close(runs.scores(0), edge_scores(runs.model, runs.graph, [0.0]), CHAIN)  # EAP
    assert is_far(runs.scores(0), want, CHAIN)
    swapped = PairRuns(runs.model, manyheads.use, Pair(PAIR.corrupted, PAIR.clean, PAIR.start))
    assert is_far(swapped.scores(3).abs(), want.abs(), CHAIN)  # alike in a linear network alone


def test_many_points_in_parts_are_one_mean(runs, monkeypatch):
    whole = runs.scores(5)
    monkeypatch.setattr("manyheads.lenses.thinking_sparks.attribution._ROWS", 2)
    assert_close(runs.scores(5), whole, CHAIN)


def test_edges_that_are_cut_carry_the_corrupted_run(runs):
    model, graph = runs.model, runs.graph
    clean, corrupted = ends(model)
    there = dense(model, corrupted, lambda r, writers: sum(writers))[1]
    kept = torch.rand(graph.edges.shape, generator=torch.Generator().manual_seed(1)) < 0.6

    def loss(kept):
        return kl(model, dense(model, clean, lambda r, writers: sum(
            w if kept[u, r] else there[u] for u, w in enumerate(writers)
        ))[0])  # fmt: skip

    assert runs.patched(kept) == pytest.approx(float(loss(kept)), rel=CHAIN)
    assert abs(runs.patched(~kept) / float(loss(kept)) - 1) > 3 * CHAIN
    within = kept.clone()
    within[graph.layers[1].sources, graph.layers[1].readers + graph.layers[1].inputs - 1] ^= True  # a head to its MLP
    assert runs.patched(within) == pytest.approx(float(loss(within)), rel=CHAIN)
    assert abs(runs.patched(within) / runs.patched(kept) - 1) > 3 * CHAIN


ARCHITECTURES = {name: (lambda name=name: built(name)) for name in ("llama", "qwen3", "phi3", "gpt2")} | {"neox": neox}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_edges_are_the_clean_run_and_none_the_corrupted_one(name):
    """And scores out of I add up to what the corruption changes, the nearer the more points there are."""
    model = ARCHITECTURES[name]()
    runs = PairRuns(model, manyheads.use, PAIR)
    edges = runs.graph.edges
    assert abs(runs.patched(edges)) < CHAIN
    assert runs.patched(~edges) == pytest.approx(runs.loss, rel=CHAIN) and runs.loss > 0.01
    gaps = [abs(float(runs.scores(m)[0].sum()) + runs.loss) for m in (24, 96)]
    assert gaps[1] < 0.4 * gaps[0] and gaps[1] < 0.05 * runs.loss  # an error of 1 / m
    assert float(runs.scores(24).abs()[0].sum()) > runs.loss + 3 * gaps[1]  # magnitudes do not add up to it
    assert [layer.beside for layer in runs.graph.layers] == [name == "neox"] * 2
    if name == "neox":  # an MLP beside attention reads no head of its block
        assert not edges[1:5, runs.graph.layers[0].inputs - 1].any()


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_a_norm_behind_the_projection_is_refused(name):
    with pytest.raises(UserError, match="does not add up"):
        PairRuns(built(name), manyheads.use, PAIR)


def test_a_node_scores_what_its_edges_do(runs):
    """The gradient of a head's own output; magnitudes of edges add up to more."""
    path = torch.stack([runs._ends[1] + k / 4 * (runs._ends[0] - runs._ends[1]) for k in range(1, 5)]).requires_grad_()
    run = run_model(runs.model, manyheads.use, path, len(PAIR.clean) - PAIR.start)
    back = torch.autograd.grad(runs.kl(run.logits).mean(), [block.z for block in run.blocks])
    want = [
        ((a.z - b.z) * slope.sum(0)).sum((0, 1, 3))
        for a, b, slope in zip(runs.clean, runs.corrupted, back, strict=True)
    ]
    scores = runs.scores(4)
    one = Circuit(runs.graph, scores[None], (runs.loss,), 10)
    assert_close(torch.from_numpy(-one.worth().values[0]), torch.stack(want), CHAIN)
    assert is_far(torch.from_numpy(one.magnitude().values[0]), torch.stack(want), CHAIN)


class Doubled(nn.Linear):
    """An MLP that is linear."""


def linear(softmax: bool):
    """A Llama without norms whose attention is uniform (or not), and whose MLPs are linear."""
    model = built()
    for layer in model.model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
        torch.manual_seed(3)
        layer.mlp = Doubled(32, 32, bias=False).double().requires_grad_(False)
        if not softmax:
            layer.self_attn.q_proj.weight.zero_()
    model.model.norm = nn.Identity()
    return model


def test_a_linear_network_needs_one_point(monkeypatch):
    weights = torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(PairRuns, "kl", lambda self, logits: (logits @ weights).mean(-1))
    runs = PairRuns(linear(softmax=False), manyheads.use, PAIR)
    change = float((runs._log_p.exp() * 0).sum())
    with torch.no_grad():
        run = [run_model(runs.model, manyheads.use, end[None], 5).logits for end in runs._ends]
    change = float((runs.kl(run[0]) - runs.kl(run[1]))[0])
    scores = runs.scores(1)
    assert float(scores[0].sum()) == pytest.approx(change, rel=CHAIN)
    assert float(scores[:, -1].sum()) == pytest.approx(change, rel=CHAIN)  # and into the logits
    assert_close(runs.scores(7), scores, CHAIN)
    swapped = PairRuns(runs.model, manyheads.use, Pair(PAIR.corrupted, PAIR.clean, PAIR.start))
    assert_close(swapped.scores(1).abs(), scores.abs(), CHAIN)
    curved = PairRuns(linear(softmax=True), manyheads.use, PAIR)
    assert is_far(curved.scores(7), curved.scores(1), CHAIN)


def test_equal_prompts_score_nothing():
    runs = PairRuns(built(), manyheads.use, Pair(PAIR.clean, PAIR.clean, 2))
    assert not runs.scores(3).any() and abs(runs.loss) < CHAIN
    with pytest.raises(UserError, match="as many tokens"):
        Pair((1, 2, 3), (1, 2), 1)


def test_one_head_patched_is_one_row_of_cut_edges(runs):
    """All edges out of a head cut at once: its output is the corrupted one, wherever it is read."""
    found = runs.patched_heads(["0.1", "1.3"])
    for value, node in zip(found.tolist(), (2, 1 + 5 + 3), strict=True):
        kept = runs.graph.edges.clone()
        kept[node] = False
        assert value == pytest.approx(runs.patched(kept), rel=CHAIN)
        kept[node - 1] = False
        assert abs(value / runs.patched(kept) - 1) > 3 * CHAIN


def test_circuits_leave_out_what_leads_nowhere(runs):
    graph = runs.graph
    names = graph.names()
    scores = torch.zeros(graph.writers, graph.readers)

    def put(writer, reader, value):
        scores[names[0].index(writer), names[1].index(reader)] = value

    put("I", "0.1 v", 4.0)  # value head 1 is shared by heads 2 and 3
    put("0.2", "MLP 1", 3.0)
    put("MLP 1", "O", -2.0)
    put("0.0", "O", 6.0)  # nothing goes into it
    put("I", "1.3 q", 5.0)  # nothing comes out of it
    kept = strongest(graph, scores, 5)
    assert int(kept.sum()) == 3 and not kept[names[0].index("0.0")].any()
    assert int(strongest(graph, scores, 2).sum()) == 0  # the two strongest are no path
    assert (
        int(strongest(graph, scores, 5, threshold=0.6).sum()) == 0 and int(strongest(graph, scores, 5, 0.3).sum()) == 3
    )
    assert Circuit(graph, scores[None], (1.0,), 5).heads == {"0.2"}
    table = Circuit(graph, scores[None], (1.0,), 5).importance()
    assert table.values[0][0].tolist() == [0, 0, 1, 0] and float(table.values.sum()) == 1


def test_checkpoints_compare(runs):
    graph, names = runs.graph, runs.graph.names()

    def circuit(*heads):
        scores = torch.zeros(1, graph.writers, graph.readers)
        for i, head in enumerate(heads):
            scores[0, 0, names[1].index(f"{head} q")] = 9.0
            scores[0, names[0].index(head), -1] = 1.0 + i
        return Circuit(graph, scores, (1.0,), 2 * len(heads))

    base, post = circuit("0.0", "0.1"), circuit("0.1", "1.2", "1.3")
    change = compared(base, post)
    assert change.emergent == ("1.3", "1.2") and change.retained == ("0.1",) and change.lost == ("0.0",)
    there, back = effect(base.importance(), post.importance()).mean, effect(post.importance(), base.importance()).mean
    assert_close(there, -back)
    assert there[1, 3] == pytest.approx(1, abs=1e-5) and there[0, 0] == pytest.approx(-1, abs=1e-5) and there[0, 3] == 0
    assert not is_close(there[0, 1], 0.0) and abs(there[0, 1]) < 0.9
    sets = [frozenset({"0.1", "1.2"}), frozenset({"1.2", "1.3"})]
    assert cohorts(base.heads, sets) == [[1, 1, 0], [0, 1, 1]]
    other = PairRuns(built("gpt2"), manyheads.use, PAIR)
    with pytest.raises(UserError, match="two checkpoints of one model"):
        compared(base, Circuit(other.graph, other.scores(1)[None], (1.0,), 5))


def test_scaling_by_one_is_nothing_and_by_zero_ablation():
    model, ids = built(), torch.tensor([PAIR.clean])

    def logits(spec):
        with manyheads.use(model, spec):
            return model(ids).logits

    assert_close(logits("ablate:heads=0.1+1.2,by=scale,factor=1.0"), model(ids).logits)
    assert_close(logits("ablate:heads=0.1+1.2,by=scale,factor=0.0"), logits("ablate:heads=0.1+1.2"))
    assert is_far(logits("ablate:heads=0.1+1.2,by=scale,factor=1.3"), model(ids).logits)


@pytest.fixture(scope="module")
def two():
    model, other = chat.tiny(), chat.tiny()
    noise = torch.Generator().manual_seed(0)
    for weight in other.parameters():
        weight.data += 0.3 * weight.std() * torch.randn(weight.shape, generator=noise)
    return model, other, chat.tokenizer()


def test_inspect_compares_two_checkpoints(two):
    model, other, tokenizer = two
    before = [p.requires_grad for p in model.parameters()]
    lens = ThinkingSparks(prompts=3, tokens=4, edges=30, steps=2)
    seen = inspect_model(model, tokenizer, lenses=[lens], against=(other, "other"), length=32, samples=1)
    found = seen.found[lens.spec]
    assert set(found.tables) == {"post", "base", "effect"} and seen.run["settings"]["against"] == "other"
    assert found.tables["post"].values.sum((1, 2)) == nearly([1.0] * len(found.tables["post"].values))
    emergent = [row["head"] for row in found.records["emergent heads"]]
    assert found.tables["post"].about["outlined"]["heads"] == emergent
    assert all(row["post"] >= 0 and row["effect"] <= 1 for row in found.records["emergent heads"])
    alone = lens.locate(model, tokenizer, manyheads.use)
    assert set(alone.tables) == {"importance", "worth"} and "edges" in alone.notes[0]
    assert [p.requires_grad for p in model.parameters()] == before
    with pytest.raises(UserError, match="no lens compares"):
        inspect_model(model, tokenizer, lenses=["sinks"], against=(other, "other"), length=32, samples=1)


def test_openings_are_cut_to_the_shorter_and_differ(two):
    model, other, tokenizer = two
    pairs = opening_pairs(model, other, tokenizer, ["What is 4 + 5?", "What is 7 + 8?"], 4)
    assert pairs and all(p.clean[: p.start] == p.corrupted[: p.start] and p.clean != p.corrupted for p in pairs)
    assert opening_pairs(model, model, tokenizer, ["What is 4 + 5?"], 4) == []
    with pytest.raises(UserError, match="prompts and edges"):
        ThinkingSparks(edges=0)
    with pytest.raises(UserError, match="every layer"):
        ThinkingSparks(layers=(0,))
    assert np.isfinite(ThinkingSparks().threshold)
