# SPDX-License-Identifier: Apache-2.0
"""TokenLearner: both versions of the maps and the fuser as formulas, blocks written out, videos, weights kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv2d, gelu, layer_norm

import manyheads
from manyheads import UserError
from manyheads.tokens.tokenlearner import LearnedTokens, TokenLearner
from oracles import reducers
from tiny.image_encoders import build, forward, images, video, videos
from tolerance import DEEP, FORMULA, MODEL, assert_close, is_far, within

SPECS = ("tokenlearner:tokens=3", "tokenlearner:tokens=3,version=1", "tokenlearner:tokens=4,fuse=true",
         "tokenlearner:tokens=2,version=1,pool=mean,fuse=true,layers=0+2")  # fmt: skip

BACK = within(torch.float64, 5 * MODEL)


def learned(spec, dim=16, blocks=4, seed=0):
    """The strategy with drawn weights, also where they are zero before any training."""
    strategy = manyheads.parse(spec)
    generator = torch.Generator().manual_seed(seed)
    weights = strategy.new_weights(dim, blocks).double().eval()
    with torch.no_grad():
        for parameter in weights.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return strategy.having(weights)


def drawn(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def normed(x, norm):
    return layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)


def through(x, layers):
    """A hidden layer with GELU and a linear one."""
    first, _, second = layers
    return gelu(x @ first.weight.T + first.bias) @ second.weight.T + second.bias


def maps_of(strategy, learner, x, grid):
    """``[n, M]``, the weight of each patch of one frame ``x [n, C]`` in each token."""
    y = normed(x, learner.norm)
    if strategy.version == "1.1":
        return through(y, learner.score).softmax(0)
    y = y.T.unflatten(1, grid)[None]
    for i in range(0, 7, 2):
        y = conv2d(y if i == 0 else gelu(y), learner.score[i].weight, padding=1)
    found = torch.sigmoid(y[0].flatten(1).T)
    return found / len(x) if strategy.pool == "mean" else found


def fused(fuser, tokens, x):
    """Patches ``[n, C]`` with what became of the tokens ``[M, C]``."""
    y = normed(tokens, fuser.before)
    y = normed(fuser.mix.weight @ y + fuser.mix.bias[:, None], fuser.behind)
    return x + torch.sigmoid(through(normed(x, fuser.norm), fuser.score)) @ y


@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=6, deadline=None)
@given(height=st.integers(1, 4), width=st.integers(1, 4), prefix=st.integers(0, 2), frames=st.integers(1, 3))
def test_a_reduction_is_the_formula_frame_by_frame(spec, height, width, prefix, frames):
    strategy, area = learned(spec), height * width
    x, changed = drawn(2, prefix + frames * area, 16), drawn(2, prefix + frames * strategy.tokens, 16, seed=2)
    layout = reducers.layout(frames * height, width, prefix, frames=frames, block=2 if strategy.fuse else 1)
    learner, fuser = strategy.trained.at(layout.block, 16)
    reduction = strategy.reduce(x, layout)
    merged, restored = reduction.merge(x), reduction.restore(changed)
    assert torch.equal(merged[:, :prefix], x[:, :prefix])
    assert torch.equal(restored[:, :prefix], changed[:, :prefix])
    for row in range(2):
        for frame in range(frames):
            patches = x[row, prefix + frame * area :][:area]
            at = slice(prefix + frame * strategy.tokens, prefix + (frame + 1) * strategy.tokens)
            weights = maps_of(strategy, learner, patches, (height, width))
            assert_close(merged[row, at], weights.T @ patches, DEEP)
            back = (weights / weights.sum(1, keepdim=True)) @ changed[row, at]
            want = back if fuser is None else fused(fuser, changed[row, at], patches)
            assert_close(restored[row, prefix + frame * area :][:area], want, DEEP)


def test_gradients_reach_weights_and_patches():
    for spec in SPECS:
        strategy, x = learned(spec), drawn(1, 12, 16).requires_grad_()
        layout = reducers.layout(3, 4, 0, block=2 if strategy.fuse else 1)
        learner, fuser = strategy.trained.at(layout.block, 16)
        reduction, weights = strategy.reduce(x, layout), drawn(12, 16, seed=3)
        leaves = [x, *learner.parameters(), *(fuser.parameters() if fuser else ())]
        ours = torch.autograd.grad((reduction.restore(reduction.merge(x)) * weights).sum(), leaves)
        maps = maps_of(strategy, learner, x[0], (3, 4))
        tokens = maps.T @ x[0]
        want = fused(fuser, tokens, x[0]) if fuser else (maps / maps.sum(1, keepdim=True)) @ tokens
        theirs = torch.autograd.grad((want * weights).sum(), leaves)
        one, other = (torch.cat([x.flatten() for x in found]) for found in (ours, theirs))
        assert_close(one, other, BACK)  # at once: the last bias of a softmax has a gradient of 0


def test_what_maps_must_do():
    """Of equal patches the tokens are those patches; version 1.1 follows no order of patches, version 1 does."""
    soft, hard = learned(SPECS[0]), learned(SPECS[1])
    layout, equal = reducers.layout(3, 4, 0, block=1), drawn(2, 1, 16).expand(2, 12, 16)
    assert_close(soft.reduce(equal, layout).merge(equal), equal[:, :3], FORMULA)
    x, order = drawn(2, 12, 16), torch.randperm(12, generator=torch.Generator().manual_seed(4))
    for strategy, follows in ((soft, False), (hard, True)):
        plain = strategy.reduce(x, layout).merge(x)
        assert is_far(strategy.reduce(x[:, order], layout).merge(x[:, order]), plain, DEEP) == follows


def test_a_fuser_begins_as_nothing():
    """Before any training patches come back as they were, whatever a block made of the tokens."""
    strategy = TokenLearner(fuse=True)
    strategy = strategy.having(strategy.new_weights(16, 4).double())
    x = drawn(2, 17, 16)
    reduction = strategy.reduce(x, reducers.layout(4, 4, block=1))
    assert torch.equal(reduction.restore(drawn(2, 9, 16, seed=5))[:, 1:], x[:, 1:])


def literal(model, x, strategy):
    """ViT's blocks by hand: with a fuser tokens are learned before, and patches restored behind, every later block."""
    hidden, weights = model.embeddings(x), strategy.trained
    for number, block in enumerate(model.layers):
        first = number == 2 or (strategy.fuse and number > 2)
        if first:
            name, patches = str(number - 1), hidden[:, 1:]
            maps = torch.stack([maps_of(strategy, weights.learn[name], row, (8, 8)) for row in patches])
            hidden = torch.cat([hidden[:, :1], maps.mT @ patches], 1)
        hidden = block(hidden)
        if strategy.fuse and number >= 2:
            back = [fused(weights.fuse[name], y, p) for y, p in zip(hidden[:, 1:], patches, strict=True)]
            hidden = torch.cat([hidden[:, :1], torch.stack(back)], 1)
    return model.layernorm(hidden)[:, 0]


