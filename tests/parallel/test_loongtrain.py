# SPDX-License-Identifier: Apache-2.0
"""LoongTrain: blocks of the double ring, bytes by the formula, checkpointing that computes attention once, sharding."""

import math

import pytest
import torch

import manyheads
from manyheads import UserError
from manyheads.parallel import pattern
from manyheads.parallel._exchanges import Ring
from manyheads.parallel._ledger import Ledger
from manyheads.parallel._peers import Arriving, Peers
from manyheads.parallel.loongtrain import numbers_sent

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from parallel import shared_worker as worker

EXACT, FAR = 1e-10, 1e-3
SCALARS = 64  # bytes: a loss that a thread of gloo has not let go of yet


def visited(contexts, window, rank):
    """Owners of the blocks that a process works on, in order, by the schedule alone."""
    peers = Peers(range(contexts), None, Ledger(rank))
    peers.shift = lambda x, shape, to, source, name: Arriving(x, x, ())
    ring = Ring(peers, torch.arange(contexts)[:, None].unbind(), pattern("causal", contexts), window)
    return [int(rows) for rows, _ in ring.visit(torch.zeros(1, 1))]


@pytest.mark.parametrize(("contexts", "window"), [(4, 1), (4, 2), (4, 4), (8, 2), (8, 4), (6, 3)])
def test_the_double_ring_visits_each_block_once(contexts, window):
    """And in the order of the paper: outer (o - k) mod O, inner (i - j) mod w."""
    for rank in range(contexts):
        outer, inner = divmod(rank, window)
        windows = contexts // window
        order = [
            (outer - k) % windows * window + (inner - j) % window for k in range(windows) for j in range(window)
        ]  # fmt: skip
        assert visited(contexts, window, rank) == order and sorted(order) == list(range(contexts))


def test_the_formula_has_the_volumes_of_the_paper():
    """S = 1M, 32 heads of 128, 32 processes, bf16: MiB of all-to-all and ring by heads, as worked out by hand."""
    for kv, table in {
        32: {1: (0, 15872), 2: (512, 7680), 4: (768, 3584), 8: (896, 1536), 16: (960, 512), 32: (992, 0)},
        8: {1: (0, 3968), 2: (320, 1920), 4: (480, 896), 8: (560, 384), 16: (720, 256), 32: (992, 0)},
    }.items():
        for heads, (moved, ring) in table.items():
            found = numbers_sent(2**20, 32, heads, 32, kv, 128)
            lse = 2**20 // 32 * 32 * (heads - 1) // heads
            assert ((found["all-to-all"] - lse) * 2 / 2**20, found["ring"] * 2 / 2**20) == (moved, ring)
            windowed = numbers_sent(2**20, 32, heads, 32, kv, 128, window=math.gcd(4, 32 // heads))
            assert windowed["ring"] + windowed["ring between windows"] == found["ring"]


@pytest.mark.parametrize("spec", ["loongtrain", "loongtrain:heads=2", "loongtrain:window=2"])
def test_attention_runs_forward_once(processes, spec):
    """Under checkpointing that keeps its output; under torch's own twice. Gradients are the same bits in all three."""
    heads, width, layers, tokens = 4, 8, 3, 2 * 48 // 4
    for found in processes(4).run(worker.checkpointed, spec):
        none, full, kept = (found[name] for name in ("none", "full", "kept"))
        assert none["grads"] and full["grads"] and kept["grads"]
        assert none["forward"] == full["forward"] == kept["forward"] > 0
        assert none["calls"] == kept["calls"] == none["forward"] and full["calls"] == 2 * none["forward"]
        more, all_of_it = kept["held"] - full["held"], none["held"] - full["held"]
        assert abs(more - layers * tokens * heads * (width + 1) * 8) <= SCALARS and 2 * more < all_of_it


def test_a_step_with_sharded_parameters_is_that_of_one_process(processes):
    found = processes(4).run(worker.stepped)
    for one in found:
        assert one["sharded"] <= EXACT and one["wrong"] > FAR and "leave sum_gradients away" in one["added"]
    whole = found[0]["whole"]
    assert sum(one["held"] for one in found) == whole and all(one["held"] < whole / 3 for one in found)


def test_fields():
    assert (
        manyheads.parse("loongtrain:heads=4,window=2,place=context").spec == "loongtrain:heads=4,window=2,place=context"
    )
    for spec in ("loongtrain:heads=0", "loongtrain:window=0", "loongtrain:place=middle"):
        with pytest.raises(UserError):
            manyheads.parse(spec)
