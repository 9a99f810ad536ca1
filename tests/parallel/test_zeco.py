# SPDX-License-Identifier: Apache-2.0
"""ZeCO: linear attention that processes share is that of one process; bytes and messages are those of the formulas."""

import contextlib
import math

import pytest
import torch

from manyheads import parse
from manyheads.attention.gated import channel_gated, delta_rule
from manyheads.attention.recurrence import decay_attention
from manyheads.errors import UserError
from manyheads.parallel import Processes, _cost
from manyheads.parallel._ledger import Ledger
from manyheads.parallel._peers import Peers
from manyheads.parallel._scan import StateScan, apply
from manyheads.tasks.parallel import _state_runs as runs
from manyheads.tasks.parallel._published import PUBLISHED, published_fit

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from parallel import zeco_worker as worker

EXACT = 1e-12  # float64: the same numbers, added in another order
SHAPES = ((1, 2, 8, 12), (2, 3, 4, 16))
WAYS = {"chain": "zeco:pieces=4", "alone": "zeco:pieces=1", "doubling": "zeco:exchange=doubling",
        "all_gather": "zeco:exchange=all_gather"}  # fmt: skip
STEPS = 3


def _text(seed=0):
    source = torch.Generator().manual_seed(seed)
    return torch.randint(97, 122, (STEPS, 2, 30), generator=source, dtype=torch.uint8)


@pytest.fixture(scope="module", params=(2, 4, 8))
def left(request, processes):
    """What processes found, all in one start of them."""
    count = request.param
    with contextlib.ExitStack() as stack:  # eight are asked for by no other test
        pool = stack.enter_context(Processes(count, limit=120)) if count == 8 else processes(count)
        yield _asked(count, pool)


def _asked(count, pool):
    found = {"count": count, "exact": pool.run(worker.exact)}
    found["bytes"] = {name: pool.run(runs.counted, spec, SHAPES) for name, spec in WAYS.items()}
    if count == 4:
        found["controls"], found["moved"] = pool.run(worker.controls), pool.run(worker.moved)
        found["refused"] = pool.run(worker.refused)
        for mixer in ("tnl_lightning", "minimax_hybrid:every=0", "dijiang"):
            found[mixer] = pool.run(runs.losses, "zeco:pieces=2", mixer, _text(), STEPS, 1e-2)[0]
    if count == 2:
        arms = {"zeco": "zeco", "a": runs.ALL_TO_ALL, "b": runs.ALONE}
        found["minimax"] = pool.run(worker.transformers_model)
        found["times"] = pool.run(runs.times, arms, 32, 2, 4, 1, 1)[0]
    return found


def test_every_form_and_exchange_is_exact(left):
    for one in left["exact"]:
        assert len(one) == (12 if left["count"] == 8 else len(worker.FORMS) * len(worker.WAYS))
        assert {case: errors for case, errors in one.items() if not max(errors.values()) <= EXACT} == {}


def test_faults_are_seen(left):
    """A gate that is not told of the state, and a state that is meant for another process."""
    if left["count"] != 4:
        return
    gate, rank = zip(*left["controls"], strict=True)
    assert max(errors["dg"] for errors in gate) > 1e-4 and max(errors["out"] for errors in gate) <= EXACT
    assert all(errors["out"] > 0.1 for errors in rank[1:]) and rank[0]["out"] <= EXACT


def test_bytes_and_messages_are_those_of_the_formulas(left):
    count = left["count"]
    for i, (batch, heads, width, values) in enumerate(SHAPES):
        state = batch * heads * width * values * 4
        pair = state + batch * heads * width * 4
        log = math.ceil(math.log2(count))
        for name, by_rank in left["bytes"].items():
            most = [max(rank[i][j] for rank in by_rank) for j in range(3)]
            sends = {"doubling": log * pair, "all_gather": (count - 1) * pair}.get(name, state)
            steps = {"chain": count + 2, "alone": count - 1, "doubling": log, "all_gather": count - 1}[name]
            assert most == [sends, sends, steps], (name, count)


def test_shares_and_values(left):
    """Tokens that move across a bound change nothing, and outputs are linear in values."""
    if left["count"] != 4:
        return
    equal, shifted = (torch.cat([rank[i][0] for rank in left["moved"]], 2) for i in range(2))
    assert worker.relative(equal, shifted) <= EXACT
    assert max(error for rank in left["moved"] for _, error in rank) <= EXACT
    assert "PositionedMixer has others" in left["refused"][0]


