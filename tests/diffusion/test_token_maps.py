# SPDX-License-Identifier: Apache-2.0
"""Maps of words: equal to columns of the whole map in float64, small, and nothing is changed by keeping them."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads.call import AttentionCall, DiffusionStep, Layout, Site
from manyheads.diffusion._maps import merged, scaled
from manyheads.diffusion.token_maps import TokenMaps, WordMaps, maps, places
from manyheads.errors import UserError
from manyheads.spec import parse
from manyheads.strategy import AttentionWatch
from oracles import diffusion as tiny
from oracles import pipelines
from tolerance import CLOSE, assert_close, error, nearly

TEXT = 6
# Where the text of a joint sequence stands; cross-attention elsewhere.
FIRST = {"sd3": False, "flux": True, "hunyuan": False, "cogvideox": True}
FRAMES = {"wan": 3, "latte": 3, "hunyuan": 3, "cogvideox": 3, "ltx": 3}


class Note(AttentionWatch):
    """Keeps every call: queries and keys."""

    def watch(self, call, out):
        call.state.setdefault("calls", []).append(call)


def dense(call):
    """The whole map ``[B, H, T, S]`` in float64."""
    x = call.q.double() @ call.k.double().transpose(-1, -2) * call.scale
    x = x if call.bias is None else x + call.bias.double()
    x = x if call.mask is None else x.masked_fill(~call.mask, -torch.inf)
    return x.softmax(-1)


def picture(name, call, image_rows):
    """``[B, H, N, C]`` of image tokens as ``[rows, C, frames, h, w]``, mean over heads, cell by cell."""
    frames, x = FRAMES.get(name, 1), image_rows.mean(1)
    side = 8 if name == "unet" and x.shape[1] == 64 else 4
    apart = frames > 1 and x.shape[1] == side * side  # a frame is a row of the batch
    rows = x.shape[0] // frames if apart else x.shape[0]
    made = torch.zeros(rows, x.shape[2], frames, side, side).double()
    for r in range(rows):
        for f in range(frames):
            for y in range(side):
                for z in range(side):
                    token = y * side + z
                    made[r, :, f, y, z] = x[r * frames + f, token] if apart else x[r, f * side * side + token]
    return made


def truth(name, call, tokens):
    """Maps of words that one call means; None where text is not looked at."""
    whole = dense(call)
    if name in FIRST:
        if whole.shape[2] == TEXT:
            return None
        count = whole.shape[2] - TEXT
        rows = whole[:, :, TEXT:] if FIRST[name] else whole[:, :, :count]
        return picture(name, call, rows[..., [t if FIRST[name] else count + t for t in tokens]])
    return picture(name, call, whole[..., list(tokens)]) if whole.shape[3] == TEXT else None


def mean_at(port, strategy, site, what="words", step=None):
    (kept,) = port.state(strategy)[site].values()
    return kept["means"][what, step].value.mean(1)


@pytest.mark.parametrize("name", ["pixart", "sd3", "flux", "latte", "unet", "wan", "hunyuan", "cogvideox", "ltx"])
def test_words_equal_the_whole_map(name):
    model, note, strategy = tiny.tiny(name), Note(), TokenMaps(tokens=(1, 3))
    plain = tiny.forward(name, model)
    with manyheads.use(model, note, strategy) as port:
        assert torch.equal(tiny.forward(name, model), plain)
    seen, wrong, layers = 0, [], {}
    for site, kept in port.kept(note):
        want = truth(name, kept["all"]["calls"][0], (1, 3))
        if want is None:
            assert not any(b for b in port.state(strategy)[site.name].values())
            continue
        got = mean_at(port, strategy, site.name)
        assert_close(got.double(), want, CLOSE)
        wrong += [error(got.double(), truth(name, kept["all"]["calls"][0], t)) for t in ((2, 3), (3, 1))]
        wrong += [error(got.double(), want.transpose(-1, -2)), error(got.double(), want.flip(0))]
        layers.setdefault(site.layer, []).append(want)
        seen += 1
    assert seen >= 1 and min(wrong) > 1e-3
    found = maps(port, strategy, words=("<a>", "b"))
    large = max(x.shape[-1] for each in layers.values() for x in each)
    grown = [x.repeat_interleave(large // x.shape[-1], -1).repeat_interleave(large // x.shape[-2], -2)
             for each in layers.values() for x in each]  # fmt: skip
    assert_close(found.maps["all"].double(), torch.stack(grown).mean(0), CLOSE)
    assert torch.equal(found.of("b"), found.maps["all"][:, 1]) and set(found.layers["all"]) == set(layers)
    first = next(iter(layers))
    assert_close(found.of("<a>", layer=first).double().mean(), layers[first][0][:, 0].mean(), CLOSE)


@pytest.mark.parametrize("name", ["dit", "sd3", "flux", "latte", "unet", "wan", "hunyuan"])
def test_what_the_image_looks_at_equals_the_whole_map(name):
    """Received attention, and rows of image tokens: the second is in the last row of the picture, off the diagonal."""
    model, note = tiny.tiny(name), Note()
    frames, side = FRAMES.get(name, 1), 8 if name == "unet" else 4
    places = (1, (frames - 1) * side * side + (side - 1) * side + 2)
    strategy = TokenMaps(received=True, queries=places)
    plain = tiny.forward(name, model)
    with manyheads.use(model, note, strategy) as port:
        assert torch.equal(tiny.forward(name, model), plain)
    seen = 0
    for site, kept in port.kept(note):
        call = kept["all"]["calls"][0]
        whole, count = dense(call), call.q.shape[2]
        if site.kind == "cross" or "temporal" in site.name or "refiner" in site.name:
            assert not any(b for b in port.state(strategy).get(site.name, {}).values())
            continue
        at = slice(0, count)
        if name in FIRST and count > TEXT:
            at = slice(TEXT, count) if FIRST[name] else slice(0, count - TEXT)
        whole = whole[:, :, at, at]
        got = mean_at(port, strategy, site.name, "received").double()
        assert_close(got, picture(name, call, whole.sum(2)[..., None]), CLOSE)
        assert error(got, picture(name, call, whole.sum(3)[..., None])) > 1e-3
        n, here = whole.shape[2], 8 if name == "unet" and whole.shape[2] == 64 else 4
        rows = mean_at(port, strategy, site.name, "queries").double()
        for i, place in enumerate(places):
            f, y, x = place // side**2, place // side % side, place % side
            cell = (y * here // side) * here + x * here // side
            if frames > 1 and n == side * side:
                want = picture(name, call, n * whole[:, :, cell, :, None])
                other = [g for g in range(frames) if g != f]
                assert not rows[:, i, other].any() and want[:, 0, other].any()
                want[:, :, other] = 0
            else:
                want = picture(name, call, n * whole[:, :, f * side**2 + cell if frames > 1 else cell, :, None])
            assert_close(rows[:, i : i + 1], want, CLOSE)
        assert error(rows[:, 0], rows[:, 1]) > 1e-3
        seen += 1
    assert seen
    found = maps(port, strategy)
    assert found.names == ("received", f"from {places[0]}", f"from {places[1]}")
    if name in ("dit", "unet"):
        assert_close(found.of("received").mean(), torch.tensor(1.0), CLOSE)
        assert_close(found.of(found.names[1]).mean(), torch.tensor(1.0), CLOSE)


@pytest.mark.parametrize("name", ["pixart", "wan"])
def test_a_running_mean_is_the_mean_of_all_steps(name):
    """In one batch and in calls of their own; steps, branches and rows stand where they belong."""
    make, go = pipelines.RUNS[name]
    pipe = make()
    plain, note = go(pipe), Note()
    every = TokenMaps(tokens=(0, 4), per_step=True)
    some = TokenMaps(tokens=(0, 4), steps=(1, 2), per_head=True)
    with manyheads.use(pipe, note, every, some) as port:
        go(pipe, guidance=7.0)  # another run before: forgotten
        assert torch.equal(go(pipe), plain)
    want = {}
    for site, kept in port.kept(note):
        if site.kind != "cross":
            continue
        for key, state in kept.items():
            branches = key.split("+")
            for call in state["calls"][4:]:
                each = truth(name, call, (0, 4)).chunk(len(branches))
                for branch, x in zip(branches, each, strict=True):
                    want.setdefault((branch, call.diffusion.index), []).append(x)
    found, part = maps(port, every), maps(port, some)
    assert set(found.maps) == {"cond", "uncond"} == set(part.maps) and part.steps == {}
    for branch in found.maps:
        steps = [torch.stack(want[branch, i]).mean(0) for i in range(4)]
        assert_close(found.maps[branch].double(), torch.stack(steps).mean(0), CLOSE)
        assert_close(part.maps[branch].double(), (steps[1] + steps[2]) / 2, CLOSE)
        assert error(found.maps[branch].double(), steps[0]) > 1e-5
        assert list(found.steps[branch]) == [0, 1, 2, 3]
        for i, step in enumerate(steps):
            assert_close(found.of("token 4", branch, step=i).double(), step[:, 1], CLOSE)
            assert error(found.of("token 4", branch, step=i).double(), steps[i - 1][:, 1]) > 1e-5
    assert error(found.maps["cond"], found.maps["uncond"]) > 1e-3
    assert torch.equal(found.of("token 0"), found.of("token 0", "cond"))
    with manyheads.use(pipe, every) as port:
        go(pipe)
        go(pipe, guidance=1.0)
    assert set(maps(port, every).maps) == ({"cond"} if name == "wan" else {"all"})


@pytest.mark.parametrize("first", [False, True])
def test_masks_and_biases_of_rows(first):
    """A mask and a bias that differ from query to query, in a joint sequence of 12 image and 3 text tokens."""
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 15, 4, generator=source) for _ in "qkv")
    mask, bias = torch.rand(2, 1, 15, 15, generator=source) > 0.3, torch.randn(1, 2, 15, 15, generator=source)
    step = DiffusionStep(1, 0, 10, 500.0, ("all",), Layout(1, 3, 4, text=3, text_first=first))
    call = AttentionCall(
        Site("x", 0, 0, "joint", False), q, k, v, scale=0.5, mask=mask, bias=bias, diffusion=step, state={}
    )
    TokenMaps(tokens=(0, 2), received=True, queries=(7,)).watch(call, v)
    image, text = (slice(3, 15), [0, 2]) if first else (slice(0, 12), [12, 14])
    whole = dense(call)[:, :, image].mean(1)
    want = {
        "words": whole[..., text].mT,
        "received": whole[..., image].sum(1)[:, None],
        "queries": 12 * whole[:, 7:8, image],
    }
    for what, x in want.items():
        got = call.state["means"][what, None].value[:, 0, :, 0].flatten(2)
        assert_close(got.double(), x, CLOSE)
        for change in ({"mask": None}, {"bias": None}, {"mask": mask.flip(2)}):
            other = dense(call.replace(**change))[:, :, image].mean(1)
            assert error(other[..., text].mT, want["words"]) > 1e-3


def test_heads():
    model, note, strategy = tiny.tiny("pixart"), Note(), TokenMaps(tokens=(2,), per_head=True)
    with manyheads.use(model, note, strategy) as port:
        tiny.forward("pixart", model)
    cross = {site.layer: kept["all"]["calls"][0] for site, kept in port.kept(note) if site.kind == "cross"}
    want = [picture("pixart", None, dense(cross[n])[:, [h], :, 2:3]) for n, h in ((0, 1), (1, 0))]
    found = maps(port, strategy, heads=("0.1", "1.0"))
    assert_close(found.maps["all"].double(), (want[0] + want[1]) / 2, CLOSE)
    assert_close(maps(port, strategy, heads=("0.1",)).maps["all"].double(), want[0], CLOSE)
    assert error(maps(port, strategy).maps["all"].double(), want[0]) > 1e-3
    with pytest.raises(UserError, match="heads 0 to 1, not 5"):
        maps(port, strategy, heads=("0.5",))
    with pytest.raises(UserError, match="per_head=true"):
        maps(port, TokenMaps(tokens=(2,)), heads=("0.1",))
    with pytest.raises(UserError, match="2 names for 1 tokens"):
        maps(port, strategy, words=("a", "b"))


def made_up(side, strategy, heads=2, text=300, kind="cross", state=None, index=0, **changes):
    """One call over ``side * side`` image tokens, watched; its scratch."""
    source = torch.Generator().manual_seed(side + index)
    q, k = (torch.randn(2, heads, n, 4, generator=source) for n in (side * side, text))
    step = DiffusionStep(1, index, 10, 500.0, ("uncond", "cond"), Layout(1, side, side))
    kept = {} if state is None else state
    call = AttentionCall(Site("x", 0, 0, kind, False), q, k, k, scale=0.5, diffusion=step, state=kept)
    strategy.watch(call.replace(**changes), call.attend().detach())
    return kept


def held(kept):
    """Bytes of all storage that a scratch holds on to."""
    return sum(mean.total.untyped_storage().nbytes() for mean in kept["means"].values())


def test_memory_is_that_of_the_words_alone():
    """Exactly rows x words x image tokens x 4 bytes, whatever the heads, the text and the steps."""
    strategy = TokenMaps(tokens=(1, 250))
    for side in (8, 16, 32):
        kept = None
        for index in range(3):
            kept = made_up(side, strategy, index=index, state=kept)
        assert held(kept) == 2 * 2 * side * side * 4
        assert held(kept) < 2 * side * side * 300 * 4 / 10  # of the map of one head
    assert held(made_up(16, TokenMaps(tokens=(1, 2), per_head=True))) == 2 * 2 * 2 * 256 * 4
    looks = TokenMaps(received=True, queries=(3, 5, 7))
    assert held(made_up(16, looks, kind="self", text=256)) == 2 * (1 + 3) * 256 * 4


def test_spec():
    strategy = parse("token_maps:tokens=2+5,received=true,queries=7,steps=0-2+9,layers=1")
    want = TokenMaps(tokens=(2, 5), received=True, queries=(7,), steps=(0, 1, 2, 9), layers=(1,))
    assert strategy == want and parse(strategy.spec) == want


def test_mask_and_mean_of_unlike_grids():
    x = torch.tensor([[[0.0, 1, 2], [3, 4, 5], [6, 7, 8]]])
    both = merged([x, torch.tensor([[[2.0, 4], [6, 8]]])])
    assert both.shape == (1, 3, 3) and both[0, 0, 0] == 1.0 and both[0, 2, 2] == 8.0 and both[0, 1, 1] == 3.0
    assert merged([x[..., :2, :2]], (4, 4))[0, :, 0].tolist() == [0, 0, 3, 3]
    assert scaled(x).max() == nearly(1) and scaled(x).min() == 0
    rows = torch.cat([x, 10 * x])[:, None, None]  # a row is scaled by itself
    found = WordMaps(("cat", "dog"), ("", ""), {"cond": torch.cat([rows, rows], 1)}, {}, {})
    want = (x > 6).expand(2, -1, -1)[:, None]
    assert torch.equal(found.mask(["cat"], 0.8), want) and torch.equal(found.mask(["cat", "dog"], 0.8), want)
    assert not torch.equal(found.mask(["cat"], 0.5), want)
    for bad in ({"name": "cow"}, {"name": "cat", "branch": "all"}, {"name": "cat", "layer": 3, "step": 1}):
        with pytest.raises(UserError, match=r"no map of|not by both"):
            found.of(**bad)
    with pytest.raises(UserError, match="is kept at 3"):
        found.of("cat", step=3)


def test_refusals():
    model = tiny.tiny("pixart")
    with pytest.raises(UserError, match="nothing is asked for"), manyheads.use(model, "token_maps"):
        pass
    for spec, fault in (
        ("tokens=6", "tokens 0 to 5, not 6"), ("tokens=-1", "tokens 0 to 5, not -1"), ("queries=16", "tokens 0 to 15"),
        ("queries=-1", "tokens 0 to 15, not -1"), ("queries=3+-1+2", "tokens 0 to 15"),
        ("tokens=1,steps=0-3", "open the pipeline"), ("tokens=1,per_step=true", "open the pipeline"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=fault), manyheads.use(model, f"token_maps:{spec}"):
            tiny.forward("pixart", model)
    with pytest.raises(UserError, match="no attention to act on"), manyheads.use(model, "token_maps:tokens=1,layers=9"):
        pass
    joint = tiny.tiny("flux")
    with pytest.raises(UserError, match="tokens 0 to 5, not 20"), manyheads.use(joint, "token_maps:tokens=20"):
        tiny.forward("flux", joint)
    with pytest.raises(UserError, match="layout of x is not known"):
        made_up(8, TokenMaps(tokens=(1,)), diffusion=None)
    strategy = TokenMaps(tokens=(1,), text=7)
    with manyheads.use(model, strategy) as port:
        tiny.forward("pixart", model)
    with pytest.raises(UserError, match="kept nothing"):
        maps(port, strategy)


def test_two_contexts_at_one_site():
    """As adapters for image prompts have them: refused, unless one is named by its length."""
    kept = made_up(8, TokenMaps(tokens=(1,)))
    with pytest.raises(UserError, match="text="):
        made_up(8, TokenMaps(tokens=(1,)), text=16, state=kept)
    named = TokenMaps(tokens=(1,), text=300)
    kept = made_up(8, named)
    before = kept["means"]["words", None].value.clone()
    made_up(8, named, text=16, state=kept)
    assert torch.equal(kept["means"]["words", None].value, before) and kept["means"]["words", None].count == 1


def test_words_of_several_tokens():
    """Places by a real tokenizer's offsets; the shares of a word's tokens are added up."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(Path(manyheads.__file__).parent / "models" / "default"))
    prompt = "A marmalade cat, a concatenation, and a CAT"
    ids = tokenizer(prompt)["input_ids"]
    for word, said in (("cat", " cat CAT"), ("marmalade cat", " marmalade cat"), ("concatenation", " concatenation")):
        assert tokenizer.decode([ids[i] for i in places(tokenizer, prompt, word)]) == said
    assert len(places(tokenizer, prompt, "marmalade cat")) > 2
    with pytest.raises(UserError, match="is not in the prompt"):
        places(tokenizer, prompt, "at")
    with pytest.raises(UserError, match="give places"):
        places(object(), prompt, "cat")

    model, strategy = tiny.tiny("flux"), TokenMaps(tokens=(0, 2, 5), received=True)
    with manyheads.use(model, strategy) as port:
        tiny.forward("flux", model)
    plain, found = maps(port, strategy), maps(port, strategy, words={"dog": (5,), "big cat": (0, 2)})
    assert found.names == ("dog", "big cat", "received") and len(found.units) == 3
    assert torch.equal(found.of("dog"), plain.of("token 5")) and torch.equal(found.of("received"), plain.of("received"))
    assert_close(found.of("big cat"), plain.of("token 0") + plain.of("token 2"), CLOSE)
    with pytest.raises(UserError, match=r"kept tokens 0\+2\+5, not \[3\]"):
        maps(port, strategy, words={"cow": (3,)})


