# SPDX-License-Identifier: Apache-2.0
"""SoftPAG: its closed forms equal the maps they stand for; off is bit-exact on ten denoisers; guidance is affine."""

import json

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads.call import AttentionCall, DenoiserCall, DiffusionStep, Layout, Site
from manyheads.diffusion.headhunter import HeadHunter, hunt, ranking
from manyheads.errors import UserError
from manyheads.heads import HeadTable
from manyheads.integrations.diffusers import find_sites
from oracles import diffusion as tiny
from oracles import pipelines
from tolerance import CLOSE, FORMULA, MODEL, assert_close, error, within


def call(branches=("perturbed",), kind="self", layout=None, mask=None):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 11, 4, generator=generator).double() for _ in "qkv")
    step = DiffusionStep(1, 0, 10, 500.0, branches, layout)
    return AttentionCall(Site("x", 0, 0, kind, False), q, k, v, scale=0.4, mask=mask, diffusion=step)


def softened(given, head, u, kind):
    """The output under ``(1 - u) A + u P`` written out."""
    x = given.q @ given.k.transpose(-1, -2) * given.scale
    allowed = torch.ones(11, dtype=torch.bool) if given.mask is None else given.mask[0, 0, 0]
    x = x.masked_fill(~allowed, -torch.inf)
    a, n = x.softmax(-1), 11
    degraded = {
        "pag": torch.eye(n).double().expand_as(a),
        "uniform": (allowed.double() / allowed.sum()).expand_as(a),
        "seg": (given.q.mean(2, keepdim=True) @ given.k.transpose(-1, -2) * given.scale)
        .masked_fill(~allowed, -torch.inf).softmax(-1).expand_as(a),
        "max": torch.nn.functional.one_hot(x.argmax(-1), n).double(),
    }[kind]  # fmt: skip
    mixed = a.clone()
    mixed[:, head] = ((1 - u) * a + u * degraded)[:, head]
    return (mixed @ given.v).transpose(1, 2)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["pag", "uniform", "seg", "max"])
def test_closed_forms_equal_the_maps(kind, masked):
    mask = torch.ones(1, 1, 1, 11, dtype=torch.bool)
    mask[..., 9:] = False
    given = call(mask=mask if masked else None)
    out = given.attend()
    for u in (0.0, 0.3, 1.0):
        strategy = HeadHunter(heads=("0.1", "0.2"), strength=u, perturbation=kind)
        made = strategy.patch(given, out)
        want = softened(given, [1, 2], u, kind)
        assert_close(made, want, FORMULA)
        assert torch.equal(made[:, :, 0], out[:, :, 0])
        if u:
            assert error(made, softened(given, [1, 2], 0.9 * u, kind)) > 1e-3
    plain = call(branches=("cond",))
    assert HeadHunter(heads=("0.1",)).patch(plain, out) is out


def test_scope_leaves_text_alone():
    layout = Layout(1, 2, 4, text=3, text_first=True)
    given = call(kind="joint", layout=layout)
    out = given.attend()
    strategy = HeadHunter(heads=("0.0",), strength=1.0, scope="image")
    made = strategy.patch(given, out)
    assert torch.equal(made[:, :3], out[:, :3]) and torch.equal(made[:, 3:, 0], given.v[:, 0, 3:])
    whole = HeadHunter(heads=("0.0",), strength=1.0).patch(given, out)
    assert torch.equal(whole[:, :, 0], given.v[:, 0])
    with pytest.raises(UserError, match="layout"):
        strategy.patch(call(kind="joint"), out)
    with pytest.raises(UserError, match="heads 0 to 2"):
        HeadHunter(heads=("0.7",)).patch(given, out)


