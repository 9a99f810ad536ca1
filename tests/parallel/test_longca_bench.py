# SPDX-License-Identifier: Apache-2.0
"""What is counted of shared attention is what runs; what is modelled follows from it; the verb says both."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import manyheads
from manyheads.cli import app
from manyheads.errors import UserError
from manyheads.experiment import RunContext
from manyheads.experiment.subjects import Processes as Subject
from manyheads.parallel import LAYOUTS, PATTERNS, AttnMask, AttnSlice, Processes, layout, pattern
from manyheads.parallel import _areas as areas
from manyheads.parallel._cost import ASSUMED, CLUSTERS, Cluster, Efficiency, Link, predict
from manyheads.parallel._counts import Shape, count
from manyheads.parallel._masks import _width, global_window
from manyheads.parallel._methods import METHODS
from manyheads.tasks.parallel.context_attention import ARMS, ContextAttention
from manyheads.tasks.parallel.modelled_attention import published_global_window

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from parallel import processes_worker as worker

RANKS, SIZE, HEADS, KV_HEADS, WIDTH = 4, 61, 8, 2, 6
SHAPE = Shape(HEADS, KV_HEADS, WIDTH, batch=2, itemsize=4)
EVEN = Efficiency((1, 2), (1.0, 1.0), "of the test")
CASES = [(mask, method, node) for mask in ("causal", "shared_question") for method in METHODS for node in (0, 2)]


def counted(mask, method, node=0, ranks=RANKS, shape=SHAPE):
    given = METHODS[method].given(ranks, node, shape.kv_heads)
    return count(mask, ranks, given.pop("layout"), shape, **given)


def dense(mask, owner, ranks):
    """Pairs and needed keys between processes, by the matrix of all pairs."""
    every = torch.arange(mask.size)
    seen, owned = mask.dense(every, every).numpy(), [owner == r for r in range(ranks)]
    pairs = np.array([[seen[q][:, k].sum() for k in owned] for q in owned])
    return pairs, np.array([[seen[q].any(0)[k].sum() for k in owned] for q in owned])


@pytest.mark.parametrize("name", PATTERNS)
def test_pairs_and_keys_are_those_of_the_matrix(name):
    for how, size in itertools.product(LAYOUTS, (45, 200)):
        mask = pattern(name, size, 1)
        given = layout(how, mask, RANKS)
        runs = areas.Runs.of(given)
        pairs, keys = dense(mask, given.owner.numpy(), RANKS)
        assert (areas.pairs(mask, runs) == pairs).all() and (areas.needed(mask, runs, runs) == keys).all()
        assert areas.row_pairs(mask, runs).sum() == mask.area
        evenly, asked = areas.pairs(mask, runs, 0), areas.needed(mask, runs, runs, 0)
        assert np.abs(evenly.sum(1) - pairs.sum(1)).max() <= RANKS * len(mask.slices)  # roundings
        assert np.abs(asked.sum(1) - keys.sum(1)).max() <= RANKS and (asked.diagonal() == keys.diagonal()).all()


def test_slices_that_overlap_count_once():
    three = AttnMask(
        (AttnSlice((0, 30), (0, 20)), AttnSlice((10, 40), (5, 35), "causal"), AttnSlice((0, 40), (0, 40), "both")), 40
    )
    given = layout("zigzag", three, RANKS)
    pairs, _ = dense(three, given.owner.numpy(), RANKS)
    assert (areas.pairs(three, areas.Runs.of(given)) == pairs).all()
    apart = sum(AttnMask((one,), 40).area for one in three.slices)
    assert apart > three.area  # the control: they do overlap


def test_bytes_of_the_formulas_are_those_of_the_ledger():
    with Processes(RANKS) as pool:
        found = pool.run(worker.sent, CASES, SIZE, HEADS, KV_HEADS, WIDTH)
    for number, (name, method, node) in enumerate(CASES):
        counts = counted(pattern(name, SIZE, 1), method, node)
        for way in (0, 1):
            said = {}
            for sent in (counts.sent(False), counts.sent(True))[: way + 1]:
                for kind, matrix in sent.items():
                    for of, to in zip(*np.nonzero(matrix), strict=True):
                        said[of, kind, to] = said.get((of, kind, to), 0) + matrix[of, to]
            ledger = {(r, *key): n for r, one in enumerate(found) for key, n in one[number][way].items()}
            assert said == ledger, (name, method, node, way)
        assert counts.total() == sum(sum(one[number][1].values()) for one in found)
        assert counts.total(node=node) == sum(one[number][2] for one in found) or not node
        assert counts.least() <= counts.total()
    cast = counted(pattern("shared_question", SIZE, 1), "group_cast")
    assert (
        cast.least() == cast.total() and counted(pattern("shared_question", SIZE, 1), "ring").least() < cast.total() * 9
    )


def test_time_is_the_longer_of_computing_and_sending_at_each_step():
    """By hand, for a full mask of two processes, links and rates of round numbers."""
    place = Cluster(Link(1.0, 100.0), Link(5.0, 10.0), 2, 1000.0, launch=0.0)
    shape = Shape(2, 2, 2, itemsize=4)
    mask = pattern("full", 8)
    block, pairs = 4 * 2 * 4 * 4, 16 * 2 * 4 * 2  # bytes of four tokens' keys and values, operations of 4 x 4 pairs
    compute, send = pairs / 1000, 1 + block / 100
    wide = send  # float32 gradients are as wide
    ring = predict(counted(mask, "ring", ranks=2, shape=shape), place, EVEN)
    assert ring.forward == pytest.approx([max(compute, send) + compute] * 2)
    assert ring.backward == pytest.approx([max(2.5 * compute, send) + 2.5 * compute + 2 * wide] * 2)
    gather = predict(counted(mask, "all_gather", ranks=2, shape=shape), place, EVEN)
    assert gather.forward == pytest.approx([send + 2 * compute] * 2)
    cast = predict(counted(mask, "group_cast", ranks=2, shape=shape), place, EVEN)
    assert cast.forward == pytest.approx(ring.forward)
    apart = predict(
        counted(mask, "ring", ranks=2, shape=shape), Cluster(Link(1.0, 100.0), Link(5.0, 10.0), 1, 1000.0, 0.0), EVEN
    )
    assert apart.forward == pytest.approx([max(compute, 5 + block / 10) + compute] * 2)
    half = predict(counted(mask, "ring", ranks=2, shape=shape), place, Efficiency((1, 2), (0.5, 0.5), ""))
    assert half.forward == pytest.approx([max(2 * compute, send) + 2 * compute] * 2)
    heads = predict(counted(mask, "ulysses", ranks=2, shape=shape), place, EVEN)
    moved = counted(mask, "ulysses", ranks=2, shape=shape).sent(False)["all-to-all"].sum(1)[0]
    assert heads.forward == pytest.approx([1 + moved / 100 + 2 * compute] * 2)
    causal = predict(counted(pattern("causal", 512), "group_cast", ranks=4), CLUSTERS["h100"])
    assert causal.slowest() == (causal.forward + causal.backward).max() > causal.slowest(False)


def test_efficiency_falls_with_the_length_of_a_piece():
    shares = ASSUMED(np.array([1.0, 16.0, 64.0, 500.0, 1e6]))
    assert (np.diff(shares) > 0).all() and shares[-1] == max(ASSUMED.shares) and shares[2] == ASSUMED.shares[0]


def test_a_thousand_processes_without_a_matrix_of_tokens():
    mask = pattern("causal", 1 << 20)
    counts = counted(mask, "loongtrain", 8, ranks=256, shape=Shape(64, 8))
    assert counts.area == (1 << 20) * ((1 << 20) + 1) // 2
    ideal = counts.flops / 256 / 989e12 / max(ASSUMED.shares)
    assert ideal < predict(counts, CLUSTERS["h100"]).slowest(False) < 3 * ideal


def test_published_slices_of_global_windows_tell_half_of_the_area():
    shares = [
        published_global_window(n, w).area / global_window(n, w).area
        for n, w in ((4096, 1310), (16384, 5239), (49152, 10477))
    ]
    assert [round(share, 3) for share in shares] == [0.551, 0.551, 0.526]
    every = torch.arange(60)
    assert published_global_window(60, 12).area == int(published_global_window(60, 12).dense(every, every).sum())


def test_a_strategy_takes_the_way_that_is_modelled_to_be_the_fastest():
    chosen = manyheads.parse("longca_bench:node=2,heads=8,kv_heads=2")
    ranked = chosen.ranked(pattern("causal", 256), RANKS)
    assert {name for name, *_ in ranked} == set(METHODS) and ranked == sorted(ranked, key=lambda one: one[1])
    few = manyheads.parse("longca_bench:heads=2,kv_heads=1").ranked(pattern("causal", 256), RANKS)
    assert "ulysses" not in {name for name, *_ in few} and few
    with pytest.raises(UserError, match="cannot be shared by 4"):
        manyheads.parse("longca_bench:method=ulysses,heads=2,kv_heads=1").ranked(pattern("causal", 256), RANKS)
    for wrong in ("cluster=mainframe", "method=pigeons"):
        with pytest.raises(UserError, match="there is no"):
            manyheads.parse(f"longca_bench:{wrong}")


def test_the_patterns_are_fourteen_and_prefixes_strict():
    assert len(PATTERNS) == 14
    (first, rest) = pattern("prefix", 100, 3).slices
    p = first.k[1]
    seen = pattern("prefix", 100, 3).dense(torch.tensor([0, p - 1]), torch.arange(100))
    assert seen[0].sum() == p and rest.q[0] == p  # keys before p, and none more
    assert _width(1 << 20) == 1024


def test_verb_measures_refuses_and_goes_on(tmp_path):
    run = CliRunner().invoke
    given = [
        "parallel",
        "--tokens",
        "64",
        "--masks",
        "document_causal",
        "--methods",
        "ulysses,group_cast,usp",
        "--heads",
        "6",
    ]
    given += [
        "--kv-heads",
        "2",
        "--width",
        "8",
        "--backward",
        "--node",
        "2",
        "--rounds",
        "1",
        "--json",
        "--out",
        str(tmp_path / "r"),
    ]
    done = run(app, given)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    rows = {row["method"]: row for row in found["rows"]}
    assert rows["ulysses"]["why"] == "not supported: 6 heads with 2 of keys cannot be shared by 4 processes"
    for name in ("group_cast", "usp"):
        assert rows[name]["error"] < 1e-4 and rows[name]["formula_gap"] == 0 and rows[name]["imbalance"] >= 1
        assert rows[name]["sent"] >= rows[name]["least"] > 0 and rows[name]["slowest"] >= rows[name]["mean"] > 0
    page = (tmp_path / "r" / "report.html").read_text()
    assert "group_cast" in page and "not supported: 6 heads" in page and "//" not in page.replace("</", "")
    again = run(app, ["parallel", "--resume", str(tmp_path / "r"), "--json"])
    assert json.loads(again.stdout)["rows"] == found["rows"]  # read, not measured once more


def test_verb_models_worlds_that_are_not_here(tmp_path):
    done = CliRunner().invoke(app, ["parallel", "--model-only", "--world", "64", "--tokens", "64k", "--masks", "causal",
                                    "--methods", "ring,ulysses,usp", "--heads", "32", "--json"])  # fmt: skip
    rows = {row["method"]: row for row in json.loads(done.stdout)["rows"]}
    assert "cannot be shared by 64" in rows["ulysses"]["why"] and rows["usp"]["heads"] == 8
    assert 0 < rows["usp"]["modelled_mean"] <= rows["usp"]["modelled"] and math.isfinite(rows["ring"]["rate"])
    curve = tmp_path / "curve.json"
    given = [
        "parallel",
        "--model-only",
        "--world",
        "8",
        "--tokens",
        "8k",
        "--masks",
        "full",
        "--efficiency",
        str(curve),
    ]
    curve.write_text(json.dumps({"curve": {"lengths": [64, 128], "shares": [0.01, 0.02]}}))
    shown = CliRunner().invoke(app, [*given, "--out", str(tmp_path)])
    assert "Modelled, not measured" in shown.output and "measured, curve.json" in shown.output
    assert "Nothing here was measured" in (tmp_path / "report.html").read_text()
    slow = json.loads(CliRunner().invoke(app, [*given, "--json"]).stdout)["rows"]
    assert all(row["rate"] < 0.02 * 989 for row in slow)
    curve.write_text("{}")
    assert "holds no curve" in str(CliRunner().invoke(app, given).exception)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--masks", "plaid"], "no mask 'plaid'"), (["--methods", "pigeons"], "no method 'pigeons'"),
        (["--tokens", "many"], "a number of tokens is"), (["--dtype", "int3"], "no dtype 'int3'"),
        (["--world", "9", "--tokens", "8"], "cannot be shared by 9"), (["--backend", "mpi"], "no backend 'mpi'"),
        (["--model-only", "--backend", "gloo"], "leave --backend away"),
        (["--efficiency", "x.json"], "goes with --model-only"),
        (["--model-only", "--cluster", "abacus"], "no cluster 'abacus'"),
    ],
)  # fmt: skip
def test_verb_says_what_is_wrong_in_one_line(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["parallel", *given])
    assert done.exit_code != 0
    assert isinstance(done.exception, UserError) and said in str(done.exception) and "\n" not in str(done.exception)


def test_out_of_memory_is_no_lack_of_support(monkeypatch):
    from manyheads.tasks.parallel import context_attention as task

    class Full:
        def run(self, function, *args):
            raise RuntimeError("process 1:\ntorch.OutOfMemoryError: CUDA out of memory")

    monkeypatch.setattr(task, "processes", lambda *given: Full())
    some = ContextAttention(masks=("causal",), tokens=64)
    run = RunContext(Subject(), ARMS[:1])
    (row,) = some.measure(run, some.units(run)[0])
    assert row.metric == "ran" and row.value == 0 and row.about["why"] == "out of memory"
