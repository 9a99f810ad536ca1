# SPDX-License-Identifier: Apache-2.0
"""Selection of heads by an objective: heads for a style give that style, on other images, and more than others do."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads.diffusion._styles import STYLES, style
from manyheads.errors import UserError
from manyheads.head_selection import named_objective, select_heads
from manyheads.models.judge import load_judge
from manyheads.models.scenes import load_scenes
from tiny import pipelines
from tolerance import is_close, is_far, nearly

cli, folders = pipelines.cli, pipelines.folders
SMALL = {"images": 2, "steps": 2, "rounds": 1, "top": 1}


@pytest.fixture(scope="module")
def pipe():
    return load_scenes("scenes")


def made(pipe, strategy, prompts, steps=4):
    """Images of other noise than that of any search below."""
    noise = pipe.noise(len(prompts), torch.Generator().manual_seed(977))
    with manyheads.use(pipe, *([strategy] if strategy else [])):
        return pipe(prompts, latents=noise, num_inference_steps=steps, guidance_scale=1.0, output_type="pt").images


@pytest.mark.slow
def test_heads_for_a_style_give_it_on_other_images(pipe):
    """More than no guidance, than random heads, and than heads for another style: each of the two is the other's."""
    candidates = [f"{layer}.{head}" for layer in (1, 4) for head in range(6)]
    found = {
        goal: select_heads(pipe, goal, images=6, steps=4, rounds=1, top=2, candidates=candidates)
        for goal in ("edges", "warmth")
    }
    prompts = [f"{thing} {place} {back}" for thing, back in (("ghost", "frog"), ("apple", "ship"), ("fire", "horse"))
               for place in ("top left", "bottom right", "top right", "bottom left")]  # fmt: skip
    base = found["edges"].strategy
    rng = np.random.default_rng(0)
    random = [replace(base, heads=tuple(rng.choice(candidates, 2, replace=False))) for _ in range(4)]
    seen = {goal: made(pipe, one.strategy, prompts) for goal, one in found.items()}
    others = [made(pipe, one, prompts) for one in random]
    plain = made(pipe, None, prompts)
    for goal, other in (("edges", "warmth"), ("warmth", "edges")):
        value = {name: style(goal)(images).mean() for name, images in seen.items()}
        assert value[goal] > value[other] and value[goal] > style(goal)(plain).mean()
        assert value[goal] > torch.stack([style(goal)(images).mean() for images in others]).mean()
        assert len(found[goal].strategy.heads) == 2 and found[goal].found > found[goal].plain
    assert found["edges"].strategy.heads != found["warmth"].strategy.heads
    # Joined they give more of each style than the heads for the other alone.
    both = made(pipe, replace(base, heads=base.heads + found["warmth"].strategy.heads), prompts)
    for goal, other in (("edges", "warmth"), ("warmth", "edges")):
        assert style(goal)(both).mean() > style(goal)(seen[other]).mean()


def test_a_function_is_an_objective_and_the_best_head_is_the_first(pipe):
    asked = []

    def bright(images, prompts):
        asked.append((images.shape, tuple(prompts)))
        return images.mean((1, 2, 3))

    given = ["ghost top left frog", "fire bottom right ship"]
    one = select_heads(pipe, bright, prompts=given, candidates=("0.1", "3.2", "5.0"), **SMALL)
    assert set(asked) == {((2, 3, 32, 32), tuple(given))} and len(asked) == 1 + 3 + 1
    scores = one.rounds[0]
    assert one.strategy.heads == (max(scores, key=scores.get),) and one.found == max(scores.values()) != one.plain
    for head, score in scores.items():
        layer, number = map(int, head.split("."))
        assert one.table.mean[one.table.layers.index(layer), number] == nearly(score)
    assert one.table.values.shape == (2, 6, 6) and np.isfinite(one.table.mean).sum() == 3
    least = select_heads(pipe, lambda i, p: -bright(i, p), prompts=given, candidates=("0.1", "3.2", "5.0"), **SMALL)
    assert least.strategy.heads == (min(scores, key=scores.get),)  # control: another objective, another head


