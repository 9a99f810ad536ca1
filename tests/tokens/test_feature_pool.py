# SPDX-License-Identifier: Apache-2.0
"""Features pooled plainly: as many groups as cells, whatever is asked; in models, see test_visual_redundancy."""

import pytest
import torch

import manyheads


@pytest.mark.parametrize("how", ["mean", "first", "random", "similar"])
@pytest.mark.parametrize(("side", "cell"), [(4, 2), (5, 2), (6, 3), (3, 1)])
def test_as_many_groups_as_cells(how, side, cell):
    x = torch.randn(2, side * side, 6, generator=torch.Generator().manual_seed(0))
    grouping, weights = manyheads.parse(f"feature_pool:how={how},cell={cell}").group(x, (side, side), [])
    cells = (-(-side // cell)) ** 2
    assert grouping.count == cells and weights.shape == x.shape[:2]
    for row in grouping.into.tolist():
        assert set(row) - {cells} == set(range(cells))
        assert (cells in row) == (how in ("first", "random") and cell > 1)


def test_the_most_alike_are_merged():
    x = torch.eye(4)[None].repeat_interleave(4, 1)  # four kinds, four of each
    grouping, _ = manyheads.parse("feature_pool:how=similar").group(x, (4, 4), [])
    assert all(len(set(grouping.into[0, 4 * k : 4 * k + 4].tolist())) == 1 for k in range(4))
