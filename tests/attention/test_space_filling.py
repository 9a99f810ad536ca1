# SPDX-License-Identifier: Apache-2.0
"""The generalised Hilbert curve: every cell once, steps to neighbours, and pieces that are compact."""

import itertools

import pytest
import torch

from manyheads.attention.space_filling import hilbert_order


def cells(sizes):
    _, height, width = sizes
    return torch.tensor([(i // (height * width), i // width % height, i % width) for i in hilbert_order(*sizes)])


def steps(at):
    return (at[1:] - at[:-1]).abs()


@pytest.mark.parametrize("sizes", [(8, 8, 8), (4, 6, 10), (1, 8, 12), (1, 1, 7), (3, 5, 7), (2, 9, 4), (21, 30, 52)])
def test_every_cell_once_and_steps_to_neighbours(sizes):
    order = hilbert_order(*sizes)
    total = sizes[0] * sizes[1] * sizes[2]
    assert sorted(order) == list(range(total))
    taken = steps(cells(sizes))
    assert taken.amax() <= 1  # a corner at most
    if all(side % 2 == 0 or side == 1 for side in sizes):
        assert taken.sum(1).amax() <= 1  # never even a corner
    assert (taken.sum(1) > 1).sum() <= total / 10


def test_all_small_boxes():
    for sizes in itertools.product(range(1, 5), range(1, 6), range(1, 6)):
        assert sorted(hilbert_order(*sizes)) == list(range(sizes[0] * sizes[1] * sizes[2]))
        at = cells(sizes)
        assert len(at) == 1 or steps(at).amax() <= 1


def test_pieces_are_compact_where_rows_are_not():
    def spread(at):
        blocks = at.float().unflatten(0, (-1, 64))
        return (blocks - blocks.mean(1, keepdim=True)).square().sum(-1).mean()

    raster = torch.cartesian_prod(*(torch.arange(8) for _ in range(3)))
    assert spread(cells((8, 8, 8))) < spread(raster) / 2
    assert steps(raster).amax() == 7  # which the neighbour test would catch
