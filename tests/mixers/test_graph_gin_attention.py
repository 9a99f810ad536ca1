# SPDX-License-Identifier: Apache-2.0
"""GIN- and PNA-Attention against loops over heads and tokens, and what they become at the edges."""

import pytest
import torch
from torch.nn.functional import silu, softplus

from manyheads import UserError, parse
from manyheads.attention import rope
from manyheads.attention.positions import rope_tables
from manyheads.call import MixerConfig
from manyheads.mixers.graph_gin_attention import GraphGinAttention
from manyheads.mixers.graph_gin_attention.graph_gin_attention import adjacency
from manyheads.mixers.softmax import Softmax
from oracles import mixers
from tolerance import FORMULA, PROJECTED, assert_close, is_far

D, H, T = 8, 4, 11


def mixer(causal=True, **fields):
    torch.manual_seed(0)
    made = GraphGinAttention(**fields).build(MixerConfig(H * D, H, H, D, 0, 1, 16, causal)).double().eval()
    for p in made.parameters():
        torch.nn.init.normal_(p, std=0.6)
    if made.alpha is not None:
        made.alpha.data.fill_(1.7)
    return made


def drawn(length=T):
    return torch.randn(2, length, H * D, dtype=torch.float64)


def graph_by_hand(m, x, b, h):
    """Attention weights ``[T][T]`` of one head."""
    q, k = (p(x[b]).view(-1, H, D)[:, h][None, None] for p in (m.q_proj, m.k_proj))
    if m.strategy.position == "rope":
        tables = tuple(t.double() for t in rope_tables(torch.arange(len(x[b]))[None], D))
        q, k = rope.rotate(q, tables), rope.rotate(k, tables)
    alpha = 1.0 if m.alpha is None else m.alpha
    logits = alpha * (q @ k.mT)[0, 0] / (D**0.5 * m.strategy.temperature)
    return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).softmax(-1)


def processed(a, m):
    """The adjacency of one head, entry by entry as the code names it."""
    how, th = m.strategy, m.threshold
    made = {
        "none": lambda: a, "relu": lambda: (a - th).clamp(min=0), "silu": lambda: silu(a - th),
        "softplus": lambda: softplus(a - th), "sharp_softplus": lambda: softplus(how.beta * (a - th)) / how.beta,
        "sigmoid": lambda: torch.sigmoid(how.beta * (a - th)), "binary": lambda: (a > th).double(),
        "flow": lambda: torch.sigmoid(5 * a) * torch.sigmoid(50 * (a - th)),
        "top_k": lambda: torch.stack([
            torch.zeros_like(row).scatter(0, row[: t + 1].topk(max(1, int((t + 1) * how.fraction))).indices, 1.0)
            for t, row in enumerate(a)
        ]),
    }[how.adjacency]()  # fmt: skip
    return made.tril()


def by_hand(m, x):
    """The layer in loops over rows, heads and tokens."""
    out = torch.zeros_like(x)
    for b in range(len(x)):
        for h in range(H):
            mine = x if m.eps is not None else m.v_proj(x)
            own = mine[b].view(-1, H, D)[:, h]
            a = processed(graph_by_hand(m, x, b, h), m)
            if m.eps is not None:
                y = (m.eps[h, 0, 0] * own + a @ own) @ m.mlp.up[h] + m.mlp.up_bias[h]
                y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * m.mlp.norm[h]
                y = silu(y) @ m.mlp.down[h] + m.mlp.down_bias[h]
            else:
                rows = []
                for t in range(len(own)):
                    w = a[t] / (a[t].sum() if a[t].sum() else 1.0)
                    mean = w @ own
                    near = [s for s in range(len(own)) if a[t, s] > m.threshold] or [0]
                    sizes = own.norm(dim=1).tolist()
                    longest, shortest = (f(near, key=sizes.__getitem__) for f in (max, min))
                    variance = (w @ own.square() - mean**2).clamp(min=0)
                    rows.append(torch.cat([mean, own[longest], variance, own[shortest]]))
                y = silu(torch.stack(rows) @ m.mlp.up[h]) @ m.mlp.down[h]
            out[b, :, h * D : (h + 1) * D] = y
    return m.out_proj(out)