@pytest.mark.parametrize("name", ["scenes", "dit"])
def test_images_do_not_depend_on_their_batch(folders, name):
    """Each has noise, and a caption or class, of its own, and keeps them for every head."""
    from manyheads.models.pipeline import load

    pipe, seen = load(str(folders[name])), []

    def score(images, prompts):
        seen.append(images)
        return images.mean((1, 2, 3))

    small = {**SMALL, "images": 3, "candidates": ("0.0",)}
    whole = select_heads(pipe, score, **small)
    single = select_heads(pipe, score, batch=1, **small)
    assert is_close(seen[0], seen[3]) and is_close(seen[1], seen[4])
    assert is_far(seen[0][0], seen[0][1]) and not torch.equal(seen[0], seen[1])
    assert single.rounds[0]["0.0"] == nearly(whole.rounds[0]["0.0"], torch.float32)
    moved = select_heads(pipe, score, seed=1, **small)  # the noise of image i + 1
    assert moved.plain != pytest.approx(whole.plain, abs=1e-5)


def test_composed_by_starting_from_the_heads_of_another(pipe):
    start = "headhunter:heads=2.2,scale=3,strength=1"
    found = select_heads(pipe, "edges", strategy=start, candidates=("2.2", "3.1", "4.1"), **SMALL)
    assert (
        found.strategy.heads[0] == "2.2" and len(found.strategy.heads) == 2 and set(found.rounds[0]) == {"3.1", "4.1"}
    )
    alone = select_heads(pipe, "edges", candidates=("3.1", "4.1"), **SMALL)
    assert found.rounds[0]["3.1"] != alone.rounds[0]["3.1"]


