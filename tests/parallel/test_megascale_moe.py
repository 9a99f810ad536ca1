# SPDX-License-Identifier: Apache-2.0
"""Experts that processes share: every dispatch is the formula; bytes are counted; what is held and what is summed."""

from math import comb

import pytest
import torch

import manyheads
import manyheads.parallel as mp
from manyheads.errors import UserError
from manyheads.parallel import _compressed as sums
from manyheads.parallel import _experts as experts
from manyheads.parallel import _experts_cost as cost
from manyheads.parallel._cost import CLUSTERS
from manyheads.parallel._remat import rematerialise, saved_bytes
from tolerance import DEEP, FORMULA, error, is_far

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from parallel import forked
from parallel import moe_worker as worker

ROW = 4 * worker.DIM  # bytes of a token where they are counted
MORE = FORMULA * 16  # the same relative to the largest entry, of sums of up to 64 terms there and back


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What the processes left, by how many there were and by rank."""
    return forked.left(worker, tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("ranks", worker.SIZES)
def test_every_dispatch_is_the_formula(left, ranks):
    """Outputs and gradients of tokens, weights and experts, where experts are empty or have all tokens too."""
    found = left[ranks][0]["errors"]
    assert len(found) == 3 * len(worker.cases(ranks))
    assert {name: e for name, e in found.items() if max(e) > MORE} == {}


def test_controls_of_the_dispatch(left):
    """Weights left out, and rows that meet the expert after their own, are wrong by far everywhere."""
    for wrong in ("unweighted", "shifted"):
        assert min(left[4][0][wrong]) > 1e-2


@pytest.mark.parametrize("ranks", (4, 8))
def test_bytes_are_those_of_the_choices(left, ranks):
    """Rows by what each token chose, both ways, forward and back; and what comes with them."""
    for one in left[ranks]:
        for k, found in one["sent"].items():
            for dispatch in experts.DISPATCHES:
                got, rows, back = found[dispatch], found["rows"][dispatch], found["back"][dispatch]
                assert got["tokens"] == got["outputs, back"] == rows * ROW
                assert got["outputs"] == got["tokens, back"] == back * ROW
                assert got["weights"] == rows * 4 * (1 if dispatch == "all_to_all" else int(k))
                assert got.get("choices", 0) == (0 if dispatch == "all_to_all" else rows * 4 * int(k))
            counts = {"all_to_all": 16, "dedupe": ranks, "all_gather": 1}
            assert all(found[d]["counts"] == 8 * (ranks - 1) * n for d, n in counts.items())


def test_rows_that_are_expected_are_counted(left):
    """Means over all tokens; the formula for very many experts is not that of two on each process."""
    for k in (1, 4):
        for dispatch in ("all_to_all", "dedupe"):
            counted = sum(one["sent"][str(k)]["rows"][dispatch] for one in left[8]) / (8 * 512)
            expected = cost.dispatch_rows(dispatch, 16, k, 8)
            assert counted == pytest.approx(expected, rel=0.02)
    many = 7 / 8 * 8 * (1 - (7 / 8) ** 4)
    assert abs(many / cost.dispatch_rows("dedupe", 16, 4, 8) - 1) > 3 * 0.02
    assert cost.dispatch_rows("dedupe", 8000, 4, 8) == pytest.approx(many, rel=1e-3)
    assert cost.dispatch_rows("dedupe", 8, 4, 8) == pytest.approx(cost.dispatch_rows("all_to_all", 8, 4, 8))


@pytest.mark.parametrize("ranks", worker.SIZES)
def test_attention_by_heads_sends_the_derived_share(left, ranks):
    """(1 + 1/m) / n of attention by split weights, m = 2, and not twice that; no process sends more than another."""
    for one in left[ranks]:
        share = one["attention"]["heads"] / one["attention"]["split"]
        rows, split = cost.attention_rows(ranks, 2)[::-1], cost.attention_rows(ranks, 2)[0]
        assert share == pytest.approx((1 + 1 / 2) / ranks) == pytest.approx(rows[0] / split)


def test_gradients_of_what_is_computed_again_are_the_same_bits(left):
    for one in left[4]:
        for found in one["blocks"].values():
            assert all(found[held]["equal"] and found[held]["moved"] for held in ("all", "products", "values"))


def test_bytes_held_are_those_of_the_formula(left):
    """Exactly, of unequal numbers of tokens and rows; by itself autograd holds much more."""
    for one in left[4]:
        for found in one["blocks"].values():
            assert all(found[held]["bytes"] == found[held]["wanted"] for held in ("products", "values"))
            assert found["values"]["bytes"] < found["products"]["bytes"] < 0.545 * found["all"]["bytes"]
            assert all(0 <= held["alive"] - held["bytes"] < 64 for held in found.values())  # nothing else stays


def test_what_is_kept_is_not_run_again():
    """A marked operation runs once, others twice; of both gradients are right, and of a wrong replay not."""
    torch.manual_seed(0)
    x, w = (torch.randn(6, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    runs = {"kept": 0, "again": 0}

    def count(name, y):
        runs[name] += 1
        return y

    def block(keep, x):
        y = count("again", ((x @ w).tanh() @ w).tanh().sin())
        a, b = keep(lambda y: count("kept", (y.exp(), y * y)), y)
        return keep(torch.mul, a, b)

    want = torch.autograd.grad(block(lambda f, *args: f(*args), x).sum(), (x, w))
    runs.update(kept=0, again=0)
    got = torch.autograd.grad(rematerialise(block, x, parameters=(w,)).sum(), (x, w))
    assert runs == {"kept": 1, "again": 2}
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    plain, _ = saved_bytes(lambda: block(lambda f, *args: f(*args), x), (w,))
    held, _ = saved_bytes(lambda: rematerialise(block, x, parameters=(w,)), (w,))
    assert held == 4 * x.nbytes < plain  # its input, two kept results, its own

    def drifting(keep, x):
        runs["again"] += 1
        return keep(torch.mul, (x @ w) * runs["again"], x)

    runs["again"] = 0
    first = torch.autograd.grad(((x @ w) * x).sum(), (x, w))
    wrong = torch.autograd.grad(rematerialise(drifting, x, parameters=(w,)).sum(), (x, w))
    assert is_far(wrong[0], first[0])


def test_tokens_travel_meanwhile(left):
    """What needs no tokens is computed when they have left; its gradient, when theirs have; outputs are added."""
    for one in left[4]:
        for found in one["overlap"].values():
            forward, back = map(set, found["seen"])
            assert "tokens" in forward and "outputs" not in forward
            assert {"outputs, back", "tokens, back"} <= back and found["error"] <= MORE


@pytest.mark.parametrize("ranks", worker.SIZES)
def test_sums_in_few_bits(left, ranks):
    """Half the bytes of a float32 reduce-scatter, one rounding, and what one process makes of all parts."""
    for one in left[ranks]:
        found, numbers = one["sums"], 256 * (ranks - 1)
        assert all(found[kind]["same"] for kind in sums.FORMATS)
        assert found["plain"]["bytes"] == found["float32"]["bytes"] == 2 * found["bfloat16"]["bytes"] == 4 * numbers
        assert found["float8"]["bytes"] == numbers + 4 * numbers // 128
        assert max(found["float32"]["error"], found["plain"]["error"]) < 1e-6
        assert 8e-4 < found["bfloat16"]["error"] < 4e-3 and 1e-2 < found["float8"]["error"] < 5e-2
        assert found["bfloat16"]["all"] < 4e-3 and found["float32"]["all"] < 1e-6


def test_outputs_summed_in_few_bits(left):
    """Float32 is the reduce-scatter; the others err by their rounding, there and back, and send what they say."""
    lengths = [worker.TOKENS + rank for rank in range(4)]
    for rank, one in enumerate(left[4]):
        found, others = one["few bits"], sum(lengths) - lengths[rank]
        assert max(found["float32"]["errors"]) < 1e-6
        assert all(5e-4 < e < 4e-3 for e in found["bfloat16"]["errors"])
        assert all(5e-3 < e < 5e-2 for e in found["float8"]["errors"])
        for kind, row in (("float32", 4 * worker.DIM), ("bfloat16", 2 * worker.DIM), ("float8", worker.DIM + 4)):
            assert found[kind]["sent"] == [others * row, 3 * max(lengths) * row]


def test_hook_of_ddp(left):
    """The mean over processes within a rounding to bfloat16, the same bits in all; fewer bytes than float32."""
    for one in left[4]:
        found, padded = one["hook"], 512
        assert found["error"] < 2**-8 and found["same"] and found["numbers"] <= padded
        assert found["bytes"] == {"all-gather, float32": 3 * padded, "reduce-scatter, bfloat16": 3 * padded // 2}


@pytest.mark.parametrize("ranks", worker.SIZES)
def test_one_line_on_a_mixtral(left, ranks):
    """Logits, loss and summed gradients of the model as it is; each process uses its experts alone; no trace stays."""
    for one in left[ranks]:
        for dispatch in ("auto", "dedupe", "all_gather"):
            found = one["models"][dispatch]
            assert max(found[name] for name in ("logits", "loss", "gradients")) <= DEEP * 4
            assert found["unsummed"] > 1e-2 and found["others"] == 0 and found["sent"] > 0
            assert found["restored"] and found["after"] == 0
    if ranks == 2:
        assert left[2][0]["models"]["generated"]
    if ranks == 8:
        few, none = left[8][0]["models"]["refused"]
        assert "4 experts cannot be shared by 8 processes" in few and "shares experts, and LlamaForCausalLM" in none


def test_error_does_not_grow_with_the_processes():
    """Relative errors of sums of gradients: flat; those of a ring that rounds at each hop grow, and are larger."""
    found = {}
    for n in (8, 64):
        draws = torch.Generator().manual_seed(n)
        parts = torch.randn(n, 1 << 14, generator=draws) * torch.randn(1 << 14, generator=draws).exp()
        exact = parts.double().sum(0)
        for kind in ("bfloat16", "float8"):
            found[kind, n] = error(sums.decode(sums.encode(parts, kind)).sum(0), exact)
            found[kind, n, "ring"] = error(sums.ring_sum(parts, kind), exact)
    for kind, flat in (("bfloat16", 1.66e-3), ("float8", 2.3e-2)):
        assert found[kind, 8] == pytest.approx(flat, rel=0.3) and found[kind, 64] == pytest.approx(flat, rel=0.3)
        assert found[kind, 64, "ring"] > 1.5 * found[kind, 8, "ring"] > 1.5 * 2 * found[kind, 8]
    assert torch.equal(sums.decode(sums.encode(torch.zeros(2, 256), "float8")), torch.zeros(2, 256))


def test_choice_of_dispatch():
    """Few experts: all-to-all, as ranks repeat without duplicates; many on each: one row a process; skewed: gather."""
    assert mp.choose_dispatch(8, 2, 8) == "all_to_all" and mp.choose_dispatch(64, 8, 8) == "dedupe"
    assert [cost.crossover(64, 8, imbalance=skew) for skew in (1.0, 1.25)] == [9, 7]
    assert mp.choose_dispatch(8, 7, 8, imbalance=1.25) == "all_gather" and mp.choose_dispatch(8, 1, 1) == "all_to_all"
    link, row = CLUSTERS["h100"], {"tokens": 65536, "row": 8192}
    times = {d: cost.dispatch_time(d, 64, 4, 8, cluster=link, **row) for d in experts.DISPATCHES}
    sent = {d: 2 * 65536 * 8192 * cost.dispatch_rows(d, 64, 4, 8) / link.within.bandwidth for d in times}
    assert all(1 < times[d] / sent[d] < 1.02 for d in times)  # latencies and what comes with rows are little
    assert cost.dispatch_rows("dedupe", 11, 3, 4) == pytest.approx(  # unequal shares: 2, 3, 3 and 3 experts
        3 / 4 * (4 - (comb(9, 3) + 3 * comb(8, 3)) / comb(11, 3))
    )


def test_balance_loss():
    """1 where processes get alike, their number where one gets all; the Switch loss where each has one expert."""
    first, even = [0, 2, 4], torch.full((6, 4), 0.25)
    index = torch.tensor([[0, 2], [1, 3]] * 3)
    assert float(experts.balance_loss(even, index, first)) == pytest.approx(1)
    one = torch.eye(4)[[0, 1] * 3]
    assert float(experts.balance_loss(one, one.argmax(1)[:, None], first)) == pytest.approx(2)
    torch.manual_seed(0)
    p = torch.randn(50, 4).softmax(1)
    chosen = p.topk(2).indices
    switch = 4 * (chosen.flatten().bincount(minlength=4) / 100 * p.mean(0)).sum()
    assert float(experts.balance_loss(p, chosen, [0, 1, 2, 3, 4])) == pytest.approx(float(switch), rel=1e-5)
    assert float(experts.balance_loss(p, chosen, first)) != pytest.approx(float(switch), rel=1e-3)


def test_the_strategy():
    strategy = manyheads.parse("megascale_moe:dispatch=dedupe,heads=2")
    assert strategy.spec == "megascale_moe:dispatch=dedupe,heads=2"
    for wrong in ("dispatch=sideways", "cluster=b300", "imbalance=0.5", "sums=float8"):
        with pytest.raises(UserError):
            manyheads.parse(f"megascale_moe:{wrong}")
    with pytest.raises(UserError, match="between 1 and all 8"):
        mp.choose_dispatch(8, 9, 8)
