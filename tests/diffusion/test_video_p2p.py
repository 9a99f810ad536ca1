# SPDX-License-Identifier: Apache-2.0
"""Video-P2P: maps are carried over by the formula, the source comes out as it was, equal prompts change nothing."""

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads  # noqa: E402
from manyheads.call import AttentionCall, DiffusionStep, Layout, Prompt, Site  # noqa: E402
from manyheads.diffusion._alignment import changed, common, factors, refinement, replacement  # noqa: E402
from manyheads.diffusion._inversion import fitted  # noqa: E402
from manyheads.diffusion.video_p2p import VideoP2P  # noqa: E402
from manyheads.diffusion.video_p2p._blend import BlendMaps, as_latents  # noqa: E402
from manyheads.diffusion.video_p2p._pair import PromptPairs  # noqa: E402
from manyheads.errors import UserError  # noqa: E402
from manyheads.integrations.prompts import prompts_of  # noqa: E402
from manyheads.models.scenes import build  # noqa: E402
from tolerance import FORMULA, assert_close, error, is_far  # noqa: E402

SIZE = 6


def prompt(text, ids=None, special=True, **more):
    """One token a word, two of a word with a hyphen; a special token at either end."""
    words = text.split()
    pieces = [(part, n) for n, word in enumerate(words) for part in word.split("-")]
    known = {name: i for i, name in enumerate("a b c d e f g".split(), 10)}
    tokens = [known[part] for part, _ in pieces] if ids is None else list(ids)
    at = [n for _, n in pieces]
    if special:
        tokens, at = [1, *tokens, 2], [-1, *at, -1]
    return Prompt(tuple(tokens), tuple(at), tuple(words), **more)


def pairs(source="a b", target="a c", edit="auto", weights=(), words=()):
    return PromptPairs([((prompt(source),), (prompt(target),))], edit, list(weights), list(words))


