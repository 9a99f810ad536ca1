# SPDX-License-Identifier: Apache-2.0
"""Expected attention: the weight that a Gaussian of past queries, turned on to later positions, gives each key."""

import math

import pytest
import torch

import manyheads
from caches.formula import DIM, sequences, site
from caches.rows import Row, agrees, drive
from manyheads import UserError, parse
from manyheads.caches._store import view_of
from manyheads.call import AttentionCall
from oracles import caches, models
from tolerance import CLOSE, assert_close

THETA = 100.0


def angles(rotary_dim):
    return [THETA ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)]


def matrix(position, rotary_dim, factor=1.0, dim=DIM):
    """The rotation of one position as a matrix: pairs (i, i + r/2), channels past r untouched."""
    r = torch.eye(dim, dtype=torch.float64)
    for i, angle in enumerate(angles(rotary_dim)):
        j, a = i + rotary_dim // 2, position * angle
        r[i, i] = r[j, j] = factor * math.cos(a)
        r[j, i], r[i, j] = factor * math.sin(a), -factor * math.sin(a)
    return r


def turned(rotary_dim=DIM, factor=1.0, dtype=torch.float64, shift=0):
    """Queries at the positions of their row (padding at 0), and what the model would pass on."""

    def turn(q, padding):
        places = (torch.arange(q.shape[2])[None] - torch.tensor(padding)[:, None]).clamp(min=0) + shift
        a = places[..., None].double() * torch.tensor(angles(rotary_dim) * 2, dtype=torch.float64)
        cos, sin = (factor * a.cos()).to(dtype), (factor * a.sin()).to(dtype)
        r = torch.stack([torch.stack([matrix(int(p), rotary_dim, factor) for p in row]) for row in places])
        return (r[:, None] @ q[..., None].double())[..., 0].to(q.dtype), (cos, sin)

    return turn


def formula(future=512, sinks=4, rotary_dim=DIM, factor=1.0, covariance=True, vnorm=True, epsilon=0.0, shift=0):
    def score(row, h):
        ahead = sum(matrix(row.seen + shift + j, rotary_dim, factor) for j in range(future)) / future
        total = torch.zeros(len(row.held[h]), dtype=torch.float64)
        for g in range(h * row.groups, (h + 1) * row.groups):
            plain = [matrix(t + shift, rotary_dim, factor).inverse() @ row.q[g, t] for t in range(sinks, row.seen)]
            mu = sum(plain, torch.zeros(DIM, dtype=torch.float64)) / max(1, len(plain))
            sigma = sum((torch.outer(x - mu, x - mu) for x in plain), torch.zeros(DIM, DIM, dtype=torch.float64))
            sigma = ahead @ sigma @ ahead.T / max(1, len(plain))
            z = []
            for s in row.held[h]:
                k = row.k[h, s]
                x = float((ahead @ mu) @ k) / math.sqrt(DIM)
                x += float(k @ sigma @ k) / DIM / 2 if covariance else 0.0
                z.append(math.exp(x) if s >= sinks else 0.0)
            total += torch.tensor(z, dtype=torch.float64) / (sum(z) or 1.0) / row.groups
        return [
            (float(w) + epsilon) * float(row.v[h, s].norm()) if vnorm else float(w)
            for s, w in zip(row.held[h], total, strict=True)
        ]

    return score


@pytest.mark.parametrize("padding", [(0, 0), (0, 5), (2, 0)])
@pytest.mark.parametrize("heads", [2, 4, 8])
@pytest.mark.parametrize(
    ("budget", "sinks", "future", "schedule"),
    [(7, 4, 16, "prefill"), (0.6, 1, 3, "step"), (6, 2, 40, 3), (5, 0, 8, "chunk")],
)
def test_against_loops(budget, sinks, future, schedule, heads, padding):
    spec = f"expected_attention:budget={budget},sinks={sinks},future={future},schedule={schedule}"
    agrees(parse(spec), formula(future, sinks), heads, padding, turned=turned())


@pytest.mark.parametrize("fields", ["use_covariance=False", "use_vnorm=False", "epsilon=0.05"])
def test_fields(fields):
    name, _, value = fields.partition("=")
    own = {"use_covariance": "covariance", "use_vnorm": "vnorm"}.get(name, name)
    score = formula(20, 2, **{own: False if value == "False" else float(value)})
    agrees(parse(f"expected_attention:budget=6,sinks=2,future=20,schedule=step,{fields}"), score, turned=turned())