@pytest.mark.parametrize("name", tiny.ALL)
def test_off_is_bit_exact_and_on_acts_without_a_condition(name):
    """On every class, and without classifier-free guidance, where the guider of diffusers does nothing."""
    model = tiny.build(name)
    plain = tiny.forward(name, model)
    sites = find_sites(model)
    with pytest.raises(UserError, match="no attention to act on"), manyheads.use(model, "headhunter:scale=2"):
        pass
    seen = {}

    class Watch(manyheads.strategy.AttentionWatch):
        def watch(self, call, out):
            seen[call.site.name] = call.site

    with manyheads.use(model, Watch()):
        tiny.forward(name, model)
    heads = [f"{site.layer}.0" for site in seen.values() if site.kind != "cross"]
    assert heads and len(sites) == len(seen)
    for off in ("scale=0", "strength=0"):
        with manyheads.use(model, f"headhunter:heads={heads[0]},{off}"):
            assert torch.equal(tiny.forward(name, model), plain)
    for head in dict.fromkeys(heads):
        made = {}
        for scale in (1.0, 2.0, 3.0):
            with manyheads.use(model, f"headhunter:heads={head},strength=1,scale={scale}"):
                made[scale] = tiny.forward(name, model)
        assert error(made[1.0], plain) > 1e-7, head
        assert_close(
            made[3.0] - made[2.0], made[2.0] - made[1.0], within(torch.float32, 4 * MODEL)
        )  # affine in the scale
    assert torch.equal(tiny.forward(name, model), plain)


def test_beside_classifier_free_guidance():
    """In one batch or in two calls, the guided prediction is moved by scale times what perturbing changes."""
    for name in ("dit", "pixart", "wan"):
        make, go = pipelines.RUNS[name]
        pipe = make()
        plain = go(pipe)
        with manyheads.use(pipe, "headhunter:heads=0.0,scale=0"):
            assert torch.equal(go(pipe), plain)
        with manyheads.use(pipe, "headhunter:heads=0.0+1.1,scale=1,strength=1"):
            made = go(pipe)
            assert torch.equal(go(pipe), made)
        assert error(made, plain) > 1e-5 and torch.equal(go(pipe), plain)


@pytest.mark.parametrize("branches", [("uncond", "cond"), ("cond", "uncond"), ("all",)])
def test_push_after_guidance(branches):
    """``u + g (c - u)`` moves by scale (c - degraded), in one batch and in calls of their own."""
    generator = torch.Generator().manual_seed(0)
    rows = len(branches)
    plain = torch.randn(2 * rows, 4, generator=generator)
    degraded = torch.randn(2, 4, generator=generator)
    strategy = HeadHunter(heads=("0.0",), scale=2.0)
    g = None if branches == ("all",) else 5.0

    def denoise(names, given):
        def run(branch="", **changes):
            if branch:
                assert changes["x"].shape[0] == 2
                return degraded
            return given

        step = DiffusionStep(1, 0, 10, 500.0, names, None)
        return strategy.denoise(DenoiserCall(step, {"x": torch.zeros_like(given)}, None, g, run))

    def combined(out):
        if g is None:
            return out
        u, c = (out[2 * branches.index(n) : 2 * branches.index(n) + 2] for n in ("uncond", "cond"))
        return u + g * (c - u)

    cond = plain if g is None else plain[2 * branches.index("cond") :][:2]
    want = combined(plain) + 2.0 * (cond - degraded)
    assert_close(combined(denoise(branches, plain)), want, CLOSE)
    if g is not None:
        apart = torch.cat([denoise((n,), plain[2 * i : 2 * i + 2]) for i, n in enumerate(branches)])
        assert_close(combined(apart), want, CLOSE)
        assert error(combined(apart), combined(plain)) > 1e-2


def test_the_search_finds_planted_heads_and_goes_on():
    worth = {"0.1": 3.0, "2.0": 2.0, "1.3": 1.0}
    tried = []

    def objective(strategy):
        tried.append(strategy.heads)
        return sum(worth.get(head, -1.0) for head in strategy.heads)

    candidates = [f"{layer}.{head}" for layer in range(3) for head in range(4)]
    found, scores = hunt(HeadHunter(), candidates, objective, rounds=2, top=1)
    assert found.heads == ("0.1", "2.0") and len(scores) == 2 and len(scores[1]) == 11
    turned, _ = hunt(HeadHunter(), candidates[::-1], objective, rounds=2, top=1)
    assert turned.heads == found.heads
    count = len(tried)

    def broken(strategy):
        if len(tried) - count >= 15:
            raise KeyboardInterrupt
        return objective(strategy)

    state = {}
    tried.clear()
    count = 0
    with pytest.raises(KeyboardInterrupt):
        hunt(HeadHunter(), candidates, broken, rounds=2, top=1, state=state)
    state = json.loads(json.dumps(state))
    again, more = hunt(HeadHunter(), candidates, objective, rounds=2, top=1, state=state)
    assert again.heads == found.heads and more == scores and len(tried) == 12 + 11