FIELDS = [
    {}, {"r": 2.0, "temperature": 0.5, "sharpen": False}, {"o_proj": True, "position": "none"},
    *({"adjacency": name} for name in ("relu", "silu", "softplus", "sharp_softplus", "sigmoid", "flow", "binary")),
    {"adjacency": "top_k", "fraction": 0.4}, {"adjacency": "relu", "learned_threshold": True},
    {"aggregate": "pna"}, {"aggregate": "pna", "adjacency": "relu"},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_is_its_formula(fields):
    m, x = mixer(**fields), drawn()
    want = by_hand(m, x)
    assert_close(m(x)[0], want, 4 * PROJECTED)  # a norm and a second product behind attention
    if m.eps is not None:
        m.eps.data += 1.0  # control: (1 + eps) x, as GIN has it and the released code has not
        assert is_far(m(x)[0], want, 1e-3)


@pytest.mark.parametrize("spec", ["graph_gin_attention", "graph_gin_attention:aggregate=pna",
                                  "graph_gin_attention:adjacency=softplus,learned_threshold=true"])  # fmt: skip
def test_gradients(spec):
    mixers.gradients_are_right(spec)


@pytest.mark.parametrize("spec", ["adjacency=top_k,fraction=0.3", "aggregate=pna,adjacency=binary,threshold=0.1"])
def test_steps_keep_the_protocol(spec):
    for oracle in (mixers.split_equals_one_pass, mixers.padding_changes_nothing, mixers.packed_equals_apart):
        oracle(mixers.mixer(f"graph_gin_attention:{spec}"))


def test_without_eps_and_mlp_it_is_attention_with_the_values_folded():
    m, x = mixer(sharpen=False), drawn()
    plain = Softmax().build(MixerConfig(H * D, H, H, D, 0, 1, 16)).double()
    plain.q_proj, plain.k_proj = m.q_proj, m.k_proj
    torch.nn.init.eye_(plain.v_proj.weight)
    fold = torch.randn(H, D, D, dtype=torch.float64)  # W_v of each head, folded into what stands behind it
    plain.out_proj.weight.data = torch.block_diag(*fold.mT)
    m.mlp = torch.nn.Identity()
    m.out_proj = plain.out_proj
    m.eps.data.zero_()
    assert_close(m(x)[0], plain(x)[0], PROJECTED)
    m.eps.data.fill_(0.1)
    assert is_far(m(x)[0], plain(x)[0], 1e-3)  # control


def test_top_k_of_everything_is_a_graph_of_all_ones():
    weights, allowed = torch.rand(1, 2, 5, 5).double(), torch.ones(1, 1, 5, 5).tril().bool()
    made = adjacency(weights, allowed, GraphGinAttention(adjacency="top_k", fraction=1.0), 0.2)
    assert torch.equal(made, allowed.double().expand_as(made))
    fewer = adjacency(weights, allowed, GraphGinAttention(adjacency="top_k", fraction=0.5), 0.2)
    assert fewer.sum(-1)[0, 0].tolist() == [1, 1, 1, 2, 2]  # control


def test_heads_know_nothing_of_each_other():
    m, x = mixer(), drawn()
    before = m(x)[0].unflatten(-1, (H, D))
    m.mlp.up.data[0] += 1.0
    m.eps.data[0] += 1.0
    after = m(x)[0].unflatten(-1, (H, D))
    assert torch.equal(after[..., 1:, :], before[..., 1:, :]) and is_far(after[..., 0, :], before[..., 0, :], 1e-3)


@pytest.mark.parametrize("aggregate", ["gin", "pna"])
def test_without_positions_and_mask_the_order_of_tokens_does_not_matter(aggregate):
    # With a threshold of 0 every key is a neighbour: where none is, PNA takes the first.
    m = mixer(causal=False, aggregate=aggregate, position="none", adjacency="silu", threshold=0.0)
    x, order = drawn(), torch.randperm(T)
    assert_close(m(x[:, order])[0], m(x)[0][:, order], 4 * PROJECTED)
    other = mixer(aggregate=aggregate, position="none")  # control: with a mask it does
    assert is_far(other(x[:, order])[0], other(x)[0][:, order], 1e-3)


def test_a_threshold_is_learned_and_binary_teaches_no_queries():
    m, x = mixer(adjacency="relu", learned_threshold=True, threshold=0.05), drawn()
    m(x)[0].square().sum().backward()
    assert m.threshold.grad.abs() > 0 and m.q_proj.weight.grad.abs().sum() > 0
    m = mixer(adjacency="binary", threshold=0.05)
    m(x)[0].square().sum().backward()
    assert m.q_proj.weight.grad is None and m.mlp.up.grad.abs().sum() > 0


def test_blocks_of_queries_change_nothing(monkeypatch):
    m, x = mixer(aggregate="pna", adjacency="relu"), drawn()
    want = m(x)[0]
    monkeypatch.setattr("manyheads.attention.reference.block_size", lambda *_: 3)
    assert_close(m(x)[0], want, PROJECTED)


@pytest.mark.parametrize("spec", ["r=0", "adjacency=tanh", "fraction=2", "dropout=1", "aggregate=sum"])
def test_refusals(spec):
    with pytest.raises(UserError):
        parse(f"graph_gin_attention:{spec}")
    with pytest.raises(UserError, match="heads"):
        GraphGinAttention().build(MixerConfig(30, 4, 4, 8, 0, 1, 16))


def test_temperature_one_and_no_sharpening_is_softmax():
    m, x = mixer(sharpen=False), drawn()
    assert_close(graph_by_hand(m, x, 0, 0).sum(-1), torch.ones(T), FORMULA)
    sharp = mixer()
    sharp.load_state_dict({**m.state_dict(), "alpha": torch.tensor(1.0)})
    assert_close(sharp(x)[0], m(x)[0], PROJECTED)
    sharp.alpha.data.fill_(2.0)
    assert is_far(sharp(x)[0], m(x)[0], 1e-3)  # control