def call(kind="cross", branches=("uncond", "cond"), tokens=4, text=SIZE, index=0, frames=1, rows=2, axis="all"):
    generator = torch.Generator().manual_seed(0)
    joint = text if kind == "joint" else 0
    keys = {"cross": text, "self": tokens, "joint": tokens + text}[kind]
    layout = Layout(frames, 2, tokens // 2, joint, True)
    shape = (rows * len(branches), 3)
    q = torch.randn(*shape, tokens + joint, 4, generator=generator).double()
    k, v = (torch.randn(*shape, keys, 4, generator=generator).double() for _ in "kv")
    step = DiffusionStep(1, index, 10, 500.0, branches, layout, axis)
    return AttentionCall(Site("blocks.0", 0, 0, kind, False), q, k, v, scale=0.4, diffusion=step)


def opened(strategy, given, known):
    strategy._kept(given.diffusion).update(pairs=known, maps=BlendMaps())
    return strategy


def maps_of(given):
    return (given.q @ given.k.transpose(-1, -2) * 0.4).softmax(-1)


def output(maps, v):
    return (maps @ v).transpose(-3, -2)


def test_longest_common_subsequences():
    assert (
        common("abcd", "xbyd") == [(1, 1), (3, 3)]
        and common("", "ab") == []
        and common("aab", "ab") == [(0, 0), (2, 1)]
    )
    for a, b in (("abcabba", "cbabac"), ("aabb", "abab")):
        best = max(
            (bin(m).count("1") for m in range(2 ** len(a)) if _within([x for i, x in enumerate(a) if m >> i & 1], b)),
        )
        found = common(a, b)
        assert len(found) == best and all(a[i] == b[j] for i, j in found)
        assert all(i < k and j < n for (i, j), (k, n) in pairwise(found))


def _within(part, whole):
    rest = iter(whole)
    return all(x in rest for x in part)


def test_replacement_keeps_rows():
    same, own = replacement([prompt("a b")], [prompt("a b")], SIZE)
    assert torch.equal(same, torch.eye(SIZE).double()) and not own.any()
    swap, _ = replacement([prompt("a b")], [prompt("a c")], SIZE)
    assert torch.equal(swap, same)  # one token for one: columns stay in place
    for source, target in (("a b c", "a d-e c"), ("a d-e c", "a b c"), ("a-b", "c-d-e")):
        matrix, _ = replacement([prompt(source)], [prompt(target)], 8)
        assert_close(matrix.sum(1), 1.0, FORMULA)  # rows of a map keep their sum
    matrix, _ = replacement([prompt("a b c")], [prompt("a d-e c")], 8)
    assert matrix[2, 2] == matrix[2, 3] == 0.5 and matrix[3, 4] == 1 and matrix[4, 5] == 1
    assert matrix[5:, 6:].sum() == 3 and matrix[5, 6] == 0.5  # three of padding over two
    two = [prompt("a b", room=SIZE), prompt("a b", start=SIZE)]
    other = [prompt("a c", room=SIZE), prompt("a d-e", start=SIZE)]
    matrix, _ = replacement(two, other, 2 * SIZE)
    assert torch.equal(matrix[:SIZE, :SIZE], same) and not matrix[:SIZE, SIZE:].any() and matrix[8, 8] == 0.5
    with pytest.raises(UserError, match="edit=refine"):
        replacement([prompt("a b")], [prompt("a b c")], SIZE)
    with pytest.raises(UserError, match="no part of the 3"):
        replacement([prompt("a b")], [prompt("a c")], 3)


def test_refinement_takes_what_is_common():
    same, own = refinement([prompt("a b")], [prompt("a b")], SIZE)
    assert torch.equal(same, torch.eye(SIZE).double()) and not own.any()
    matrix, own = refinement([prompt("a c")], [prompt("a b c")], SIZE)
    assert own.tolist() == [0, 0, 1, 0, 0, 0]
    assert [(i, j) for i, j in matrix.nonzero().tolist()] == [(0, 0), (1, 1), (2, 3), (3, 4), (5, 5)]


def test_words_that_differ():
    assert changed([prompt("a b c")], [prompt("a d-e c")]) == ([2], [2, 3])
    assert changed([prompt("a b")], [prompt("a b")]) == ([], [])
    assert changed([prompt("a b c")], [prompt("a d-e c")], ["C"]) == ([3], [4])
    assert changed([prompt("a b c")], [prompt("a b d")], ["a b"]) == ([1, 2], [1, 2])
    with pytest.raises(UserError, match="'x' is neither"):
        changed([prompt("a b")], [prompt("a c")], ["x"])
    assert factors([prompt("a d-e")], [("d-e", 2.0)], SIZE).tolist() == [1, 1, 2, 2, 1, 1]
    with pytest.raises(UserError, match="not in the target"):
        factors([prompt("a b")], [("c", 2.0)], SIZE)
    assert VideoP2P(reweight=("a b*2", "c*-0.5")).factors() == [("a b", 2.0), ("c", -0.5)]
    for wrong in ("ghost", "*2", "ghost*x"):
        with pytest.raises(UserError, match="no word with its factor"):
            VideoP2P(reweight=(wrong,))
    assert pairs("a b", "a b", weights=[("b", 2.0)]).differing() == [([2], [2])]


@pytest.mark.parametrize("branches", [("uncond", "cond"), ("cond", "uncond"), ("all",)])
@pytest.mark.parametrize(
    ("source", "target", "weights"),
    [
        ("a b", "a c", ()),
        ("a c", "a b c", ()),
        ("a b", "a d-e", ()),
        ("a b", "a c", [("c", 3.0)]),
        ("a c", "a b c", [("b", 2.0)]),
    ],
)
def test_columns_are_carried_over(branches, source, target, weights):
    given, known = call(branches=branches), pairs(source, target, weights=weights)
    made = opened(VideoP2P(), given, known).attend(given)
    plain, maps = output(maps_of(given), given.v), maps_of(given)
    first = 2 * branches.index("cond") if "cond" in branches else 0
    matrix, own, factor = (x[0] for x in known.columns(SIZE, given.v))
    columns = torch.stack([maps[first] @ matrix[:, j] + own[j] * maps[first + 1][..., j] for j in range(SIZE)], -1)
    assert_close(made[first + 1], output(columns * factor, given.v[first + 1]), FORMULA)
    others = [row for row in range(len(given.q)) if row != first + 1]
    assert_close(made[others], plain[others], FORMULA)
    assert is_far(made[first + 1], plain[first + 1], FORMULA)
    assert is_far(made[first + 1], output(columns.flip(-1) * factor, given.v[first + 1]), FORMULA)
    total = (columns * factor).sum(-1)
    if source == "a b":  # replaced: rows sum to 1, and with factors to 1 + sum (c - 1) p
        assert_close(total, 1 + (columns * (factor - 1)).sum(-1), FORMULA)


@pytest.mark.parametrize("axis", ["all", "time"])
def test_self_maps_are_the_sources(axis):
    given = call("self", axis=axis)
    made = opened(VideoP2P(), given, pairs()).attend(given)
    assert_close(made[3], output(maps_of(given)[2], given.v[3]), FORMULA)
    assert_close(made[:3], output(maps_of(given), given.v)[:3], FORMULA)
    assert is_far(made[3], output(maps_of(given)[3], given.v[3]), FORMULA)
    for maps, acts in (("temporal", axis == "time"), ("spatial", axis == "all")):
        assert (opened(VideoP2P(self_maps=maps), given, pairs()).attend(given) is not None) == acts


@pytest.mark.parametrize(("words", "own"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("source", "target", "weights"), [("a b", "a c", [("c", 3.0)]), ("a c", "a b c", ())])
def test_joint_attention_is_taken_apart(words, own, source, target, weights):
    given, known = call("joint"), pairs(source, target, weights=weights)
    strategy = VideoP2P(cross_steps=float(words), self_steps=float(own))
    made = opened(strategy, given, known).attend(given)
    (s, t), v, plain = maps_of(given)[2:, :, SIZE:], given.v[3], output(maps_of(given), given.v)
    matrix, mine, factor = (x[0] for x in known.columns(SIZE, given.v))
    text = s[..., :SIZE] @ matrix + t[..., :SIZE] * mine if words else t[..., :SIZE]
    image = (s if own else t)[..., SIZE:]
    image = image / image.sum(-1, keepdim=True) * (1 - text.sum(-1, keepdim=True))
    whole = torch.cat([text * factor if words else text, image], -1)
    assert_close(made[3, SIZE:], output(whole, v), FORMULA)
    assert_close(made[3, :SIZE], plain[3, :SIZE], FORMULA)  # the target's own text
    assert_close(made[:3], plain[:3], FORMULA)
    assert (
        is_far(made[3, SIZE:], output(torch.cat([text, (s if own else t)[..., SIZE:]], -1), v), FORMULA)
        or source == "a b"
    )
    assert is_far(made[3, SIZE:], plain[3, SIZE:], FORMULA)


def test_frames_that_attend_apart():
    """Two pairs of two frames each: what is of a pair is of its frames."""
    given = call(branches=("all",), rows=8, frames=2)
    known = PromptPairs([((prompt("a b"),), (prompt("a c"),)), ((prompt("a c"),), (prompt("a b c"),))], "auto", [], [])
    made = opened(VideoP2P(), given, known).attend(given)
    for pair, text in enumerate([("a b", "a c"), ("a c", "a b c")]):
        rows = [2 * pair, 2 * pair + 1, 4 + 2 * pair, 5 + 2 * pair]
        for frame in (0, 1):
            at = torch.tensor([rows[frame], rows[2 + frame]])
            one = given.replace(q=given.q[at], k=given.k[at], v=given.v[at])
            one = one.replace(diffusion=replace(one.diffusion, run_state={}))
            assert_close(made[at], opened(VideoP2P(), one, pairs(*text)).attend(one), FORMULA)


def test_when_and_where():
    for index in range(10):
        for kind, until in (("cross", 2), ("self", 5), ("joint", 5)):
            given = call(kind, index=index)
            assert (opened(VideoP2P(), given, pairs()).attend(given) is not None) == (index < until)
    given = call()
    assert VideoP2P().attend(given) is None  # of a call without prompts
    for changes in ({"branches": ("uncond",)}, {"branches": ("fitted",)}, {"axis": "text"}):
        other = given.replace(diffusion=replace(given.diffusion, **changes))
        assert opened(VideoP2P(), other, pairs()).attend(other) is None
    for name, used in (("up_blocks.0", False), ("mid_block.0", False), ("blocks.0", True)):
        other = given.replace(site=replace(given.site, name=name))
        assert (opened(VideoP2P(map_size=1), other, pairs()).attend(other) is not None) == used
    with pytest.raises(UserError, match="does not say which rows"):
        VideoP2P().attend(given.replace(diffusion=replace(given.diffusion, branches=("unknown",))))
    with pytest.raises(UserError, match="a path is given in Python"):
        manyheads.parse("video_p2p:path=x")
    for wrong in ("cross_steps=-0.1", "self_steps=1.5", "blend_from=2", "fits=0", "map_size=0", "rate=0"):
        with pytest.raises(UserError, match=r"shares of the steps|count from 1"):
            manyheads.parse(f"video_p2p:{wrong}")


def test_masks_are_where_words_act():
    maps = torch.zeros(2, 1, 4, 6)
    maps[0, 0, 0, 0], maps[0, 0, 3, 5], maps[1, 0, 0, 5] = 1.0, 0.29, 2.0  # source, target
    mask = BlendMaps({"x": maps}).mask(Layout(1, 4, 6), 0.3)
    want = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    want[0, 0, :2, :2] = want[0, 0, :2, 4:] = True  # 3 x 3 neighbours
    assert torch.equal(mask, want)
    assert BlendMaps({"x": maps}).mask(Layout(1, 4, 6), 0.2)[0, 0, 3, 5]
    assert not BlendMaps({"x": 0 * maps}).mask(Layout(1, 4, 6), 0.3).any()
    with pytest.raises(UserError, match="no attention to text"):
        BlendMaps().mask(Layout(1, 4, 6), 0.3)
    assert as_latents(want, (2, 3, 8, 12)).shape == (1, 1, 8, 12)
    assert torch.equal(as_latents(want, (2, 24, 9))[..., 0], want.flatten(1))
    video = want.expand(1, 3, 4, 6)
    assert as_latents(video, (2, 4, 3, 8, 12)).shape == (1, 1, 3, 8, 12)
    assert as_latents(video, (2, 3, 4, 8, 12)).shape == (1, 3, 1, 8, 12)
    for kind in ("cross", "joint"):
        given, found = call(kind, branches=("all",)), BlendMaps()
        given = given.replace(
            diffusion=replace(given.diffusion, layout=Layout(1, 2, 2, SIZE if kind == "joint" else 0, True))
        )
        found.add(given, given.diffusion.layout, [([2], [2, 3])])
        share = maps_of(given)[:, :, -4:].mean(1)
        want = torch.stack([share[0, :, 2], share[1, :, 2] + share[1, :, 3]]).unflatten(1, (2, 2))[:, None]
        assert_close(found.sums["blocks.0"], want.float(), 1e-6)


def test_embeddings_are_fitted_row_by_row():
    aim = torch.tensor([[1.0], [-2.0]])
    found = fitted(torch.zeros(2, 1), lambda x: (x - aim).square().sum(1), rate=0.1, most=100, enough=0.0)
    assert error(found, aim) < 0.1
    one = fitted(torch.zeros(1, 1), lambda x: (x - aim[:1]).square().sum(1), rate=0.1, most=100, enough=0.0)
    assert torch.equal(found[:1], one)
    early = fitted(torch.zeros(2, 1), lambda x: (x - aim).square().sum(1), rate=0.1, most=100, enough=10.0)
    assert_close(early, 0.1 * aim.sign(), 1e-5)  # one step of Adam


@pytest.fixture(scope="module", params=["scenes", "unet", "moving"])
def pipe(request):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        small = {
            "scenes": {"num_layers": 1}, "unet": {"block_out_channels": (16, 24)},
            "moving": {"num_layers": 1, "num_attention_heads": 2, "cross_attention_dim": 48},
        }  # fmt: skip
        pipe = build(request.param, **small[request.param])
        for weights in pipe.denoiser.parameters():  # outputs that begin at zero would hide every change
            if not weights.any():
                torch.nn.init.normal_(weights, std=0.05)
    pipe.set_progress_bar_config(disable=True)
    pipe.denoiser.eval()
    if request.param == "unet":
        pipe.scheduler.register_to_config(clip_sample=False)
    return pipe


WORDS = {"scenes": "top left", "moving": "up"}


def said(pipe, *objects):
    return [f"{name} {WORDS[pipe.config.kind]} frog" for name in objects]


def made(pipe, spec, prompts, noise=None, steps=4, guidance=3.0):
    noise = pipe.noise(1, torch.Generator().manual_seed(1)) if noise is None else noise
    given = {"latents": torch.cat([noise] * len(prompts)), "num_inference_steps": steps, "output_type": "pt"}
    given["guidance_scale"] = guidance
    if spec is None:
        out = pipe(prompts, **given)
    else:
        with manyheads.use(pipe, spec):
            out = pipe(prompts, **given)
    return out.frames if out.images is None else out.images


def test_in_a_pipeline(pipe):
    prompts = said(pipe, "apple", "ghost")
    plain = made(pipe, None, prompts)
    off = "video_p2p:cross_steps=0,self_steps=0,blend=false"
    assert torch.equal(made(pipe, off, prompts), plain)
    edited = made(pipe, "video_p2p:blend=false,cross_steps=1,self_steps=1", prompts)
    assert_close(edited[0], plain[0]) and is_far(edited[1], plain[1])
    equal = made(pipe, "video_p2p", said(pipe, "apple", "apple"))
    assert torch.equal(equal[0], equal[1])  # to the bit
    same = made(pipe, "video_p2p:blend=false,cross_steps=1,self_steps=1", said(pipe, "apple", "apple"))
    assert_close(same[1], same[0])
    reweighted = made(pipe, "video_p2p:cross_steps=1,reweight=apple*4,blend=false", said(pipe, "apple", "apple"))
    assert is_far(reweighted[1], reweighted[0])
    everywhere = made(pipe, "video_p2p:cross_steps=0,self_steps=0,threshold=-1", prompts)
    assert torch.equal(everywhere, plain)
    nowhere = made(pipe, "video_p2p:threshold=2,blend_from=0.3", prompts)
    assert_close(nowhere[1], nowhere[0], 1e-5)
    assert is_far(nowhere[1], plain[1])
    added = made(
        pipe, "video_p2p:edit=refine,cross_steps=1,self_steps=1", [prompts[0].removeprefix("apple "), prompts[1]]
    )
    assert added.isfinite().all()


def test_an_inverted_source_comes_out_as_it_was(pipe):
    prompts, steps = said(pipe, "apple", "ghost"), 3
    latents = 0.3 * pipe.noise(1, torch.Generator().manual_seed(2))
    path = pipe.path(latents, steps, 12, prompt=prompts[0])
    pixels = made(pipe, None, prompts[:1], path[0], steps, guidance=1.0)
    off = {}
    for source in ("guided", "unguided", "fitted"):
        strategy = VideoP2P(path=path, source=source, rate=0.05, fits=4)
        out = made(pipe, strategy, prompts, path[0], steps)
        off[source] = float((out[0] - pixels[0]).square().mean())
        same = made(pipe, strategy, [prompts[0]] * 2, path[0], steps)
        assert torch.equal(same[0], same[1])
    assert off["unguided"] < 1e-3 * off["guided"] and off["fitted"] < off["guided"]
    with pytest.raises(UserError, match="a path of 3 steps for a run of 4"):
        made(pipe, VideoP2P(path=path), prompts, path[0], 4)


def test_prompts_of_pipelines():
    class Tokenizer:
        is_fast = True

        def __call__(self, text, **_):
            spans = [(m, m + 1) for m in range(len(text)) if text[m] != " "]
            return {"input_ids": [1, *(ord(text[a]) for a, _ in spans), 2], "offset_mapping": [(0, 0), *spans, (0, 0)]}

    plain = SimpleNamespace(tokenizer=Tokenizer())
    (first,), (second,) = prompts_of(plain, {"prompt": ["ab c", "c"]})
    assert first == Prompt((1, 97, 98, 99, 2), (-1, 0, 0, 1, -1), ("ab", "c")) and second.words == ("c",)
    assert prompts_of(plain, {"prompt": "c", "num_images_per_prompt": 2}) == ((second,), (second,))
    three = SimpleNamespace(tokenizer=Tokenizer(), tokenizer_3=Tokenizer(), tokenizer_max_length=7)
    assert [(p.start, p.room) for p in prompts_of(three, {"prompt": "c"})[0]] == [(0, 7), (7, None)]
    for wrong, asked, match in (
        (plain, {"prompt": None}, "only their embeddings"),
        (SimpleNamespace(tokenizer=Tokenizer(), tokenizer_2=Tokenizer()), {"prompt": "c"}, "is not known"),
        (SimpleNamespace(tokenizer=object()), {"prompt": "c"}, "use a fast tokenizer"),
    ):
        with pytest.raises(UserError, match=match):
            prompts_of(wrong, asked)


def test_refusals(pipe):
    with pytest.raises(UserError, match="no pairs of source and target"):
        made(pipe, "video_p2p", said(pipe, "apple", "ghost", "tree"))
    with pytest.raises(UserError, match="open the pipeline"):
        VideoP2P().attend(call().replace(diffusion=None))
