# SPDX-License-Identifier: Apache-2.0
"""Groupings on a grid: against loops, edges, ties, what is nearby, and the prefix that stays alone."""

import pytest
import torch

from manyheads.attention.grid_merging import behind, matched_cells, pooled_cells
from manyheads.attention.merging import Grouping
from tolerance import FORMULA, assert_close

GRIDS = [(4, 4), (5, 7), (4, 9), (3, 2)]


def drawn(grid, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, grid[0] * grid[1], 5, generator=generator, dtype=torch.float64)


def literal(metric, grid, cell, joins, reach=0, tie=-1):
    """One row by loops: the group of each token, groups in the order of the tokens that stay."""
    height, width = grid
    unit = metric / metric.norm(dim=1, keepdim=True)
    rows, columns = height // cell, width // cell
    targets = [i * cell * width + j * cell for i in range(rows) for j in range(columns)]
    wanted = []
    for t in range(height * width):
        if t in targets:
            continue
        at = min(t // width // cell, rows - 1), min(t % width // cell, columns - 1)
        near = [
            (round(4096 * float(unit[t] @ unit[u])), tie * n, u)
            for n, u in enumerate(targets)
            if not reach or max(abs(n // columns - at[0]), abs(n % columns - at[1])) <= reach
        ]
        score, _, u = max(near)
        wanted.append((-score, t, u))
    joined = {t: u for _, t, u in sorted(wanted)[:joins]}
    stays = [t for t in range(height * width) if t not in joined]
    return [stays.index(joined.get(t, t)) for t in range(height * width)]


@pytest.mark.parametrize("reach", [0, 1])
@pytest.mark.parametrize("grid", GRIDS)
def test_matching_is_loops(grid, reach):
    cell = 2
    x = drawn(grid)
    for joins in (0, 1, grid[0] * grid[1] // 2, 10**6):
        got = matched_cells(x, grid, cell, joins, reach=reach)
        for row, into in zip(x, got.into, strict=True):
            want = literal(row, grid, cell, joins, reach)
            assert into.tolist() == want
            assert got.count == max(want) + 1
    assert got.count == (grid[0] // 2) * (grid[1] // 2)  # all that can join have


def test_a_reach_over_the_whole_grid_is_none_and_a_small_one_is_not():
    x = drawn((8, 8), seed=3)
    whole, wide, near = (matched_cells(x, (8, 8), 2, 30, reach=reach).into for reach in (0, 3, 1))
    assert torch.equal(whole, wide)
    assert not torch.equal(whole, near)


def test_ties_go_to_earlier_cells_and_a_control_to_later_ones_is_told_apart():
    x = torch.ones(1, 24, 3, dtype=torch.float64)
    got = matched_cells(x, (4, 6), 2, 9).into[0].tolist()
    assert got == literal(x[0], (4, 6), 2, 9)
    assert got != literal(x[0], (4, 6), 2, 9, tie=1)


def test_random_joins_stay_in_their_cell_and_do_not_look():
    x = drawn((6, 6))
    one, other = (matched_cells(y, (6, 6), 3, 20, choose="random").into for y in (x, x.flip(1)))
    assert torch.equal(one, other)
    cells = pooled_cells(2, (6, 6), 3).into
    for group in one[0].unique():
        assert len(cells[0][one[0] == group].unique()) == 1
    looked = matched_cells(x, (6, 6), 3, 20).into
    assert any(len(cells[0][looked[0] == group].unique()) > 1 for group in looked[0].unique())


@pytest.mark.parametrize("grid", GRIDS)
def test_pooling_is_that_of_torch_with_ceil_mode(grid):
    x = drawn(grid)
    pooled = pooled_cells(2, grid, 2)
    image = x.mT.unflatten(2, grid)
    want = torch.nn.functional.avg_pool2d(image, 2, ceil_mode=True, count_include_pad=False)
    got = pooled.reduce(x, torch.ones(x.shape[:2], dtype=x.dtype))
    assert_close(got, want.flatten(2).mT, FORMULA)
    near = torch.nn.functional.interpolate(want, size=grid)  # nearest, as the released code unmerges
    assert_close(pooled.restore(got), near.flatten(2).mT, FORMULA)


def test_a_prefix_stays_alone():
    inner = Grouping(torch.tensor([[0, 1, 0]]), 2)
    assert behind(0, inner) is inner
    got = behind(2, inner)
    assert got.into.tolist() == [[0, 1, 2, 3, 2]] and got.count == 4