@pytest.mark.parametrize(("rotary_dim", "factor", "shift"), [(4, 1.0, 0), (2, 1.0, 0), (6, 1.3, 0), (6, 1.0, 90)])
def test_partial_and_scaled_rotations_and_later_beginnings(rotary_dim, factor, shift):
    """Channels past r stay, the factor of YaRN cancels, and so does where positions begin."""
    policy = parse("expected_attention:budget=6,sinks=2,future=12,schedule=step")
    score = formula(12, 2, rotary_dim, factor, shift=shift)
    agrees(policy, score, turned=turned(rotary_dim, factor, shift=shift))


def test_control_of_the_loops():
    policy = parse("expected_attention:budget=6,sinks=2,future=20,schedule=step")
    agrees(policy, formula(20, 2), turned=turned())
    wrong = (
        formula(1, 2), formula(20, 0), formula(20, 2, covariance=False), formula(20, 2, vnorm=False),
        formula(20, 2, rotary_dim=4), formula(60, 2),
    )  # fmt: skip
    for score in wrong:
        with pytest.raises(AssertionError):
            agrees(policy, score, turned=turned())


def _scores(policy, q, k, v, sizes, rotary, padding=None):
    """Scores of the slots after all forwards, none dropped."""
    roomy = parse(policy)
    _, _, store = drive(roomy, q, k, v, sizes, padding, rotary=rotary)
    call = AttentionCall(site(), q[:, :, :0], store.keys, store.values, DIM**-0.5)
    return roomy.score(view_of(store, call)), store


@pytest.mark.parametrize("sizes", [[40], [1, 39], [13, 13, 14], [38, 1, 1], [30, 0, 10], [1] * 40])
def test_chunks_give_what_one_forward_gives(sizes):
    q, k, v = sequences(2, 4, 40, seed=6)
    q, rotary = turned()(q + 3.0, (0, 0))
    got, store = _scores("expected_attention:schedule=step,budget=1.0", q, k, v, [n for n in sizes if n], rotary)
    want, whole = _scores("expected_attention:schedule=step,budget=1.0", q, k, v, [40], rotary)
    assert_close(got, want, CLOSE)
    for name, limit in (("query_mean", CLOSE), ("query_scatter", CLOSE), ("query_count", 0.0)):
        assert_close(store.state[name], whole.state[name], limit)


def test_bfloat16_cosines_suffice():
    """What the model rounds away of one position, many positions give back."""
    q, k, v = sequences(1, 4, 300, seed=6)
    turn, rounded = turned()(q, (0,)), turned(dtype=torch.bfloat16)(q, (0,))
    got, store = _scores("expected_attention:schedule=step,budget=1.0,sinks=0", turn[0], k, v, [300], rounded[1])
    want, _ = _scores("expected_attention:schedule=step,budget=1.0,sinks=0", turn[0], k, v, [300], turn[1])
    assert float((store.state["angle_step"][0] - torch.tensor(angles(DIM))).abs().max()) < 5e-5
    assert_close(got, want, 1e-5)


def test_one_known_query_gives_its_own_attention():
    """No spread and one position ahead: the weights that the same query gives at the next position."""
    q, k, v = sequences(1, 4, 20, seed=7)
    q[:] = q[:, :, :1]
    turn, rotary = turned()(q, (0,))
    got, _ = _scores(
        "expected_attention:schedule=step,budget=1.0,sinks=0,future=1,use_vnorm=False", turn, k, v, [20], rotary
    )
    row = Row(q[0].double(), k[0].double(), v[0].double(), 20, [list(range(20))] * 2)
    for h in range(2):
        nexts = [(matrix(20, DIM) @ row.q[2 * h + g, 0]) for g in range(2)]
        want = sum((row.k[h] @ x / math.sqrt(DIM)).softmax(0) for x in nexts) / 2
        assert_close(got[0, h].double(), want, CLOSE)


def test_nothing_but_sinks():
    """No query to learn from and nothing to choose: no NaN."""
    q, k, v = sequences(2, 4, 8)
    turn, rotary = turned()(q, (0, 5))
    _, kept, _ = drive(parse("expected_attention:budget=5"), turn, k, v, [8], [0, 5], rotary=rotary)
    assert [sorted(p for p in h if p >= 0) for h in kept[0][1].tolist()] == [[0, 1, 2]] * 2
    scores, _ = _scores(
        "expected_attention:schedule=step,budget=1.0", turn[:, :, :3], k[:, :, :3], v[:, :, :3], [3], rotary
    )
    assert bool(scores.isfinite().all())


