# SPDX-License-Identifier: Apache-2.0
"""Rings, positions and masks of images, counted by hand."""

import pytest
import torch

from manyheads.attention.image_layout import ImageLayout, block_mask, block_positions, ranks


def layout(blocks, length, real=None):
    made = torch.ones(1, length, dtype=torch.bool) if real is None else real
    return ImageLayout.of(made, blocks)


def square(height, width):
    return layout([(0, 0, height, width)], height * width)


def test_rings_of_24_by_24_are_those_of_the_paper():
    rank, size = ranks(square(24, 24), "ring")
    assert torch.bincount(rank[0]).tolist() == list(range(92, 0, -8))
    assert int(size[0, 0]) == 12 and int(rank.max()) == 11
    allowed = block_mask(square(24, 24), 576, rank)
    assert round(float(allowed.float().mean()), 3) == 0.555
    raster = block_mask(square(24, 24), 576, ranks(square(24, 24), "raster")[0])
    assert round(float(raster.float().mean()), 3) == 0.501
    after = 12  # the first word after the image
    assert round(float((after - rank).float().mean()), 2) == 8.49


@pytest.mark.parametrize(
    ("size", "rings"),
    [
        ((1, 1), [[0]]),
        ((3, 5), [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]]),
        ((4, 2), [[0, 0], [0, 0], [0, 0], [0, 0]]),
        ((5, 5), [[0] * 5, [0, 1, 1, 1, 0], [0, 1, 2, 1, 0], [0, 1, 1, 1, 0], [0] * 5]),
    ],
)
def test_grids_that_are_odd_or_not_square(size, rings):
    rank, count = ranks(square(*size), "ring")
    assert rank.view(size).tolist() == rings
    assert int(count[0, 0]) == max(map(max, rings)) + 1


def test_the_mask_within_an_image_is_a_total_preorder_alike_under_the_symmetries_of_the_square():
    rank = ranks(square(5, 5), "ring")[0]
    allowed = block_mask(square(5, 5), 25, rank)[0]
    assert allowed.diagonal().all() and (allowed | allowed.T).all()
    assert not ((allowed.float() @ allowed.float() > 0) & ~allowed).any()
    grid = torch.arange(25).view(5, 5)
    for turned in (grid.rot90(), grid.T, grid.flip(0)):
        at = turned.flatten()
        assert torch.equal(allowed[at][:, at], allowed)
    raster = block_mask(square(5, 5), 25, ranks(square(5, 5), "raster")[0])[0]
    at = grid.rot90().flatten()
    assert not torch.equal(raster[at][:, at], raster)  # control


def test_each_image_shifts_what_follows_by_its_own_amount():
    found = layout([(0, 1, 3, 3), (0, 11, 1, 2)], 14)
    positions = block_positions(found, *ranks(found, "ring"))
    assert positions.tolist() == [[0, 1, 1, 1, 1, 2, 1, 1, 1, 1, 3, 4, 4, 5]]
    raster = block_positions(found, *ranks(found, "raster"))
    assert raster.tolist() == [list(range(14))]
    reverse = block_positions(found, *ranks(found, "reverse"))
    assert reverse.tolist() == [[0, *range(9, 0, -1), 10, 12, 11, 13]]


def test_images_side_by_side_are_told_apart_and_later_ones_are_not_seen():
    found = layout([(0, 0, 1, 2), (0, 2, 1, 2)], 4)
    assert found.image.tolist() == [[0, 0, 1, 1]] and found.seen.tolist() == [[0, 0, 1, 1]]
    allowed = block_mask(found, 4, torch.zeros(1, 4))[0].int()
    assert allowed.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_padding_takes_no_position_and_is_seen_by_itself_alone():
    real = torch.tensor([[False, False, True, True, True]])
    found = layout([(0, 3, 1, 2)], 5, real)
    assert block_positions(found, *ranks(found, "ring")).tolist() == [[0, 0, 0, 1, 1]]
    allowed = block_mask(found, 5, ranks(found, "ring")[0])[0]
    assert allowed[:, :2].sum(0).tolist() == [1, 1] and allowed.diagonal().all()


def test_columns_in_two_calls_are_those_of_one():
    whole = layout([(0, 1, 2, 2), (0, 6, 1, 3)], 10)
    first = layout([(0, 1, 2, 2)], 5)
    both = first.followed_by(ImageLayout.of(torch.ones(1, 5, dtype=torch.bool), [(0, 1, 1, 3)], first.images))
    for name in ("real", "image", "cell"):
        assert torch.equal(getattr(both, name), getattr(whole, name))
    assert torch.equal(whole.first(5).image, first.image)
    rank = ranks(whole, "ring")[0]
    assert torch.equal(block_mask(whole, 5, rank), block_mask(whole, 10, rank)[:, 5:])
