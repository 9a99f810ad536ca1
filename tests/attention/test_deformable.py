# SPDX-License-Identifier: Apache-2.0
"""Deformable attention: point by point in float64, its matrix, what cells receive, and transformers' module."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention

from manyheads.attention.deformable import DeformableAttention, dense_weights, received, sampled
from tolerance import CLOSE, FORMULA, PROJECTED, SAME, is_close, is_far

SHAPES = [(5, 7), (3, 4), (1, 2)]
CELLS = sum(height * width for height, width in SHAPES)


def drawn(batch=2, queries=3, heads=2, points=2, size=4, shapes=SHAPES, dtype=torch.float64):
    """Values, places that also lie beside the maps, and weights."""
    count = sum(height * width for height, width in shapes)
    value = torch.randn(batch, count, heads, size, dtype=dtype)
    places = 1.6 * torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=dtype) - 0.3
    weights = torch.rand(batch, queries, heads, len(shapes) * points, dtype=dtype).softmax(-1)
    return value, places, weights.unflatten(-1, (len(shapes), points))


def by_hand(value, shapes, places, weights):
    """Four neighbours of each place, one after the other."""
    out = torch.zeros(places.shape[0], places.shape[1], value.shape[2], value.shape[3], dtype=value.dtype)
    for b, q, h, level, p in torch.cartesian_prod(*(torch.arange(n) for n in places.shape[:-1])).tolist():
        height, width = shapes[level]
        start = sum(a * c for a, c in shapes[:level])
        x = float(places[b, q, h, level, p, 0]) * width - 0.5
        y = float(places[b, q, h, level, p, 1]) * height - 0.5
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < height and 0 <= column < width:
                    near = (1 - abs(y - row)) * (1 - abs(x - column))
                    cell = value[b, start + row * width + column, h]
                    out[b, q, h] += weights[b, q, h, level, p] * near * cell
    return out


def test_it_is_its_formula_point_by_point():
    value, places, weights = drawn()
    wanted = by_hand(value, SHAPES, places, weights)
    assert is_close(sampled(value, SHAPES, places, weights), wanted, 4 * FORMULA)
    turned = places.flip(-1)  # controls: rows for columns; half a cell off
    assert is_far(sampled(value, SHAPES, turned, weights), wanted, 4 * FORMULA)
    assert is_far(sampled(value, SHAPES, places + 0.5 / 7, weights), wanted, 4 * FORMULA)


sizes = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=3)


@settings(max_examples=25, deadline=None)
@given(shapes=sizes, queries=st.integers(1, 4), heads=st.integers(1, 3), points=st.integers(1, 3))
def test_it_is_a_matrix_times_the_values_forward_and_backward(shapes, queries, heads, points):
    held = [x.requires_grad_() for x in drawn(2, queries, heads, points, 3, shapes)]
    out = sampled(held[0], shapes, *held[1:])
    matrix = dense_weights(shapes, *held[1:])
    wanted = torch.einsum("bhqn,bnhd->bqhd", matrix, held[0])
    assert is_close(out, wanted, 4 * FORMULA, unit=1.0)
    ways = torch.randn_like(out)
    for got, want in zip(torch.autograd.grad((out * ways).sum(), held),
                         torch.autograd.grad((wanted * ways).sum(), held), strict=True):  # fmt: skip
        assert is_close(got, want, 16 * FORMULA, unit=max(1.0, float(want.abs().max())))
    assert is_close(received(shapes, *held[1:]), matrix.sum((1, 2)), 4 * FORMULA, unit=1.0)
    assert (matrix >= 0).all() and float(matrix.detach().sum(-1).max()) <= 1 + 1e-9


def test_gradients_are_those_of_small_changes():
    held = [x.requires_grad_() for x in drawn(1, 2, 1, 2, 2, [(3, 4), (2, 2)])]
    assert torch.autograd.gradcheck(lambda *x: sampled(x[0], [(3, 4), (2, 2)], *x[1:]), held)


def peer(ours, dim, heads):
    """transformers' module with the weights of ours, by its path of plain torch."""
    config = DeformableDetrConfig(
        d_model=dim, num_feature_levels=len(SHAPES), disable_custom_kernels=True, use_timm_backbone=False, backbone=None
    )
    module = DeformableDetrMultiscaleDeformableAttention(config, heads, ours.points).double()
    names = {"sampling_offsets": "offsets", "attention_weights": "weights", "value_proj": "value", "output_proj": "out"}
    for theirs, own in names.items():
        getattr(module, theirs).load_state_dict(getattr(ours, own).state_dict())
    return module


