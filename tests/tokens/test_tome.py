# SPDX-License-Identifier: Apache-2.0
"""ToMe: the blocks of a model written out with merging between them, what a token weighs, and the way back."""

import pytest
import torch

import manyheads
from manyheads import UserError
from manyheads.attention.merging import matched
from oracles import reducers
from oracles.fingerprint import assert_same, of_model
from tiny.image_encoders import build, forward, images
from tolerance import DEEP, assert_close, is_far

SPECS = ("tome:share=0.3", "tome:share=0.2,restore=change,proportional=false", "tome:share=0.5,choose=random")


def literal(model, x, share, proportional=True):
    """DINOv2's blocks by hand: attention that adds the log of sizes, then tokens merged by the keys of the block."""
    hidden = model.embeddings(x)
    sizes, groups = torch.ones(hidden.shape[:2], dtype=x.dtype), []
    for number, block in enumerate(model.encoder.layer):
        q, k, v = (
            getattr(block.attention, f"{n}_proj")(block.norm1(hidden)).unflatten(2, (2, -1)).transpose(1, 2)
            for n in "qkv"
        )
        logits = q @ k.mT / q.shape[-1] ** 0.5 + (sizes.log()[:, None, None] if proportional else 0)
        out = block.attention.o_proj((logits.softmax(3) @ v).transpose(1, 2).flatten(2))
        hidden = hidden + block.layer_scale1(out)
        hidden = hidden + block.layer_scale2(block.mlp(block.norm2(hidden)))
        if number == len(model.encoder.layer) - 1:
            break
        count = hidden.shape[1] - 1
        kept = count - int(share * count)
        real = torch.ones(len(x), count, dtype=torch.bool)
        into = matched(k.mean(1)[:, 1:], real, torch.full((len(x),), kept), kept).into + 1
        into = torch.cat([torch.zeros(len(x), 1, dtype=torch.long), into], 1)
        one_hot = (into[:, None] == torch.arange(kept + 1)[:, None]).to(x.dtype)
        weights = one_hot * sizes[:, None]
        hidden, sizes = weights / weights.sum(2, keepdim=True) @ hidden, weights.sum(2)
        groups.append(one_hot)
    for one_hot in reversed(groups):
        hidden = one_hot.mT @ hidden
    return model.layernorm(hidden)


@torch.no_grad()
def test_the_model_is_its_blocks_by_hand():
    model, x = build("dinov2"), images()
    with manyheads.use(model, "tome:share=0.3"):
        got = forward(model, x)
    assert_close(got, literal(model, x, 0.3), DEEP)
    assert is_far(got, literal(model, x, 0.3, proportional=False), DEEP)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_in_models(name):
    model = build(name)
    reducers.is_off(model, "tome:share=0")
    assert reducers.is_on(model, "tome:share=0.25") == [(n, n) for n in (65, 49, 37, 28)]
    for spec in SPECS:
        reducers.is_on(model, spec)
        reducers.is_restored(model, spec)
        reducers.is_row_by_row(model, spec)


def test_layers_are_blocks():
    assert reducers.is_on(build("dinov2"), "tome:share=0.25,layers=1") == [(n, n) for n in (65, 65, 49, 49)]


def test_a_reduction_keeps_sums_and_projects():
    x = torch.randn(2, 21, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = torch.randint(1, 4, (2, 21), generator=torch.Generator().manual_seed(1)).double()
    for spec in SPECS[::2]:
        reduction = manyheads.parse(spec).reduce(x, reducers.layout(4, 5, size=size))
        reducers.keeps_sums(reduction, x, size)
        reducers.is_projection(reduction, x)
    change = manyheads.parse(SPECS[1]).reduce(x, reducers.layout(4, 5))
    assert_close(change.restore(change.merge(x)), x)  # nothing has changed: every token is what it was


def test_refused():
    with pytest.raises(UserError, match=r"0 to 0\.5"):
        manyheads.parse("tome:share=0.6")
    with pytest.raises(UserError, match="in its place"), manyheads.use(build("segformer"), "tome"):
        pass
    model = build("vit")
    before = of_model(model)
    with pytest.raises(UserError, match="each shortens"), manyheads.use(model, "tome", "token_pool"):
        pass
    assert_same(of_model(model), before)