def test_sites_and_calls_that_are_taken():
    """Words where there is text, what the image looks at where there is an image; neither over time nor in the text."""

    def chosen(**wanted):
        strategy = TokenMaps(layers=(0,), **wanted)
        return {kind for kind in ("self", "cross", "joint") if strategy.selects(Site("x", 0, 0, kind, False))}

    assert chosen(tokens=(1,)) == {"cross", "joint"}
    assert chosen(received=True) == chosen(queries=(1,)) == {"self", "joint"}
    assert chosen(tokens=(1,), received=True) == {"self", "cross", "joint"}
    assert not TokenMaps(tokens=(1,), layers=(0,)).selects(Site("x", 0, 1, "cross", False))
    for axis, taken in (("time", False), ("text", False), ("all", True), ("space", True)):
        step = DiffusionStep(1, 0, 10, 500.0, ("uncond", "cond"), Layout(1, 8, 8), axis)
        assert bool(made_up(8, TokenMaps(tokens=(1,)), diffusion=step)) == taken
    for index, taken in ((0, False), (1, True), (2, False)):
        assert bool(made_up(8, TokenMaps(tokens=(1,), steps=(1,)), index=index)) == taken
    assert not made_up(7, TokenMaps(tokens=(1,)), diffusion=DiffusionStep(1, 0, 10, 5.0, ("all",), Layout(1, 8, 8)))
    assert not made_up(8, TokenMaps(tokens=(1,)), diffusion=DiffusionStep(1, 0, 10, 5.0, ("all",), Layout(3, 16, 16)))