@pytest.mark.parametrize("boxes", [False, True])
def test_it_is_the_module_of_transformers(boxes):
    ours = DeformableAttention(8, 2, len(SHAPES), 3).double()
    with torch.no_grad():
        for x in ours.parameters():
            x.add_(0.3 * torch.randn_like(x))
    q, x = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(2, CELLS, 8, dtype=torch.float64)
    there = torch.rand(2, CELLS) < 0.8
    reference = torch.rand(2, 4, 4 if boxes else 2, dtype=torch.float64)
    shapes = torch.tensor(SHAPES)
    wanted, weights = peer(ours, 8, 2)(
        q, there, x, reference_points=reference[:, :, None].expand(-1, -1, len(SHAPES), -1), spatial_shapes=shapes,
        spatial_shapes_list=SHAPES, level_start_index=torch.tensor([0, 35, 47]),
    )  # fmt: skip
    got = ours(q, reference, x, there, SHAPES)
    assert is_close(got, wanted, 4 * PROJECTED)
    assert is_close(ours.looks(q, reference, SHAPES)[1], weights, PROJECTED)
    assert is_far(ours(q, reference, x, torch.ones_like(there), SHAPES), wanted, 4 * PROJECTED)  # control


def test_what_is_not_there_is_not_read_and_what_is_received_adds_up():
    layer = DeformableAttention(8, 2, len(SHAPES), 2)
    q, x, reference = torch.randn(1, 3, 8), torch.randn(1, CELLS, 8), torch.rand(1, 3, 2) * 0.4 + 0.3
    there = torch.arange(CELLS)[None] % 3 > 0
    other = x + 100 * (~there)[..., None] * torch.randn_like(x)
    assert torch.equal(layer(q, reference, x, there, SHAPES), layer(q, reference, other, there, SHAPES))
    assert is_far(layer(q, reference, other, torch.ones_like(there), SHAPES), layer(q, reference, x, there, SHAPES))
    assert not len(layer.shown)
    layer.show = True
    layer(q, reference, x, there, SHAPES)
    places, weights = layer.looks(q, reference, SHAPES)
    assert is_close(layer.shown, received(SHAPES, places, weights)) and layer.shown.shape == (1, CELLS)
    inside = torch.full_like(places, 0.5)  # nothing is read from beside the maps
    assert is_close(received(SHAPES[:2], inside[:, :, :, :2], weights[:, :, :, :2]).sum(), weights[:, :, :, :2].sum())


def test_it_begins_as_the_paper_has_it():
    """Eight heads look eight ways, the p-th point p cells away along the longer side; all points count alike."""
    layer = DeformableAttention(16, 8, 2, 4)
    places, weights = layer.looks(torch.randn(1, 1, 16), torch.full((1, 1, 2), 0.5), [(10, 20), (5, 10)])
    assert is_close(weights, torch.tensor(1 / 8), CLOSE)
    cells = (places[0, 0] - 0.5) * torch.tensor([[20.0, 10.0], [10.0, 5.0]])[:, None]
    assert is_close(cells.abs().max(-1).values, torch.arange(1.0, 5).expand(8, 2, 4), SAME)
    ways = torch.atan2(cells[:, 0, 0, 1], cells[:, 0, 0, 0]) % (2 * math.pi)
    assert is_close(ways, torch.arange(8) * math.pi / 4, 4 * SAME)


def test_places_of_wide_maps_are_not_rounded_to_bfloat16():
    value, places, weights = drawn(1, 4, 1, 1, 4, [(1, 300)], torch.float32)
    got = sampled(value.bfloat16(), [(1, 300)], places, weights)
    wanted = sampled(value.bfloat16().float(), [(1, 300)], places, weights)
    assert got.dtype == torch.float32 and is_close(got, wanted)
    assert is_far(sampled(value, [(1, 300)], places.bfloat16().float(), weights), wanted)  # control