@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2", "gemma2"])
def test_the_statistics_are_those_of_the_models_queries_before_rotation(name):
    """Mean and scatter against the inputs of the model's own rotation."""
    model, seen = models.tiny(name), {}
    attention = model.model.layers[1].self_attn
    norm = getattr(attention, "q_norm", None)
    handle = (norm or attention.q_proj).register_forward_hook(lambda m, args, out: seen.update(q=out))
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[1, :6] = 0
    try:
        with manyheads.use(model):
            cache = caches.prefilled(
                model, "expected_attention:schedule=step,budget=1.0", models.tokens(2, 24), attention_mask=mask
            )
    finally:
        handle.remove()
    q = seen["q"]
    q = q.unflatten(-1, (-1, attention.head_dim)) if q.ndim == 3 else q
    q = q if q.shape[1] == 24 else q.transpose(1, 2)
    state = caches.stores(cache)[1].state
    for b, begin in enumerate((4, 10)):
        x = q[b, begin:].double().transpose(0, 1)  # [H, T, d]
        assert_close(state["query_mean"][b].double(), x.mean(1), CLOSE)
        centred = x - x.mean(1, keepdim=True)
        assert_close(state["query_scatter"][b].double(), centred.transpose(1, 2) @ centred, CLOSE)
    want = 1e4 ** -(torch.arange(0, attention.head_dim, 2) / attention.head_dim)
    assert_close(state["angle_step"], want.expand(2, -1), CLOSE)


def test_refuses_rotations_that_it_cannot_read():
    q, k, v = sequences(1, 4, 8)
    _, (cos, sin) = turned()(q, (0,))
    for rotary in (
        None,
        (cos[..., :3], sin[..., :3]),
        (cos.repeat(1, 1, 2), sin.repeat(1, 1, 2)),
        (cos[None], sin[None]),
    ):
        store = parse("expected_attention:budget=6").store(site())
        keys, values = store.update(k, v)
        with pytest.raises(UserError, match="half-split"):
            store.evict(store.mask(AttentionCall(site(), q, keys, values, 1.0, is_causal=True, rotary=rotary)))


@pytest.mark.parametrize("name", ["gpt2", "deepseek_v3"])
def test_refuses_models_by_name(name):
    model = models.tiny(name)
    with pytest.raises(UserError, match="half-split"), manyheads.use(model, "expected_attention:budget=8"):
        caches.greedy(model, models.tokens(1, 20))


@pytest.mark.parametrize("fields", ["future=0", "epsilon=-1", "budget=3", "sinks=-1"])
def test_refuses(fields):
    with pytest.raises(UserError):
        parse(f"expected_attention:{fields}")


def test_the_statistics_go_where_nothing_is_scored_again():
    """After a prompt the cache holds its tokens alone, and stays so; else statistics are counted."""
    model, ids = models.tiny("llama"), models.tokens(2, 60)
    with manyheads.use(model), torch.inference_mode():
        mine, plain, later = (
            caches.prefilled(model, spec, ids)
            for spec in ("expected_attention:budget=12", "knorm:budget=12", "expected_attention:budget=12,schedule=9")
        )
        assert mine.bytes() == plain.bytes()
        state = [x for store in caches.stores(later) for x in store.state.values()]
        assert later.bytes() - plain.bytes() >= sum(x.nbytes for x in state) > 0
        for _ in range(3):
            for cache in (mine, plain):
                model(ids[:, -1:], past_key_values=cache)
        assert mine.bytes() == plain.bytes() and not any(store.state for store in caches.stores(mine))


def test_attention_is_not_gathered_after_a_prompt_either():
    model, ids = models.tiny("llama"), models.tokens(2, 60)
    with manyheads.use(model), torch.inference_mode():
        mine, plain = (caches.prefilled(model, f"{s}:budget=12,schedule=prefill", ids) for s in ("h2o", "knorm"))
        model(ids[:, -1:], past_key_values=mine)
        model(ids[:, -1:], past_key_values=plain)
        assert mine.bytes() == plain.bytes()
