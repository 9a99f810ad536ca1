# SPDX-License-Identifier: Apache-2.0
"""MasaCtrl: sources never change, targets look where they should, and every branch pairs within itself."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads.call import AttentionCall, DiffusionStep, Layout, Site
from manyheads.diffusion.masactrl import MasaCtrl
from manyheads.errors import UserError
from oracles import pipelines
from tolerance import assert_close, error


def call(branches=("uncond", "cond"), kind="self", layout=None, tokens=6, index=5, run_state=None):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2 * len(branches), 3, tokens, 4, generator=generator).double() for _ in "qkv")
    layout = Layout(1, 2, 3) if layout is None else layout
    step = DiffusionStep(1, index, 10, 500.0, branches, layout, run_state={} if run_state is None else run_state)
    return AttentionCall(Site("x", 0, 12, kind, False), q, k, v, scale=0.4, diffusion=step)


def attention(q, k, v, mask=None):
    x = q @ k.transpose(-1, -2) * 0.4
    x = x if mask is None else x.masked_fill(~mask, -torch.inf)
    return (x.softmax(-1) @ v).transpose(-3, -2)


def test_targets_read_sources_in_their_own_branch():
    given = call()
    q, k, v = given.q, given.k, given.v
    made = MasaCtrl().attend(given)
    assert_close(made[[0, 2]], attention(q, k, v)[[0, 2]], 1e-10)
    assert_close(made[1], attention(q[1], k[0], v[0]), 1e-10)
    assert_close(made[3], attention(q[3], k[2], v[2]), 1e-10)
    assert error(made[3], attention(q[3], k[0], v[0])) > 1e-2
    both = MasaCtrl(union=True).attend(given)
    assert_close(both[1], attention(q[1], torch.cat([k[1], k[0]], 1), torch.cat([v[1], v[0]], 1)), 1e-10)
    for off in (MasaCtrl(start_step=6), MasaCtrl(start_step=99)):
        assert_close(off.attend(given), attention(q, k, v), 1e-10)
    order = torch.tensor([3, 1, 0, 5, 2, 4])
    moved = given.replace(k=k[:, :, order], v=v[:, :, order])
    assert_close(MasaCtrl().attend(moved), made, 1e-10)
    low, high = v[0].amin(1)[None], v[0].amax(1)[None]
    assert (made[1] >= low - 1e-9).all() and (made[1] <= high + 1e-9).all()


def test_joint_attention_keeps_its_own_text():
    given = call(("all",), "joint", Layout(1, 2, 2, text=2, text_first=True))
    made = MasaCtrl().attend(given)
    k = torch.cat([given.k[1, :, :2], given.k[0, :, 2:]], 1)
    v = torch.cat([given.v[1, :, :2], given.v[0, :, 2:]], 1)
    assert_close(made[1], attention(given.q[1], k, v), 1e-10)
    assert error(made[1], attention(given.q[1], given.k[0], given.v[0])) > 1e-2


def test_masks():
    given = call()
    layout = given.diffusion.layout
    maps = torch.zeros(4, 2, 3).double()
    maps[2] = torch.tensor([[1.0, 1, 0], [0, 0, 0]])  # the conditional source's object
    maps[3] = torch.tensor([[0.0, 0, 0], [1, 0, 1]])  # and target's
    given.diffusion.run_state["masactrl"] = {"at": (5, ("uncond", "cond")), "maps": [maps]}
    strategy = MasaCtrl(tokens=(1,))
    made = strategy.attend(given)
    there, here = maps[2].flatten().bool(), maps[3].flatten().bool()
    for source, target in ((0, 1), (2, 3)):
        inside = attention(given.q[target], given.k[source], given.v[source], there)
        outside = attention(given.q[target], given.k[source], given.v[source], ~there)
        assert_close(made[target], torch.where(here[:, None, None], inside, outside), 1e-10)
    for empty in (0.0, 1.0):  # nothing to look at: not masked
        maps[2] = empty
        assert_close(strategy.attend(given), MasaCtrl().attend(given), 1e-10)
    given.diffusion.run_state["masactrl"]["at"] = (4, ("uncond", "cond"))  # of another step
    maps[2, 0] = 0.0
    assert_close(strategy.attend(given), MasaCtrl().attend(given), 1e-10)
    assert layout.grid(6) == (2, 3)


def test_masks_come_from_the_words():
    generator = torch.Generator().manual_seed(1)
    run_state = {}
    given = call(run_state=run_state)
    words = torch.randn(4, 3, 5, 4, generator=generator).double()
    cross = given.replace(site=Site("y", 1, 12, "cross", False), k=words, v=words)
    strategy = MasaCtrl(tokens=(1, 3), threshold=0.5)
    out = cross.attend()
    strategy.watch(cross, out)
    strategy.watch(cross.replace(q=cross.q.flip(2)), out)
    x = [
        (q @ words.transpose(-1, -2) * 0.4).softmax(-1).mean(1)[..., [1, 3]].sum(-1) for q in (cross.q, cross.q.flip(2))
    ]
    mean = (x[0] + x[1]) / 2
    low, high = mean.amin(1, keepdim=True), mean.amax(1, keepdim=True)
    want = ((mean - low) / (high - low) > 0.5)[2:].repeat(2, 1)
    assert torch.equal(strategy.masks(given.diffusion, 4, 6), want)
    assert strategy.masks(given.diffusion, 4, 7) is None
    with pytest.raises(UserError, match="tokens 0 to 4"):
        MasaCtrl(tokens=(7,)).watch(cross, out)


def test_in_a_pipeline():
    pipe = pipelines.pixart()
    plain = pipelines.run_pixart(pipe, steps=5)
    with manyheads.use(pipe, "masactrl:start_step=9,start_layer=0"):
        assert torch.equal(pipelines.run_pixart(pipe, steps=5), plain)
    with pytest.raises(UserError, match="no attention to act on"), manyheads.use(pipe, "masactrl:start_layer=50"):
        pass
    for spec in ("masactrl:start_step=2,start_layer=1", "masactrl:start_step=0,start_layer=0,tokens=1+2"):
        with manyheads.use(pipe, spec):
            made = pipelines.run_pixart(pipe, steps=5)
            assert torch.equal(pipelines.run_pixart(pipe, steps=5), made)
        assert torch.equal(made[0], plain[0]) and error(made[1], plain[1]) > 1e-5
    same = pipelines.run_pixart(pipe, steps=5, same=True)
    with manyheads.use(pipe, "masactrl:start_step=0,start_layer=0"):
        assert torch.equal(pipelines.run_pixart(pipe, steps=5, same=True), same)  # source and target are one


def test_refusals():
    with pytest.raises(UserError, match="no pairs"):
        three = call(("a", "b", "c"))
        MasaCtrl().attend(three.replace(q=three.q[:3], k=three.k[:3], v=three.v[:3]))
    with pytest.raises(UserError, match="open the pipeline"):
        given = call()
        MasaCtrl().attend(given.replace(diffusion=None))
