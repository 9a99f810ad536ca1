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
from tolerance import FORMULA, assert_close, error


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
    assert_close(made[[0, 2]], attention(q, k, v)[[0, 2]], FORMULA)
    assert_close(made[1], attention(q[1], k[0], v[0]), FORMULA)
    assert_close(made[3], attention(q[3], k[2], v[2]), FORMULA)
    assert error(made[3], attention(q[3], k[0], v[0])) > 1e-2
    both = MasaCtrl(union=True).attend(given)
    assert_close(both[1], attention(q[1], torch.cat([k[1], k[0]], 1), torch.cat([v[1], v[0]], 1)), FORMULA)
    for off in (MasaCtrl(start_step=6), MasaCtrl(start_step=99)):
        assert_close(off.attend(given), attention(q, k, v), FORMULA)
    order = torch.tensor([3, 1, 0, 5, 2, 4])
    moved = given.replace(k=k[:, :, order], v=v[:, :, order])
    assert_close(MasaCtrl().attend(moved), made, FORMULA)
    low, high = v[0].amin(1)[None], v[0].amax(1)[None]
    assert (made[1] >= low - 1e-9).all() and (made[1] <= high + 1e-9).all()


def test_joint_attention_keeps_its_own_text():
    given = call(("all",), "joint", Layout(1, 2, 2, text=2, text_first=True))
    made = MasaCtrl().attend(given)
    k = torch.cat([given.k[1, :, :2], given.k[0, :, 2:]], 1)
    v = torch.cat([given.v[1, :, :2], given.v[0, :, 2:]], 1)
    assert_close(made[1], attention(given.q[1], k, v), FORMULA)
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
        assert_close(made[target], torch.where(here[:, None, None], inside, outside), FORMULA)
    for empty in (0.0, 1.0):  # nothing to look at: not masked
        maps[2] = empty
        assert_close(strategy.attend(given), MasaCtrl().attend(given), FORMULA)
    given.diffusion.run_state["masactrl"]["at"] = (4, ("uncond", "cond"))  # of another step
    maps[2, 0] = 0.0
    assert_close(strategy.attend(given), MasaCtrl().attend(given), FORMULA)
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


def test_where_and_when_it_acts():
    def site(kind, layer):
        return Site("x", 0, layer, kind, False)

    for layer, acts in ((9, False), (10, True), (None, False)):
        assert MasaCtrl().selects(site("self", layer)) == MasaCtrl().selects(site("joint", layer)) == acts
    assert not MasaCtrl().selects(site("cross", 0)) and MasaCtrl(tokens=(1,)).selects(site("cross", 0))
    assert not MasaCtrl(layers=(3,)).selects(site("self", 12)) and not MasaCtrl().selects(site("linear", 12))
    for index, acts in ((3, False), (4, True), (5, True)):
        assert (MasaCtrl().acts(call(index=index)) is not None) == acts
    assert MasaCtrl().acts(call(kind="cross")) is None
    given = call()
    text = DiffusionStep(1, 5, 10, 500.0, given.diffusion.branches, given.diffusion.layout, "text")
    assert MasaCtrl().acts(given.replace(diffusion=text)) is None
    with pytest.raises(UserError, match="does not say which rows"):
        MasaCtrl().attend(call(("unknown",)))
    with pytest.raises(UserError, match="open the pipeline"):
        MasaCtrl().attend(call(index=None))
    with pytest.raises(UserError, match="token layout of x is not known"):
        joint = call(kind="joint")
        nowhere = DiffusionStep(1, 5, 10, 500.0, joint.diffusion.branches, None)
        MasaCtrl().attend(joint.replace(diffusion=nowhere))
    odd = call(("all",))
    with pytest.raises(UserError, match="3 rows in branches all are no pairs"):
        three = {name: torch.cat([x, x[:1]]) for name, x in (("q", odd.q), ("k", odd.k), ("v", odd.v))}
        MasaCtrl().attend(odd.replace(**three))


def test_two_pictures_a_branch():
    """Sources stand before their targets: rows 0, 1 are read by 2, 3."""
    given = call(("uncond", "cond"))
    q, k, v = (torch.cat([x, x.flip(0) * 0.7]) for x in (given.q, given.k, given.v))
    made = MasaCtrl().attend(given.replace(q=q, k=k, v=v))
    for source, target in ((0, 2), (1, 3), (4, 6), (5, 7)):
        assert_close(made[target], attention(q[target], k[source], v[source]), FORMULA)
        assert_close(made[source], attention(q[source], k[source], v[source]), FORMULA)


