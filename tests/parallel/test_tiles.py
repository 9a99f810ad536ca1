# SPDX-License-Identifier: Apache-2.0
"""Tiles of a mask against the mask pair by pair, in any order of tokens; torch's way through them; what they take."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tolerance
from kernels.tile_cases import build, flipped, worst
from manyheads.attention.tile_pattern import PART, WHOLE, TilePattern, pack, unpack
from manyheads.parallel import LAYOUTS, PATTERNS, AttnMask, AttnSlice, layout, pattern
from manyheads.parallel import _partial as part
from manyheads.parallel._tiles import tiles

EXACT = (1e-12, 1e-12)  # float64: the same numbers, added in another order


def dense(made):
    """All pairs, from lists and bits as the kernels read them."""
    seen = torch.zeros(made.rows * 128, made.columns * 128, dtype=torch.bool)
    lists = made.lists()
    for row in range(made.rows):
        _, _, whole, last = lists.spans[0, 0, row].tolist()
        for entry in range(last):
            column = int(lists.indices[0, 0, row, entry])
            tile = torch.ones(128, 128, dtype=torch.bool)
            if entry >= whole:
                tile = unpack(lists.words[int(lists.base[row]) + entry - whole])
            seen[row * 128 : row * 128 + 128, column * 128 : column * 128 + 128] = tile
    return seen


def same(made, want):
    found = dense(made)
    assert torch.equal(found[: made.num_queries, : made.num_keys], want)
    assert not found[made.num_queries :].any() and not found[:, made.num_keys :].any()
    turned = TilePattern(made.state.T, made.transposed().words, made.num_keys, made.num_queries)
    turned._memo["lists"] = made.transposed()
    assert torch.equal(dense(turned), found.T)
    assert sorted(made.lists().order[0, 0, : made.busy].tolist()) == np.flatnonzero(made.state.any(1)).tolist()


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("size", [45, 300])
def test_all_pairs(name, size):
    mask = pattern(name, size, 1)
    for how in LAYOUTS:
        first, other = layout(how, mask, 2).rows
        for rows, tokens in ((first, first), (first, other), (other.flip(0), torch.arange(size))):
            made, want = tiles(mask, rows, tokens), mask.dense(rows, tokens)
            same(made, want)
            again = TilePattern.of(want)  # whole tiles are found to be whole, empty ones to be empty
            assert (made.state == again.state).all() and torch.equal(made.words, again.words)


@st.composite
def lists_of_slices(draw):
    size = draw(st.integers(1, 400))

    def run():
        return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: tuple(sorted(pair)))

    kinds = st.sampled_from(("full", "causal", "inverse", "both"))
    return AttnMask(tuple(draw(st.lists(st.builds(AttnSlice, run(), run(), kinds), max_size=4))), size)


@given(lists_of_slices(), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_any_slices_in_any_order(mask, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = (torch.randperm(mask.size, generator=generator) for _ in range(2))
    if seed % 2:
        rows, tokens = rows.sort().values, tokens[: mask.size // 2].sort().values
    same(tiles(mask, rows, tokens), mask.dense(rows, tokens))


def test_a_slice_less_is_seen():
    """The control: without its last slice, or with another kind of it, the tiles of a mask are others."""
    mask = pattern("document_causal", 700, 1)
    every = torch.arange(700)
    for slices in (mask.slices[:-1], (*mask.slices[:-1], AttnSlice(mask.slices[-1].q, mask.slices[-1].k, "inverse"))):
        other = tiles(AttnMask(slices, 700), every, every)
        with pytest.raises(AssertionError):
            same(other, mask.dense(every, every))


def test_bits():
    seen = torch.rand(3, 5, 128) < 0.5
    assert torch.equal(unpack(pack(seen)), seen) and pack(seen).shape == (3, 5, 4)
    assert pack(torch.arange(32)[None] == 3).item() == 8 and pack(torch.ones(32, dtype=torch.bool)).item() == -1


def test_plans_need_no_room_for_all_pairs():
    """131,072 tokens for one of two processes: 2^33 pairs, tiles of a byte and bits of the few that need them."""
    size = 2**17
    mask = pattern("document_causal", size, 1)
    rows, others = layout("zigzag", mask, 2).rows
    mask.row_areas  # noqa: B018 - what a mask makes once is not counted
    tracemalloc.start()
    made = tiles(mask, rows, others)
    made.transposed()
    made.lists()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(made.words) < 5 * made.rows and made.nbytes < 2**26 and peak < 2**28 < size * size // 32
    whole, bits = (int((made.state == kind).sum()) for kind in (WHOLE, PART))
    inside = int(unpack(made.words).sum())
    assert bits and whole * 128 * 128 + inside == area(mask, rows, others)


def area(mask, rows, tokens):
    """Pairs of these rows and tokens, row by row, from the runs of the mask."""
    of, first, last = mask._spans
    held = np.zeros(mask.size + 1, np.int64)
    held[1:] = np.isin(np.arange(mask.size), tokens.numpy()).cumsum()
    mine = np.isin(of, rows.numpy())
    return int((held[last[mine]] - held[first[mine]]).sum())


@pytest.mark.parametrize("name", PATTERNS)
def test_torch_through_tiles(name):
    for number, how in enumerate(("zigzag", "striped")):
        case = build(name, how, size=450, kv_heads=2, group=2 - number, width=6, columns=4, ranks=3)
        assert worst(case, case.run("auto", dtype=torch.float64), EXACT) <= 1


def test_a_wrong_bit_is_seen():
    case = build(size=300, ranks=1)
    assert worst(case, flipped(case).run("torch", dtype=torch.float64), EXACT) > 1e3


def test_keys_that_none_sees_are_not_read():
    """They may be NaN, and rows that see nothing have 0 and -inf, with gradients of 0."""
    mask = AttnMask((AttnSlice((0, 200), (0, 100)),), 600)
    every = torch.arange(600)
    seen = tiles(mask, every, every)
    q, k = torch.randn(1, 1, 600, 4), torch.randn(1, 1, 600, 4)
    k[:, :, 128:] = torch.nan
    out, lse = part.attend(q, k, k, seen, 1.0)
    assert out.isfinite().all() and not out[:, :, 200:].any() and bool((lse[:, :, 200:] == -torch.inf).all())
    grads = part.attend_back(q, k, k, seen, 1.0, lse, torch.zeros_like(lse), torch.ones_like(out))
    assert all(x.isfinite().all() for x in grads) and not any(x[:, :, 200:].any() for x in grads)
    with_function = part.attend(q[:, :, :200], k[:, :, :100], k[:, :, :100], lambda rows: None, 1.0)
    tolerance.assert_close(out[:, :, :200], with_function[0])
