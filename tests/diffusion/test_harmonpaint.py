# SPDX-License-Identifier: Apache-2.0
"""HarmonPaint: SAMS parts the regions as far as it says, MAKVS moves means, nothing else changes."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads.call import AttentionCall, DiffusionStep, Layout, Site
from manyheads.diffusion._maps import blur
from manyheads.diffusion.harmonpaint import Canvas, HarmonPaint
from manyheads.errors import UserError
from oracles import pipelines
from tolerance import FORMULA, assert_close, error, is_far

H, W = 3, 4  # of tokens; no square
AREA = torch.tensor([[1.0, 1, 0.6, 0], [1, 1, 0.2, 0], [0, 0, 0, 0]])  # share of each token in the hole
HOLE = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]])


def canvas(area=AREA, rows=1):
    return Canvas(area.double().repeat_interleave(10, -2).repeat_interleave(10, -1).expand(rows, 1, -1, -1))


def call(index=0, kind="self", layout=None, rows=2, tokens=H * W, axis="all", total=10):
    generator = torch.Generator().manual_seed(0)
    layout = layout or Layout(1, H, W)
    q, k, v = (torch.randn(rows, 2, tokens, 5, generator=generator).double() for _ in "qkv")
    step = DiffusionStep(1, index, total, 500.0, ("uncond", "cond"), layout, axis)
    return AttentionCall(Site("x", 0, 1, kind, False, peers=(0, 1)), q, k, v, scale=0.4, diffusion=step)


def attention(q, k, v, bias=0.0):
    return ((q @ k.transpose(-1, -2) * 0.4 + bias).softmax(-1) @ v).transpose(1, 2)


def test_sams_lowers_logits_by_how_far_masks_are_apart():
    given, m = call(), AREA.flatten().double()
    parted = {"both": lambda a, b: abs(a - b), "hole": lambda a, b: max(a - b, 0), "known": lambda a, b: max(b - a, 0)}
    for side, apart in parted.items():
        bias = torch.tensor([[apart(float(a), float(b)) for b in m] for a in m], dtype=torch.float64)
        edited = HarmonPaint(canvas=canvas(), softness=0, alpha=0.7, side=side).edit(given)
        assert edited.k is given.k and edited.v is given.v
        assert_close(edited.attend(), attention(given.q, given.k, given.v, torch.log(1 - 0.7 * bias)), FORMULA)
        assert is_far(edited.attend(), given.attend(), FORMULA)
        assert_close(edited.replace(v=torch.ones_like(given.v)).attend(), 1.0, FORMULA)  # rows still sum to 1
    held = given.replace(bias=given.q @ given.q.transpose(2, 3))
    both = HarmonPaint(canvas=canvas(), softness=0).edit(held)
    assert_close(both.bias, held.bias + HarmonPaint(canvas=canvas(), softness=0).edit(given).bias, FORMULA)


def test_parted_wholly_nothing_passes():
    """Outputs of known tokens do not depend on keys and values of the hole, bit for bit; nor the other way around."""
    given, inside = call(), HOLE.flatten() > 0.5
    for alpha, side, known, hole in ((1, "both", 1, 1), (1, "hole", 0, 1), (1, "known", 1, 0), (0.99, "both", 0, 0)):
        strategy = HarmonPaint(canvas=canvas(HOLE), softness=0, alpha=alpha, side=side)
        before = strategy.edit(given).attend()
        for these, same in ((inside, known), (~inside, hole)):
            k, v = given.k.clone(), given.v.clone()
            k[:, :, these], v[:, :, these] = 9.0, -7.0
            after = strategy.edit(given.replace(k=k, v=v)).attend()
            assert torch.equal(after[:, ~these], before[:, ~these]) == bool(same)
            assert not torch.equal(after[:, these], before[:, these])


def test_makvs_moves_means():
    given, inside = call(index=9), HOLE.flatten() > 0.5
    m = AREA.flatten().double()
    edited = HarmonPaint(canvas=canvas(), softness=0, shift=0.5).edit(given)
    assert edited.bias is None and edited.q is given.q
    for name in "kv":
        x, want = getattr(given, name), getattr(given, name).clone()
        mu, nu = x[:, :, ~inside].mean(2), x[:, :, inside].mean(2)
        for t in range(H * W):
            if inside[t]:
                want[:, :, t] += 0.5 * m[t] * (mu - nu)
        assert_close(getattr(edited, name), want, FORMULA)
        assert torch.equal(getattr(edited, name)[:, :, ~inside], x[:, :, ~inside])
    for shift, match in ((1.0, "mean"), (1.0, "moments"), (0.5, "mean")):
        v = HarmonPaint(canvas=canvas(HOLE), softness=0, shift=shift, match=match).edit(given).v
        got, want = v[:, :, inside].mean(2), given.v[:, :, ~inside].mean(2)
        assert (error(got, want, 1.0) < FORMULA) == (shift == 1)
        spread, aim = v[:, :, inside].std(2, correction=0), given.v[:, :, ~inside].std(2, correction=0)
        assert (error(spread, aim) < FORMULA) == (match == "moments")
    one = given.replace(k=torch.full_like(given.k, 0.3), v=torch.full_like(given.v, -2.0))
    assert_close(HarmonPaint(canvas=canvas(), shift=1).edit(one).attend(), one.attend(), FORMULA)


def test_when_and_where():
    plain, off = HarmonPaint(canvas=canvas()), HarmonPaint(canvas=canvas(), alpha=0, shift=0)
    for index in range(10):
        given = call(index)
        edited = plain.edit(given)
        assert (edited.bias is not None) == (index < 4) and (edited.k is not given.k) == (index >= 4)
        assert off.edit(given) is given
    assert HarmonPaint(canvas=canvas(), alpha=0).edit(call(0)).bias is None
    for area in (torch.zeros(H, W), torch.ones(H, W)):  # no hole, nothing else
        for index in (0, 9):
            given = call(index)
            assert HarmonPaint(canvas=canvas(area)).edit(given) is given
    for axis in ("time", "text"):
        given = call(axis=axis)
        assert plain.edit(given) is given

    def site(name, layer, kind="self"):
        return Site(name, 0, layer, kind, False, peers=tuple(range(6)))

    assert [plain.selects(site("blocks.x", layer)) for layer in range(6)] == [False] * 3 + [True] * 3
    assert plain.selects(site("up_blocks.0", 0)) and not plain.selects(site("mid_block", 5))
    assert HarmonPaint(where="all").selects(site("down_blocks.0", 0)) and HarmonPaint(layers=(1,)).selects(site("x", 1))
    assert not plain.selects(site("up_blocks.0", 5, "cross"))


def test_rows_of_a_batch_have_holes_of_their_own():
    """Two images in two branches; the third has no hole and stays as it is."""
    areas = torch.stack([AREA, AREA.flip(1), torch.zeros(H, W)])[:, None].double()
    many = Canvas(areas.repeat_interleave(10, -2).repeat_interleave(10, -1))
    for index in (0, 9):
        given = call(index, rows=6)
        made = HarmonPaint(canvas=many).edit(given).attend()
        for row in range(6):
            one = given.replace(**{name: getattr(given, name)[row : row + 1] for name in "qkv"})
            one = replace(one, diffusion=replace(one.diffusion, run_state={}))
            assert_close(made[row : row + 1], HarmonPaint(canvas=canvas(areas[row % 3, 0])).edit(one).attend(), FORMULA)
    with pytest.raises(UserError, match="3 holes for 2 rows"):
        HarmonPaint(canvas=many).edit(call())


@pytest.mark.parametrize("first", [True, False])
def test_text_is_left_alone(first):
    layout, index = Layout(1, H, W, text=2, text_first=first), 0
    image = slice(2, H * W + 2) if first else slice(0, H * W)
    given = call(index, "joint", layout, tokens=H * W + 2)
    bias = HarmonPaint(canvas=canvas(), alpha=1).edit(given).bias
    alone = HarmonPaint(canvas=canvas(), alpha=1).edit(call()).bias
    assert torch.equal(bias[:, :, image, image], alone)
    rest = bias.clone()
    rest[:, :, image, image] = 0
    assert not rest.any() and alone.any()
    late = call(9, "joint", layout, tokens=H * W + 2)
    k = HarmonPaint(canvas=canvas()).edit(late).k
    text = [i for i in range(H * W + 2) if i not in range(image.start, image.stop)]
    assert torch.equal(k[:, :, text], late.k[:, :, text]) and not torch.equal(k, late.k)


def test_masks_of_frames_and_of_coarser_layers():
    strategy = HarmonPaint(canvas=canvas(), softness=1.0)
    video = call(0, layout=Layout(2, H, W), tokens=2 * H * W)
    alone = strategy.edit(call()).bias
    bias = strategy.edit(video).bias
    assert torch.equal(bias, alone.repeat(1, 1, 2, 2))
    coarse = call(0, tokens=2 * 2, layout=Layout(1, H, W))
    m = blur(torch.nn.functional.adaptive_avg_pool2d(canvas().hole, (2, 2)), 1.0, 7).flatten()
    want = 1 - 0.5 * (m[:, None] - m).abs()
    assert_close(strategy.edit(coarse).bias[0, 0].exp(), want, FORMULA)
    assert float(m.max()) < 1 and m[0] > m[3]  # softened
    with pytest.raises(UserError, match="5 tokens are no image"):
        strategy.edit(call(tokens=5))


def test_the_control_shuffles_the_same_mask():
    given = call()
    own, other = (
        HarmonPaint(canvas=canvas(), softness=0, mask_tokens=how).masks(given.diffusion, (H, W))
        for how in ("hole", "random")
    )
    for a, b in zip(own, other, strict=True):
        assert torch.equal(a.sort().values, b.sort().values) and not torch.equal(a, b)


RUNS = {
    "dit": (pipelines.dit, pipelines.run_dit), "pixart": (pipelines.pixart, pipelines.run_pixart),
    "wan": (pipelines.wan, pipelines.run_wan), "unet": (pipelines.sd, pipelines.run_sd),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_attention_alone_in_a_pipeline(name):
    """Without a source: off is bit-exact, on is not, and comes out the same again."""
    make, run = RUNS[name]
    pipe = make()
    plain = run(pipe)
    hole = torch.zeros(1, 1, 32, 32)
    hole[..., :20, :12] = 1
    for strategy in (
        HarmonPaint(canvas=Canvas(hole), alpha=0, shift=0), HarmonPaint(canvas=Canvas(hole * 0)),
        HarmonPaint(canvas=Canvas(hole * 0 + 1)),
    ):  # fmt: skip
        with manyheads.use(pipe, strategy):
            assert torch.equal(run(pipe), plain)
    for strategy in (HarmonPaint(canvas=Canvas(hole), shift=0), HarmonPaint(canvas=Canvas(hole), alpha=0)):
        with manyheads.use(pipe, strategy):
            made = run(pipe)
            assert torch.equal(run(pipe), made) and error(made, plain) > 1e-5
    assert torch.equal(run(pipe), plain)


def test_refusals():
    with pytest.raises(UserError, match="alpha is a share"):
        HarmonPaint(alpha=1.5)
    with pytest.raises(UserError, match="say where the hole is"):
        HarmonPaint().edit(call())
    with pytest.raises(UserError, match="open the pipeline"):
        HarmonPaint(canvas=canvas()).edit(call().replace(diffusion=None))
    with pytest.raises(UserError, match="token layout of x"):
        given = call()
        HarmonPaint(canvas=canvas()).edit(given.replace(diffusion=replace(given.diffusion, layout=None)))