@pytest.mark.parametrize("union", [False, True])
@pytest.mark.parametrize("rows", [1, 4])
def test_masks_and_biases_of_the_model_stay_with_the_targets(union, rows):
    """A padding mask and a bias of the call, one for all rows or each its own."""
    given = call()
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(rows, 1, 6, 6, generator=generator) < 0.7
    mask[..., 0] = True
    bias = torch.randn(rows, 1, 6, 6, generator=generator).double()
    q, k, v = given.q, given.k, given.v
    made = MasaCtrl(union=union).attend(given.replace(mask=mask))
    for source, target in ((0, 1), (2, 3)):
        own = mask[target if rows > 1 else 0, 0]
        keys, values, seen = k[source], v[source], own
        if union:
            keys, values = torch.cat([k[target], k[source]], 1), torch.cat([v[target], v[source]], 1)
            seen = torch.cat([own, own], -1)
        assert_close(made[target], attention(q[target], keys, values, seen), FORMULA)
        plain = attention(q[source], k[source], v[source], mask[source if rows > 1 else 0, 0])
        assert_close(made[source], plain, FORMULA)
    if not union:
        for hides in (None, mask):
            moved = MasaCtrl().attend(given.replace(bias=bias, mask=hides))
            for source, target in ((0, 1), (2, 3)):
                x = q[target] @ k[source].transpose(-1, -2) * 0.4 + bias[target if rows > 1 else 0, 0]
                if hides is not None:
                    x = x.masked_fill(~mask[target if rows > 1 else 0, 0], -torch.inf)
                assert_close(moved[target], (x.softmax(-1) @ v[source]).transpose(-3, -2), FORMULA)


def test_text_behind_the_image():
    given = call(("all",), "joint", Layout(1, 2, 2, text=2, text_first=False))
    made = MasaCtrl().attend(given)
    k, v = (torch.cat([x[0, :, :4], x[1, :, 4:]], 1) for x in (given.k, given.v))
    assert_close(made[1], attention(given.q[1], k, v), FORMULA)
    both = MasaCtrl(union=True).attend(given)
    k, v = (torch.cat([x[1], x[0, :, :4]], 1) for x in (given.k, given.v))
    assert_close(both[1], attention(given.q[1], k, v), FORMULA)


def noted(strategy, branches, index, maps, run_state, rows=2):
    """As ``watch`` would note maps ``[rows, h, w]`` of cross-attention to one word."""
    generator = torch.Generator().manual_seed(0)
    h, w = maps.shape[1:]
    # Two words: the chosen one's logit is such that its share is the map.
    q = torch.logit(maps.flatten(1).double(), 1e-6)[:, None, :, None]
    k = torch.tensor([[0.0], [1.0]]).double().expand(rows, 1, 2, 1)
    step = DiffusionStep(1, index, 10, 500.0, branches, Layout(1, 2, 3), run_state=run_state)
    v = torch.randn(rows, 1, 2, 4, generator=generator).double()
    given = AttentionCall(Site("y", 1, 0, "cross", False), q, k, v, scale=1.0, diffusion=step)
    assert h * w == q.shape[2]
    strategy.watch(given, given.attend())
    return step


def test_maps_of_the_conditional_call_decide_for_the_unconditional_one():
    strategy, run_state = MasaCtrl(tokens=(1,), threshold=0.5), {}
    first, second, other = torch.rand(3, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    cond = noted(strategy, ("cond",), 5, first, run_state)

    def cut(*maps):
        x = torch.stack(maps).mean(0).flatten(1)
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return (x - low) / (high - low) > 0.5

    assert torch.equal(strategy.masks(cond, 2, 6), cut(first))
    noted(strategy, ("cond",), 5, second, run_state)
    assert torch.equal(strategy.masks(cond, 2, 6), cut(first, second))
    uncond = noted(strategy, ("uncond",), 5, other, run_state)
    assert torch.equal(strategy.masks(uncond, 2, 6), cut(first))  # of its call so far, one site
    noted(strategy, ("uncond",), 5, other, run_state)
    assert torch.equal(strategy.masks(uncond, 2, 6), cut(first, second))
    later = noted(strategy, ("uncond",), 6, other, run_state)  # the conditional call of this step is yet to come
    assert torch.equal(strategy.masks(later, 2, 6), cut(other))
    assert strategy.masks(cond, 2, 6) is None  # of an earlier step
    both = noted(strategy, ("cond", "uncond"), 7, torch.cat([first, other]), run_state, rows=4)
    assert torch.equal(strategy.masks(both, 4, 6), cut(first).repeat(2, 1))
    assert MasaCtrl(threshold=0.5).masks(both, 4, 6) is None


def test_maps_that_are_taken():
    """Of a site whose map's larger side is at most ``map_size``; with the layout and the step known."""
    for size, taken in ((3, True), (2, False)):
        run_state = {}
        noted(MasaCtrl(tokens=(1,), map_size=size), ("all",), 5, torch.rand(2, 2, 3), run_state)
        assert bool(run_state) == taken
    given = call(kind="cross")
    known = (1, 5, 10, 500.0, ("all",))
    for step in (None, DiffusionStep(*known, None), DiffusionStep(1, None, *known[2:], Layout(1, 2, 3))):
        MasaCtrl(tokens=(1,)).watch(given.replace(diffusion=step), given.v)
        assert step is None or not step.run_state
    image = call(kind="self")
    MasaCtrl(tokens=(1,)).watch(image, image.v)
    assert not image.diffusion.run_state
    assert MasaCtrl() == MasaCtrl(start_step=4, start_layer=10, threshold=0.1, map_size=16, union=False, tokens=())