def test_a_search_goes_on_and_refuses_other_settings(pipe):
    state, tried = {}, ("0.1", "3.2", "5.0")

    def told(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select_heads(pipe, "edges", candidates=tried, progress=told, state=state, **SMALL)
    state = json.loads(json.dumps(state))
    assert len(state["values"]) == 2
    steps = []
    again = select_heads(
        pipe, "edges", candidates=tried, progress=lambda *at: steps.append(at), state=state, **SMALL
    )  # fmt: skip
    whole = select_heads(pipe, "edges", candidates=tried, **SMALL)
    assert steps == [(3, 3)] and again.rounds == whole.rounds and again.strategy == whole.strategy
    assert np.array_equal(again.table.values, whole.table.values, equal_nan=True)
    with pytest.raises(UserError, match="other settings"):
        select_heads(pipe, "warmth", candidates=tried, state=state, **SMALL)


def test_measures_of_images_by_another_route():
    images = torch.rand(3, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    x = images.double().numpy()
    light = 0.2126 * x[:, 0] + 0.7152 * x[:, 1] + 0.0722 * x[:, 2]
    wanted = {
        "brightness": [one.mean() for one in light],
        "contrast": [one.std(ddof=1) for one in light],
        "saturation": [(one.max(0) - one.min(0)).mean() for one in x],
        "warmth": [one[0].mean() - one[2].mean() for one in x],
        "edges": [(np.abs(np.diff(one, axis=0)).mean() + np.abs(np.diff(one, axis=1)).mean()) / 2 for one in light],
    }
    assert set(wanted) == set(STYLES)
    for name, values in wanted.items():
        assert style(name)(images).tolist() == nearly(values, torch.float32)
        assert style(f"-{name}")(images).tolist() == nearly([-v for v in values], torch.float32)
        film = images[:, :, None].expand(-1, -1, 2, -1, -1)
        of_film = pytest.approx(values, rel=0.03) if name == "contrast" else nearly(values, torch.float32)
        assert style(name)(film).tolist() == of_film


def test_what_the_judge_says_is_an_objective(pipe):
    prompts = ["ghost top left frog", "frog"]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    chances = load_judge("scenes")[0].see(images).chances
    log = {k: v.log().tolist() for k, v in chances.items()}
    words = pipe.vocabulary
    at = {w: (k, i) for k, known in words.items() for i, w in enumerate(known)}

    def of(n, word):
        kind, i = at[word]
        return max(log[kind][n][i], np.log(1e-6))

    likely = named_objective("likelihood", pipe)(images, prompts)
    mean = sum(of(0, w) for w in ("ghost", "top left", "frog")) / 3
    assert likely.tolist() == nearly([mean, of(1, "frog")], torch.float32)
    frog = named_objective("frog", pipe)(images, prompts)
    assert frog.tolist() == nearly([of(0, "frog"), of(1, "frog")], torch.float32)


@pytest.mark.parametrize(
    ("objective", "more", "said"),
    [
        ("nonsense", {}, "there are brightness"),
        ("no_such_module:score", {}, "cannot be imported"),
        (lambda images, prompts: images.mean(), {}, "0-d|iterat"),
        (lambda images, prompts: [1.0], {}, "1 values for 2 images"),
        (lambda images, prompts: [1.0, float("nan")], {}, "not finite"),
        ("edges", {"candidates": ("9.0",)}, "no head 9.0"),
        ("edges", {"strategy": "sag"}, "not for sag"),
        ("edges", {"rounds": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_is_refused(pipe, objective, more, said):
    with pytest.raises((UserError, TypeError), match=said):
        select_heads(pipe, objective, **{**SMALL, **more})


@pytest.mark.parametrize("name", ["text", "dit", "moving"])
def test_pipelines_of_every_condition(folders, name):
    """Text, a class, or videos: heads are those that ran, and what is perturbed tells them apart."""
    from manyheads.models.pipeline import load

    pipe = load(str(folders[name]))
    if name == "text":
        with pytest.raises(UserError, match="give prompts"):
            select_heads(pipe, "edges", **SMALL)
    if name == "dit":
        with pytest.raises(UserError, match="takes no prompts"):
            select_heads(pipe, "edges", prompts=["a red cat"], **SMALL)
    shapes = []

    def score(images, prompts):
        shapes.append(images.shape)
        return style("edges")(images)

    found = select_heads(pipe, score, prompts=["a red cat"] if name == "text" else (), **SMALL)
    assert found.rounds[0] and len(set(found.rounds[0].values())) > 1 and found.plain not in found.rounds[0].values()
    assert len(set(shapes)) == 1 and shapes[0][:2] == (2, 3) and len(shapes[0]) == (5 if name == "moving" else 4)


def test_on_the_command_line(cli, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def score(images, prompts):\n    return images[:, 0].mean((1, 2))\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    fast = ("--images", "2", "--rounds", "1", "--top", "1", "--steps", "2", "--candidates", "0.1+3.2")
    code, out, err = cli("hunt", "--for", "mine:score", *fast, "--state", "kept.json")
    assert code == 0, err
    spec = out.strip().splitlines()[-1].strip()
    assert spec.startswith("headhunter:heads=") and manyheads.parse(spec).heads in (("0.1",), ("3.2",))
    assert set(json.loads((tmp_path / "kept.json").read_text())["values"]) == {"0.1", "3.2"}
    code, out, err = cli("hunt", "--for", "mine:score", *fast, "--json")
    found = json.loads(out)
    assert code == 0 and found["strategy"] == spec
    best = max(found["rounds"][0], key=found["rounds"][0].get)
    assert [best] == found["heads"]
    (tmp_path / "bad.json").write_text("[]")
    for more, said in ((("--for", "nonsense"), "there are"), (("--for", "edges", "--state", "bad.json"), "no state")):
        code, _, err = cli("hunt", *more, *fast)
        assert code == 2 and said in err and "defect" not in err