@pytest.mark.parametrize("spec", SPECS[:3])
@torch.no_grad()
def test_the_model_is_its_blocks_by_hand(spec):
    model, x, strategy = build("vit"), images(), learned(spec)
    with manyheads.use(model, strategy):
        got = forward(model, x)[:, 0]
    assert_close(got, literal(model, x, strategy), DEEP)
    assert is_far(got, literal(model, x, learned(spec, seed=9)), DEEP)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_in_models(name):
    model = build(name)
    assert reducers.is_on(model, learned(SPECS[0])) == [(n, n) for n in (65, 65, 4, 4)]
    assert reducers.is_on(model, learned(SPECS[3])) == [(n, n) for n in (65, 3, 65, 3)]
    for spec in SPECS:
        reducers.is_on(model, learned(spec))
        reducers.is_restored(model, learned(spec))
        reducers.is_row_by_row(model, learned(spec))


@torch.no_grad()
def test_every_frame_of_a_video_has_tokens_of_its_own():
    """4 pairs of frames of 4 x 4 patches behind a class token; frames in another order are tokens in that order."""
    model, x, watch = video(), videos(), reducers.Counts()
    for spec, counts in ((SPECS[0], [65, 65, 13, 13]), ("token_pool:cell=4,across=2", [65, 9, 9, 9])):
        strategy = learned(spec) if spec == SPECS[0] else manyheads.parse(spec)
        with manyheads.use(model, strategy, watch) as port:
            model(pixel_values=x)
        assert [state["counts"][0] for _, state in port.kept(watch)] == counts
    y, strategy = drawn(1, 65, 16), learned(SPECS[1])
    layout = reducers.layout(16, 4, frames=4, block=1)
    turned = torch.cat([y[:, :1], y[:, 1:].unflatten(1, (4, 16)).flip(1).flatten(1, 2)], 1)
    plain, other = (strategy.reduce(z, layout).merge(z)[:, 1:].unflatten(1, (4, 3)) for z in (y, turned))
    assert_close(other.flip(1), plain, FORMULA)
    with pytest.raises(UserError, match="do not part into cells"), manyheads.use(model, "token_pool:cell=3"):
        model(pixel_values=x)


def test_weights_say_what_they_were_trained_for(tmp_path):
    model, x = build("vit"), images()
    for spec in SPECS:
        strategy = learned(spec)
        place = strategy.trained.float().save(tmp_path / spec.replace(":", "-"))
        again = TokenLearner(weights=str(place))
        again.trained.double()
        with manyheads.use(model, again):
            got = forward(model, x)
        with manyheads.use(model, strategy.having(strategy.trained.double())):
            assert_close(forward(model, x), got, DEEP)
        with manyheads.use(model, learned(spec, seed=9)):
            assert is_far(forward(model, x), got, DEEP)
    with pytest.raises(UserError, match="give weights alone"):
        manyheads.parse(f"tokenlearner:weights={place},tokens=8")


def test_refused(tmp_path):
    with pytest.raises(UserError, match="1 or more"):
        manyheads.parse("tokenlearner:tokens=0")
    with pytest.raises(UserError, match="pool is of version 1"):
        manyheads.parse("tokenlearner:pool=mean")
    with pytest.raises(UserError, match="a block behind which"):
        TokenLearner(layers=(3,)).new_weights(16, 4)
    model = build("vit")
    with pytest.raises(UserError, match="needs weights=FOLDER"), manyheads.use(model, "tokenlearner"):
        forward(model, images())
    with pytest.raises(UserError, match="holds no learned tokens"):
        LearnedTokens.load(tmp_path)
    with pytest.raises(UserError, match="of 8 channels"), manyheads.use(model, learned(SPECS[0], dim=8)):
        forward(model, images())
    with pytest.raises(UserError, match="in its place"), manyheads.use(build("segformer"), learned(SPECS[0])):
        pass