def test_a_model_trains_as_in_one_process(left, processes):
    if left["count"] != 4:
        return
    pool = processes(1)
    for mixer in ("tnl_lightning", "minimax_hybrid:every=0", "dijiang"):
        alone = pool.run(runs.losses, None, mixer, _text(), STEPS, 1e-2)[0]
        assert max(abs(x - y) for x, y in zip(alone, left[mixer], strict=True)) < 1e-9, mixer
        assert alone[0] - alone[-1] > 0.01
    other = pool.run(runs.losses, None, "tnl_lightning", _text(1), STEPS, 1e-2)[0]
    assert abs(other[-1] - left["tnl_lightning"][-1]) > 1e-6  # another text is told apart


def test_a_model_of_transformers(left):
    """MiniMax, of linear layers with softmax among them and alone: logits, padding, gradients, tokens generated."""
    if left["count"] != 2:
        return
    for one in left["minimax"]:
        shares = {one.pop(name) for name in list(one) if name.endswith("share")}
        assert shares < {18 / 37, 19 / 37} and max(one.values()) < 1e-5, one  # of the whole; float32
        assert one["hybrid, generated"] == one["linear alone, generated"] == 0


def test_all_arms_of_the_timing_run(left):
    if left["count"] == 2:
        assert all(len(ms) == 1 and ms[0] > 0 for ms in left["times"].values())


def test_gates_of_channels_and_the_delta_rule_reduce_to_decay():
    """Gates that all channels share are gates of heads; without rates nothing is written; keys apart add up."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 40, d, dtype=torch.float64) for d in (6, 6, 4))
    g = -torch.rand(2, 3, 40, dtype=torch.float64)
    want, state = decay_attention(q, k, v, g, scale=0.3)
    m, s, outputs = channel_gated(q, k, v, g[..., None].expand_as(k), 0.3)
    assert worker.relative(outputs()[0], want) < EXACT and worker.relative(s, state.kv) < EXACT
    m, s, outputs = delta_rule(q, k, v, torch.zeros_like(g), g)
    assert not s.any() and not outputs()[0].any()
    assert worker.relative(m, g.sum(2).exp()[..., None, None] * torch.eye(6, dtype=torch.float64)) < EXACT
    keys = torch.eye(40, dtype=torch.float64).expand(2, 3, -1, -1)  # none has anything in common with another
    queries = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    _, _, outputs = delta_rule(queries, keys, v, torch.ones_like(g), None, size=16)
    assert worker.relative(outputs()[0], decay_attention(queries, keys, v)[0]) < EXACT


@pytest.mark.parametrize("form", ["channel", "delta", "gated delta", "channel documents"])
def test_carried_queries(form):
    """What a run from zeros says of one from another state: its outputs and its last state."""
    given, _ = worker.drawn(form)
    out, state = worker.reference(form, **given)
    args = [given[name] for name in ("q", "k", "v")] + ([given["beta"]] if "delta" in form else [])
    m, s, outputs = (delta_rule if "delta" in form else channel_gated)(*args, given["g"], 0.7, size=8)
    own, carried = outputs()
    assert worker.relative(own + carried @ given["start"], out) < EXACT
    assert worker.relative(s + apply(m, given["start"]), state) < EXACT


def test_auto_takes_what_the_model_says_is_fastest():
    def chosen(ranks, heads, link):
        scan = StateScan(Peers(range(ranks), None, Ledger(0)), "auto", link=link)
        m, s = torch.zeros(1, heads, 128, device="meta"), torch.zeros(1, heads, 128, 128, device="meta")
        times = scan.times(m, s)
        assert scan.chosen(m, s) == min(times, key=times.get)
        return scan.chosen(m, s)

    far, slow = _cost.Link(1e-5, 50e9), _cost.Link(1e-7, 1e9)
    assert chosen(64, 1, far) == "doubling"  # messages that are all latency
    assert chosen(8, 32, slow) == "chain"  # and all bytes
    assert chosen(2, 32, slow) == "chain"


def test_the_model_comes_near_the_published_times():
    """Fitted without them, from 32 processes on; a link without latency does not."""
    for name, times in PUBLISHED.items():
        for count in (n for n in times if n >= 32):
            assert abs(published_fit(without=count).time(name, count) / times[count] - 1) < 0.15
    fit = published_fit()
    assert 1e-6 < fit.link.latency < 2e-5 and 2e10 < fit.link.bandwidth < 1e11
    assert fit.time("doubling", 256) < fit.time("chain", 256) < fit.time("all_gather", 256)
    assert fit.time("chain", 32) < fit.time("doubling", 32)  # not everywhere


def test_what_cannot_be_is_refused():
    for spec, answer in (
        ("zeco:exchange=ring", "chain"),
        ("zeco:pieces=0", "from 1"),
        ("zeco:cluster=x", "no cluster"),
    ):
        with pytest.raises(UserError, match=answer):
            parse(spec)
    assert parse("zeco:exchange=auto,overlap=false").spec == "zeco:exchange=auto,overlap=False"
