# SPDX-License-Identifier: Apache-2.0
"""Attention that processes share: exact for every mask, layout, exchange and grid; bytes by the formulas."""

import pytest
import torch

import manyheads.parallel as mp
from manyheads.errors import UserError
from manyheads.parallel import _partial as part

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("needs torch.distributed with gloo", allow_module_level=True)

from parallel import context_worker as worker
from parallel import forked

EXACT = 1e-12  # float64: the same numbers, added in another order
ITEM, TOKENS = 8, 16  # bytes of a number, tokens of a process where bytes are counted
KV = worker.BATCH * worker.KV_HEADS * (worker.WIDTH + worker.VALUES) * TOKENS * ITEM  # keys and values of a process


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What the processes left, by how many there were and by rank."""
    return forked.left(worker, tmp_path_factory.mktemp("context"))


@pytest.mark.parametrize("ranks", worker.SIZES)
def test_every_combination_is_exact(left, ranks):
    found = left[ranks][0]["errors"]
    assert len(found) == len(mp.PATTERNS) * len(list(worker.ways(ranks)))
    assert {name: e for name, e in found.items() if max(e) > EXACT} == {}
    assert max(left[ranks][0]["own layout"]) <= EXACT


def test_controls(left):
    """A ring that takes blocks for others is wrong by far, forward and backward."""
    for ranks in worker.SIZES:
        if "control" in left[ranks][0]:
            assert min(left[ranks][0]["control"]) > 1e-2
    assert "control" in left[2][0]


def test_errors_in_half_precision_do_not_grow_with_the_processes(left):
    """Parts are added in float32: what remains is the rounding of what goes in and out."""
    first, *others = (left[ranks][0]["bf16"] for ranks in worker.SIZES)
    for other in others:
        assert all(b <= 1.05 * a + 1e-6 for a, b in zip(first, other, strict=True))
    assert 1e-4 < first[2] < 0.1


@pytest.mark.parametrize("ranks", worker.SIZES)
def test_bytes_are_those_of_the_formulas(left, ranks):
    for one in left[ranks]:
        found = one["bytes"]
        for way in ("ring, {}", "all_gather, {}"):
            (name,) = found[way]["forward"]
            assert found[way]["forward"][name][0] == (ranks - 1) * KV
        ring = found["ring, {}"]["both"]
        assert ring["ring, back"][0] == (ranks - 1) * KV and ring["ring, gradients"][0] == ranks * KV
        assert found["all_gather, {}"]["both"]["all-gather, gradients"][0] == (ranks - 1) * KV
        heads, kv = worker.HEADS, max(worker.KV_HEADS, ranks)
        numbers = heads * (worker.WIDTH + worker.VALUES + 1) + kv * (worker.WIDTH + worker.VALUES)
        ulysses = found[f"ring, {{'heads': {ranks}}}"]["forward"]
        assert ulysses["all-to-all"][0] == worker.BATCH * TOKENS * ITEM * numbers * (ranks - 1) // ranks
        if ranks > 2:
            double = found["ring, {'window': 2}"]["forward"]
            assert double["ring"][0] == ranks // 2 * KV
            assert double["ring between windows"][0] == (ranks // 2 - 1) * KV
            assert double["ring"][1] == 0 and double["ring between windows"][1] == double["ring between windows"][0]
            grid = found["ring, {'heads': 2}"]["forward"]
            assert grid["all-to-all"][1] == 0 < grid["all-to-all"][0] and grid["ring"][1] == grid["ring"][0]


def test_only_needed_rows_are_cast(left):
    mask = mp.pattern("document_causal", worker.SIZE, seed=1)
    for ranks in worker.SIZES:
        told = mp.balance(mask, mp.layout("contiguous", mask, ranks))
        asked = sum(one["asked"] for one in left[ranks])
        assert asked == round(told.moved * (ranks - 1) * worker.SIZE) < (ranks - 1) * worker.SIZE


def test_parts_put_together_are_the_whole():
    """Two halves of the keys, one of which some rows see nothing of; rows that see nothing at all have 0."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 7, 4, dtype=torch.float64) for h in (4, 2, 2))
    seen = torch.rand(7, 7) < 0.4
    seen[1, :3] = seen[2] = False
    want, lse = worker.reference(q, k, v, seen)
    parts = [
        part.attend(q, k[:, :, at], v[:, :, at], lambda rows, at=at: seen[rows, at], 0.5)
        for at in (slice(3), slice(3, 7))
    ]
    out, found = part.merge(*parts)
    assert (out - want).abs().max() < 1e-14 and torch.equal(found.isinf(), lse.isinf())
    known = lse.isfinite()
    assert (found - lse)[known].abs().max() < 1e-14 and not out[:, :, 2].any()
    assert (sum(o for o, _ in parts) - want).abs().max() > 0.1  # the control: parts just added


def test_what_cannot_be_shared_is_refused():
    mask = mp.pattern("causal", 8)
    with pytest.raises(UserError, match="start with torchrun"):
        mp.World()
    with pytest.raises(UserError, match="no layout 'spiral'"):
        mp.layout("spiral", mask, 2)
    with pytest.raises(UserError, match="cannot be shared by 9 processes"):
        mp.layout("zigzag", mask, 9)
    with pytest.raises(UserError, match="every token once"):
        mp.Layout((torch.arange(3), torch.arange(2, 5)))