def test_scores_of_a_search_as_a_table(tmp_path):
    worth = {"2.1": 3.0, "5.0": 2.0, "2.0": 1.0, "5.2": -4.0}
    candidates = [f"{layer}.{head}" for layer in (2, 5) for head in range(3)]
    found, scores = hunt(HeadHunter(), candidates, lambda s: sum(worth.get(h, 0.0) for h in s.heads), rounds=2, top=1)
    made = ranking(scores[:1], (2, 5), 3, about={"seed": 0})
    assert made.values.shape == (1, 2, 3) and made.layers == (2, 5) and made.names(made.top(1)) == found.heads[:1]
    assert made.names(made.top(3)) == ("2.1", "5.0", "2.0") and made.names(made.top(1, largest=False)) == ("5.2",)
    assert made.ranks().tolist() == [[3, 1, 4.5], [2, 4.5, 6]] and (made.interval()[1] == float("inf")).all()
    again = HeadTable.from_dict(json.loads(json.dumps(made.to_dict())))
    assert (again.values == made.values).all() and again.about == {"seed": 0}
    assert made.plot(tmp_path / "heads.png").stat().st_size > 0
    second = ranking(scores[1:], (2, 5), 3)  # what was chosen in the first round has no score in the second
    assert second.names(second.top(9)) == ("5.0", "2.0", "2.2", "5.1", "5.2")
    seeds = [{h: worth.get(h, 0.0) + 0.1 * seed * (1 + i) for i, h in enumerate(candidates)} for seed in (-1, 0, 1)]
    several = ranking(seeds, (2, 5), 3)
    low, high = several.interval()
    assert (
        several.names(several.top(2)) == ("2.1", "5.0") and (low < several.mean).all() and (several.mean < high).all()
    )
    assert high[1, 2] - low[1, 2] > high[0, 0] - low[0, 0]
    for bad in ({"3.0": 1.0}, {"2.3": 1.0}):
        with pytest.raises(UserError, match="is not among layers"):
            ranking([bad], (2, 5), 3)
    with pytest.raises(UserError, match="no scores"):
        ranking([], (2, 5), 3)


def test_a_search_of_several_a_round_reports_and_breaks_ties_by_place():
    """The best of a round together, ties by layer and head as numbers, those chosen before left out."""
    candidates = ["10.0", "2.1", "2.0", "0.11", "0.2"]
    told, tried = [], []

    def objective(strategy):
        tried.append(strategy.heads)
        return float(any(head in ("2.1", "10.0") for head in strategy.heads[-1:]))

    found, scores = hunt(
        HeadHunter(heads=("2.0",)), candidates, objective, rounds=2, top=2, progress=lambda *x: told.append(x)
    )
    assert found.heads == ("2.0", "2.1", "10.0", "0.2", "0.11")
    assert tried[:4] == [("2.0", head) for head in ("10.0", "2.1", "0.11", "0.2")]
    assert tried[4:] == [("2.0", "2.1", "10.0", head) for head in ("0.11", "0.2")]
    assert told == [(1, 10), (2, 10), (4, 10), (5, 10), (9, 10), (10, 10)]
    assert [set(turn) for turn in scores] == [{"10.0", "2.1", "0.11", "0.2"}, {"0.11", "0.2"}]
    many = [f"0.{head}" for head in range(30)]
    once, turns = hunt(HeadHunter(), [*many, *candidates[:2]], objective)
    assert once.heads == ("2.1", "10.0", *many[:22]) and len(turns) == 1  # one round, two dozen at most
    resumed = {
        "chosen": ["2.0", "2.1", "10.0"],
        "scores": [{"10.0": 1.0, "2.1": 1.0, "0.11": 0.0, "0.2": 0.0, "done": 1.0}],
    }
    told.clear(), tried.clear()
    again, _ = hunt(
        HeadHunter(), candidates, objective, rounds=2, top=2, progress=lambda *x: told.append(x), state=resumed
    )
    assert again.heads == found.heads and len(tried) == 2 and told == [(9, 10), (10, 10)] and "done" not in scores[0]