def test_a_new_run_begins_anew_and_large_sites_may_be_left_out():
    """Two sites of 4 x 4 and 8 x 8, the finer twice in a run; another run before is forgotten."""
    strategy = TokenMaps(tokens=(1, 2), per_step=True)
    fine = made_up(8, strategy, state=None, diffusion=DiffusionStep(1, 0, 10, 5.0, ("uncond", "cond"), Layout(1, 8, 8)))
    for index in (0, 1):
        step = DiffusionStep(2, index, 10, 5.0, ("uncond", "cond"), Layout(1, 8, 8))
        made_up(8, strategy, state=fine, index=index, diffusion=step)
    coarse = made_up(4, strategy, diffusion=DiffusionStep(2, 0, 10, 5.0, ("uncond", "cond"), Layout(1, 4, 4)))
    old = made_up(4, strategy, index=5, diffusion=DiffusionStep(1, 0, 10, 5.0, ("uncond", "cond"), Layout(1, 4, 4)))
    assert {key: mean.count for key, mean in fine["means"].items()} == {
        ("words", None): 2, ("words", 0): 1, ("words", 1): 1
    }  # fmt: skip
    sites = [Site(name, i, layer, "cross", False) for i, (name, layer) in enumerate((("a", 0), ("b", 1), ("c", None)))]

    class Port:
        @staticmethod
        def kept(strategy):
            return [
                (site, {"uncond+cond": kept, "none": {}}) for site, kept in zip(sites, (fine, coarse, old), strict=True)
            ]

    found, small = maps(Port, strategy), maps(Port, strategy, size=4)
    mean = {name: kept["means"]["words", None].value.mean(1) for name, kept in (("fine", fine), ("coarse", coarse))}
    for row, branch in enumerate(("uncond", "cond")):
        grown = mean["coarse"][row : row + 1].repeat_interleave(2, -1).repeat_interleave(2, -2)
        assert_close(found.maps[branch], (mean["fine"][row : row + 1] + grown) / 2, CLOSE)
        assert_close(small.maps[branch], mean["coarse"][row : row + 1], CLOSE)
    assert set(found.layers["cond"]) == {0, 1} and set(small.layers["cond"]) == {1}
    assert found.names == ("token 1", "token 2") and found.units == ("share of attention",) * 2
    assert list(found.steps["cond"]) == [0, 1] and list(small.steps["cond"]) == [0]
    assert_close(found.of("token 2", layer=0), mean["fine"][1:, 1], CLOSE)
    with pytest.raises(UserError, match="kept nothing"):
        maps(Port, strategy, size=3)
    with pytest.raises(UserError, match=r"not \[\] that words are made of"):
        maps(Port, strategy, words={"a": ()})
