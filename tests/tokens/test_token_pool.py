# SPDX-License-Identifier: Apache-2.0
"""Plain pooling: what becomes of a cell, where, and what comes back."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

import manyheads
from manyheads import UserError
from oracles import models, reducers
from tiny.image_encoders import build, forward, images
from tolerance import FORMULA, assert_close

SPECS = ("token_pool", "token_pool:how=first,restore=change,layers=1", "token_pool:how=random,cell=3,proportional=true")


def drawn(seed=0):
    return torch.randn(2, 31, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_mean_first_and_random_of_a_cell():
    x, layout = drawn(), reducers.layout(5, 6)
    patches = x[:, 1:].mT.unflatten(2, (5, 6))
    mean, first, random, other = (
        manyheads.parse(f"token_pool:how={how}").reduce(x, layout)
        for how in ("mean", "first", "random", "random,seed=1")
    )
    for reduction in (mean, first, random):
        assert reduction.grid == (3, 3)
        assert torch.equal(reduction.merge(x)[:, 0], x[:, 0])
    want = avg_pool2d(patches, 2, ceil_mode=True, count_include_pad=False)
    assert_close(mean.merge(x)[:, 1:], want.flatten(2).mT, FORMULA)
    assert torch.equal(first.merge(x)[:, 1:], patches[..., ::2, ::2].flatten(2).mT)
    drawn_ones = random.merge(x)[:, 1:].mT.unflatten(2, (3, 3))
    for i in range(3):
        for j in range(3):
            cell = patches[..., 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(2)
            same = (cell == drawn_ones[..., i, j, None]).all(1)
            assert same.sum(1).tolist() == [1, 1]  # one of its own, whole
            assert torch.equal(same[0], same[1])  # the same place in every image
    assert not torch.equal(random.merge(x), other.merge(x))
    reducers.keeps_sums(mean, x)
    reducers.is_projection(mean, x)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_in_models(name):
    model = build(name)
    assert reducers.is_on(model, SPECS[0]) == [(n, n) for n in (65, 17, 17, 17)]
    assert reducers.is_on(model, "token_pool:layers=0+2") == [(n, n) for n in (65, 17, 17, 5)]
    for spec in SPECS:
        reducers.is_on(model, spec)
        reducers.is_restored(model, spec)
        reducers.is_row_by_row(model, spec)


def test_nothing_reduced_is_off():
    """A block that does not exist reduces nothing, and the last has nothing behind it."""
    reducers.is_off(build("dinov2"), "token_pool:layers=3")


def test_refused():
    with pytest.raises(UserError, match="at least 2"):
        manyheads.parse("token_pool:cell=1")
    with pytest.raises(UserError, match="on their grid"), manyheads.use(models.tiny("bert"), "token_pool"):
        models.forward("bert", models.tiny("bert"))
    model = build("dinov2")
    mask = torch.ones(2, 65, dtype=torch.bool)
    mask[1, 40:] = False
    with pytest.raises(UserError, match="leave padding away"), manyheads.use(model, "token_pool"):
        model(images(), attention_mask=mask)
    assert forward(model, images()).shape == (2, 65, 16)