def test_defaults_and_refusals():
    assert HeadHunter() == HeadHunter(heads=(), scale=3.0, strength=0.25, perturbation="pag", scope="all")
    for strength in (-0.01, 1.01):
        with pytest.raises(UserError, match="share from 0 to 1"):
            HeadHunter(strength=strength)
    assert HeadHunter(strength=0.0).strength == 0 and HeadHunter(strength=1.0).strength == 1
    chosen = HeadHunter(heads=("3.1",))
    assert chosen.selects(Site("x", 0, 3, "self", False)) and not chosen.selects(Site("x", 0, 2, "self", False))
    assert not chosen.selects(Site("x", 0, 3, "cross", False)) and chosen.selects(Site("x", 0, 3, "joint", False))


@pytest.mark.parametrize("kind", ["uniform", "seg", "max"])
def test_masks_of_each_head_and_of_text(kind):
    """A mask for every head, and keys of text that are not perturbed: the degraded map is over what is left."""
    layout = Layout(1, 2, 4, text=3, text_first=True)
    mask = torch.rand(2, 3, 11, 11, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[..., 3] = True
    mask[:, 1, :, 6] = False  # a key that nobody of head 1 sees, and all others do
    mask[:, [0, 2], 0, 6] = True
    given = call(kind="joint", layout=layout, mask=mask)
    strategy = HeadHunter(heads=("0.1", "0.2"), perturbation=kind, strength=1.0, scope="image")
    made, out = strategy.patch(given, given.attend()), given.attend()
    assert torch.equal(made[:, :3], out[:, :3]) and torch.equal(made[:, :, 0], out[:, :, 0])
    q, k, v = (x[:, :, 3:] for x in (given.q, given.k, given.v))
    for head in (1, 2):
        seen = mask[:, head, :, 3:].any(1)
        scores = (
            (q[:, head].mean(1, keepdim=True) if kind == "seg" else q[:, head]) @ k[:, head].transpose(-1, -2) * 0.4
        )
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        want = {
            "uniform": seen.double()[:, None] / seen.sum(-1)[:, None, None], "seg": scores.softmax(-1),
            "max": torch.nn.functional.one_hot(scores.argmax(-1), 8).double(),
        }[kind] @ v[:, head]  # fmt: skip
        assert_close(made[:, 3:, head], want.expand(2, 8, 4), FORMULA)


def test_nothing_is_predicted_again_where_nothing_would_change():
    calls, given = [], torch.zeros(4, 3)

    def denoise(strategy, branches, guidance):
        def run(branch="", **changes):
            calls.append(branch)
            return torch.ones(len(changes.get("x", given)), 3)

        step = DiffusionStep(1, 0, 10, 500.0, branches, None)
        return strategy.denoise(DenoiserCall(step, {"x": given}, None, guidance, run))

    full = HeadHunter(heads=("0.0",), scale=1.0, strength=0.5)
    for strategy, branches, guidance in (
        (HeadHunter(scale=1.0), ("all",), None), (HeadHunter(heads=("0.0",), scale=0.0), ("all",), None),
        (HeadHunter(heads=("0.0",), strength=0.0), ("all",), None), (full, ("uncond",), 5.0),
    ):  # fmt: skip
        denoise(strategy, branches, guidance)
    assert calls == [""] * 4
    calls.clear()
    for branches, guidance in ((("all",), None), (("cond",), 5.0), (("uncond", "cond"), 5.0), (("all",), 5.0)):
        denoise(full, branches, guidance)
    assert calls == ["", "perturbed"] * 4
