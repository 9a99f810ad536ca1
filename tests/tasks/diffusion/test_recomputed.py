# SPDX-License-Identifier: Apache-2.0
"""Figures of the tasks on images, recomputed by numpy from images that a stand-in for the pipeline makes."""

import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

import manyheads
from manyheads.data import scenes
from manyheads.experiment import Arm, Pipeline, RunContext, seeding
from manyheads.models.judge import Seen
from manyheads.models.scenes import load_scenes
from manyheads.tasks.diffusion import denoising_cost, kept_background, scene_quality
from manyheads.tasks.diffusion._image_task import ImageTask, drawn, judge_of
from manyheads.tasks.diffusion.denoising_cost import DenoisingCost, computed, kind_of
from manyheads.tasks.diffusion.fidelity import Fidelity, psnr
from manyheads.tasks.diffusion.kept_background import KeptBackground, kept
from manyheads.tasks.diffusion.module_change import ModuleChange
from manyheads.tasks.diffusion.scene_quality import SceneQuality, likelihood, pseudo_values
from oracles.tasks import rows
from tolerance import nearly

PLAIN, ODD, FAR = Arm("plain"), Arm("odd"), Arm("far")
ARMS = (PLAIN, ODD, FAR)


@pytest.fixture(scope="module")
def shipped():
    return Pipeline("scenes", load_scenes("scenes"))


@pytest.fixture
def run(shipped):
    return RunContext(shipped, ARMS, seeds=(0, 3))


def image(arm, seed, i, size=8):
    """An image that depends on all that it should."""
    draw = torch.Generator().manual_seed(1000 * seed + i)
    plain = 0.2 + 0.6 * torch.rand(3, size, size, generator=draw)
    return (
        plain if arm == "plain" else plain + {"odd": 0.01, "far": 0.1}[arm] * torch.randn(3, size, size, generator=draw)
    )


def test_distances_to_the_plain_image(run, monkeypatch):
    monkeypatch.setattr(
        Fidelity,
        "images",
        lambda self, run, arm, seed, first, last: torch.stack([image(arm.key, seed, i) for i in range(first, last)]),
    )
    found = rows(Fidelity(samples=5, batch=2), run)
    assert len(found) == 2 * 3 * 2 * 5
    for row in found:
        mine, plain = (image(arm, row.seed, int(row.sample)).double().numpy() for arm in (row.arm, "plain"))
        error = np.mean((mine - plain) ** 2)
        want = {"psnr": 100.0 if error == 0 else 10 * math.log10(1 / error), "largest": np.abs(mine - plain).max()}
        assert row.value == pytest.approx(want[row.metric], rel=1e-5), row
        assert row.context == f"{row.seed}.{row.sample}"
    assert len({(row.metric, row.arm, row.seed, row.sample) for row in found}) == len(found)
    one, off = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    off[0, 1, 2, 3] = 1e-6
    assert float(psnr(off, one)) == nearly(100.0)  # no more than images that do not differ


def test_images_come_in_batches_of_a_seed(run):
    task = Fidelity(samples=5, batch=2)
    units = task.units(run)
    assert [(u.params["seed"], u.params["first"], u.params["last"]) for u in units] == [
        (s, a, b) for s in (0, 3) for a, b in ((0, 2), (2, 4), (4, 5))
    ]
    assert [u.cost for u in units] == [6, 6, 3] * 2
    run.device = torch.device("cuda")
    assert [u.params["last"] for u in Fidelity(samples=17, batch=2).units(run)] == [16, 17] * 2


def quarters(image, places):
    """Pixels outside the quarters that are named."""
    size = image.shape[-1] // 2
    return [
        (r, c) for r in range(2 * size) for c in range(2 * size) if 2 * (r // size) + c // size not in places
    ]  # fmt: skip


def test_what_is_kept_and_what_is_seen(run, monkeypatch):
    """Source and target share their noise and all but the place; what is judged is the target."""
    task, said = KeptBackground(samples=6, batch=4), []

    def images(self, run, arm, seed, first, last, labels, prepare):
        said.append((arm.key, seed, first, last, labels))
        noise = torch.arange(2.0 * (last - first))
        assert prepare(noise).tolist() == list(range(last - first)) * 2
        made = [image(arm.key, seed, i) for i in range(first, last)]
        return torch.stack([*made, *(0.9 * x + 0.05 * n for n, x in enumerate(made, first))])

    class Sees:
        def see(self, after):
            """The object is right where the first pixel is above a half, the place where the last one is."""
            n, half = len(after), after.flatten(1)
            target = said[-1][4][n:]
            objects, places = (torch.nn.functional.one_hot(target[:, k], 8).float() for k in (0, 1))
            right = half[:, 0] > 0.5, half[:, -1] > 0.5
            chances = [torch.where(ok[:, None], x, 1 - x) for ok, x in zip(right, (objects, places), strict=True)]
            return Seen(half, {"object": chances[0], "place": chances[1][:, :4], "backdrop": objects})

    monkeypatch.setattr(KeptBackground, "images", images)
    monkeypatch.setattr(kept_background, "judge_of", lambda run: Sees())
    found = rows(task, run)
    for arm, seed, first, last, labels in said:
        source, target = labels.chunk(2)
        assert torch.equal(source, drawn(run, 6, seed)[first:last])
        assert torch.equal(source[:, [0, 2]], target[:, [0, 2]]) and (source[:, 1] != target[:, 1]).all()
        for row in (row for row in found if (row.arm, row.seed) == (arm, seed) and first <= int(row.sample) < last):
            i = int(row.sample)
            before = image(arm, seed, i).double().numpy()
            after = 0.9 * before + 0.05 * i
            places = {int(x[i - first, 1]) for x in (source, target)}
            error = np.mean([(before[:, r, c] - after[:, r, c]) ** 2 for r, c in quarters(before, places)])
            want = {
                "kept": -10 * math.log10(error), "object": float(after[0, 0, 0] > 0.5),
                "place": float(after[-1, -1, -1] > 0.5),
            }[row.metric]  # fmt: skip
            assert row.value == pytest.approx(want, rel=1e-4), row
    assert len(found) == 3 * 3 * 2 * 6 and len({tuple(labels[:, 1].tolist()) for *_, labels in said}) > 1
    turned = {int(x) for *_, labels in said for x in (labels.chunk(2)[1] - labels.chunk(2)[0])[:, 1] % 4}
    assert turned == {1, 2, 3}  # every other quarter is moved to
    same = torch.rand(2, 3, 8, 8)
    assert kept(same, same, torch.tensor([[0, 1], [2, 3]])).tolist() == nearly([100.0, 100.0])


def test_likelihood_and_jackknife(run):
    draw = torch.Generator().manual_seed(0)
    chances = {
        name: torch.rand(7, n, generator=draw).softmax(-1) for name, n in (("object", 8), ("place", 4), ("backdrop", 4))
    }
    chances["place"][2] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    labels = torch.stack([torch.randint(n, (7,), generator=draw) for n in (8, 4, 4)], 1)
    labels[2, 1] = 3  # held impossible, and counted as a millionth
    got = likelihood(Seen(torch.zeros(7, 2), chances), labels)
    want = [
        np.mean([math.log(max(float(c[i, labels[i, k]]), 1e-6)) for k, c in enumerate(chances.values())])
        for i in range(7)
    ]
    assert got.tolist() == pytest.approx(want, rel=1e-5)

    def distance(a, b):
        one, two = np.cov(a.T), np.cov(b.T)
        return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(one + two - 2 * sqrtm(one @ two).real)

    features, truth = torch.randn(9, 3, generator=draw) + 0.5, torch.randn(40, 3, generator=draw)
    x, y = features.double().numpy(), truth.double().numpy()
    want = [9 * distance(x, y) - 8 * distance(np.delete(x, i, 0), y) for i in range(9)]
    assert pseudo_values(features, truth).tolist() == pytest.approx(want, rel=1e-6)


def test_scenes_are_judged_by_their_captions(run, monkeypatch):
    task, asked = SceneQuality(samples=5, batch=2), []

    def images(self, run, arm, seed, first, last, *, acting, labels, prepare, draw):
        asked.append((arm.key, seed, first, last, list(acting), labels, draw))
        assert torch.equal(
            prepare(None),
            torch.cat(
                [run.subject.pipe.noise(1, run.torch_rng(noise=draw, seed=seed, image=i)) for i in range(first, last)]
            ),
        )
        return torch.stack([image(arm.key, seed, i) for i in range(first, last)])

    class Sees:
        def see(self, images):
            x = images.flatten(1)
            return Seen(
                x[:, :3],
                {"object": x[:, :8].softmax(-1), "place": x[:, 8:12].softmax(-1), "backdrop": x[:, 12:16].softmax(-1)},
            )

    truth = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(SceneQuality, "images", images)
    monkeypatch.setattr(SceneQuality, "truth", lambda self, run: truth)
    monkeypatch.setattr(scene_quality, "judge_of", lambda run: Sees())
    found = rows(task, run)
    assert len(found) == 2 * 3 * 3 * 5
    for arm in ("plain", "far"):
        for seed in (0, 3):
            labels = drawn(run, 5, seed)
            seen = Sees().see(torch.stack([image(arm, seed, i) for i in range(5)]))
            want = {
                "likelihood": likelihood(seen, labels), "fd_small": pseudo_values(seen.features, truth),
                "object": (seen.chances["object"].argmax(1) == labels[:, 0]).float(),
            }  # fmt: skip
            for metric, values in want.items():
                mine = [row for row in found if (row.arm, row.seed, row.metric) == (arm, seed, metric)]
                assert [row.sample for row in mine] == [f"{i}" for i in range(5)]
                assert [row.value for row in mine] == pytest.approx(values.tolist(), rel=1e-5)
    assert [(a, s, f, t) for a, s, f, t, *_ in asked][:3] == [
        ("plain", 0, 0, 2),
        ("plain", 0, 2, 4),
        ("plain", 0, 4, 5),
    ]
    for _, seed, first, last, acting, labels, draw in asked:
        assert torch.equal(labels, drawn(run, 5, seed)[first:last]) and draw == "judged" and acting == []
    blind = rows(SceneQuality(samples=5, conditioned=False), run)
    assert {row.metric for row in blind} == {"fd_small"}


def test_what_is_chosen_for_an_arm(run, monkeypatch):
    """A field by the least distance, heads by the greatest likelihood, on images that none is judged by."""
    task = SceneQuality(samples=6, searched=4, candidates=0, draws=3, batch=4)
    tried = []

    def seen(self, run, arm, seed, count, draw, sets):
        ((strategy,),) = sets
        tried.append((draw, count, seed))
        heads = getattr(strategy, "heads", ())
        value = -sum((float(head) - 2.3) ** 2 for head in heads) if heads else (strategy.scale - 0.4) ** 2
        return SimpleNamespace(features=torch.full((4, 2), value), value=value)

    monkeypatch.setattr(SceneQuality, "_made", seen)
    monkeypatch.setattr(scene_quality, "judge_of", lambda run: SimpleNamespace(see=lambda images: images))
    monkeypatch.setattr(SceneQuality, "truth", lambda self, run: torch.zeros(3, 2))
    monkeypatch.setattr(scene_quality, "frechet", lambda a, b: float(a[0, 0]))
    monkeypatch.setattr(scene_quality, "likelihood", lambda seen, labels: torch.tensor([seen.value]))
    tuned = Arm("sag", "sag", options={"tune": {"scale": (0.1, 0.5, 0.9)}})
    (made,) = task.chosen(run, tuned, 0)
    assert made[0].scale == 0.5 and {draw for draw, *_ in tried} == {"searched"} and len(tried) == 3
    assert task.chosen(run, tuned, 3) == [made] and len(tried) == 3  # once, for all seeds
    assert (
        task.chosen(run, Arm("sag", "sag", options={"tune": {"scale": (0.7,)}}), 0)[0][0].scale == 0.7
        and len(tried) == 3
    )
    with pytest.raises(manyheads.UserError, match="one field can be tuned, not 2"):
        task.chosen(run, Arm("sag", "sag", options={"tune": {"scale": (1,), "mask": ("all",)}}), 0)
    assert task.chosen(run, Arm("sag", "sag:scale=2"), 0) == [Arm("x", "sag:scale=2").strategies]
    spec = "headhunter:perturbation=pag"
    (best,) = task.chosen(run, Arm("layer", spec, options={"heads": "layer"}), 3)
    assert set(best[0].heads) == {f"2.{head}" for head in range(6)}
    assert set(tried[3:]) == {("searched", 4, 3)} and len(tried) == 3 + 6  # each layer once, by images of the seed
    (best,) = task.chosen(run, Arm("searched", spec, options={"heads": "searched", "count": 2}), 0)
    assert best[0].heads[0] == "2.3" and best[0].heads[1] in ("2.2", "2.4") and len(tried) == 3 + 6 + 36
    sets = task.chosen(run, Arm("random", spec, options={"heads": "random", "count": 5}), 0)
    assert (
        len(sets) == 3
        and all(len(set(each[0].heads)) == 5 for each in sets)
        and len({each[0].heads for each in sets}) == 3
    )
    few = SceneQuality(samples=6, searched=4, candidates=7)
    run._kept.clear()
    before = len(tried)
    few.chosen(run, Arm("searched", spec, options={"heads": "searched"}), 0)
    assert len(tried) == before + 7


def test_sets_of_heads_take_turns_and_masks_are_named(run, monkeypatch):
    task, made = SceneQuality(samples=7, batch=2), []

    def of(self, run, arm, seed, part, labels, acting, draw):
        made.append((part, acting, labels, float(torch.rand(1))))
        return torch.stack([torch.full((1,), float(i)) for i in part])

    monkeypatch.setattr(SceneQuality, "_of", of)
    seen = task._made(run, ODD, 3, 7, "judged", ["a", "b"])
    assert seen.flatten().tolist() == list(range(7))  # in their order, whoever made them
    assert [(part, acting) for part, acting, *_ in made] == [([0, 2], "a"), ([4, 6], "a"), ([1, 3], "b"), ([5], "b")]
    labels = drawn(run, 7, 3, "judged")
    for part, _, given, mask in made:
        assert torch.equal(given, labels[part])
        draw = torch.Generator().manual_seed(seeding.number(run.seed, masks="judged", seed=3, image=part[0]))
        assert mask == nearly(float(torch.rand(1, generator=draw)))


def test_change_is_the_mean_of_each_part_of_the_run(shipped, monkeypatch):
    run = RunContext(shipped, (PLAIN,), seeds=(3,))
    curve = SimpleNamespace(kind="spatial", relative=tuple(float(x) ** 2 for x in range(1, 12)))  # of twelve steps

    class Records:
        @staticmethod
        def curves(port):
            return [curve]

    made = []
    monkeypatch.setattr(manyheads, "parse", lambda spec: made.append(spec) or Records())
    monkeypatch.setattr(manyheads, "use", lambda *_: nullcontext())
    monkeypatch.setattr(ModuleChange, "images", lambda self, *given, acting: made.append((given[1:], acting)))
    found = rows(ModuleChange(samples=4, steps=12, edge=0.15, batch=2), run)
    values = np.arange(1, 12.0) ** 2
    want = {"first": values[:2].mean(), "middle": values[2:9].mean(), "last": values[9:].mean()}
    assert {(row.at["part"], row.value) for row in found} == set(want.items()) and len(found) == 6
    assert {(row.sample, row.context, row.seed) for row in found} == {("0", "3.0", 3), ("2", "3.2", 3)}
    assert made == ["pab.redundancy", ((PLAIN, 3, 0, 2), ()), "pab.redundancy", ((PLAIN, 3, 2, 4), ())]


def test_seconds_of_an_image_and_modules_run(run, monkeypatch):
    clock = SimpleNamespace(now=0.0, order=[])
    queries = {"plain": 40, "odd": 10, "far": 60}

    def images(self, run, arm, seed, first, last):
        clock.order.append((arm.key, seed, first, last))
        clock.now += {"plain": 4.0, "odd": 1.0, "far": 8.0}[arm.key]

    class Filled(dict):
        def values(self):
            return [queries[clock.order[-1][0]] - 1, 1]

    @contextmanager
    def filled(model):
        yield Filled()

    monkeypatch.setattr(DenoisingCost, "images", images)
    monkeypatch.setattr(denoising_cost, "computed", filled)
    monkeypatch.setattr(denoising_cost.time, "perf_counter", lambda: clock.now)
    found = rows(DenoisingCost(rounds=3, samples=2), run)
    by = {(row.metric, row.arm, row.sample): row.value for row in found}
    assert len(by) == 2 * 3 * 3
    for turn in "012":
        for arm, seconds in (("plain", 2.0), ("odd", 0.5), ("far", 4.0)):
            assert by["seconds", arm, turn] == seconds and by["attention", arm, turn] == queries[arm] / 40
    names = [name for name, *_ in clock.order]
    assert names == ["plain", "plain", "odd", "far", "odd", "far", "plain", "far", "plain", "odd"]  # the first warms up
    assert {tuple(rest) for _, *rest in clock.order} == {(0, 0, 2)}


def test_modules_are_counted_at_their_query_projection():
    def attention():
        module = torch.nn.Module()
        module.to_q = torch.nn.Linear(4, 4)
        return module

    model = torch.nn.Module()
    model.temporal_transformer_blocks, model.transformer_blocks = torch.nn.Module(), torch.nn.Module()
    model.temporal_transformer_blocks.attn1 = attention()
    model.transformer_blocks.attn1, model.transformer_blocks.attn2 = attention(), attention()
    with computed(model) as counts:
        model.temporal_transformer_blocks.attn1.to_q(torch.zeros(2, 3, 4))
        model.transformer_blocks.attn1.to_q(torch.zeros(5, 7, 4))
        model.transformer_blocks.attn1.to_q(torch.zeros(1, 2, 4))
        model.transformer_blocks.attn2.to_q(torch.zeros(2, 2, 4))
    assert counts == {"temporal": 6, "spatial": 37, "cross": 4}
    model.transformer_blocks.attn2.to_q(torch.zeros(2, 2, 4))
    assert counts["cross"] == 4 and not model.transformer_blocks.attn2.to_q._forward_hooks
    assert [kind_of(n) for n in ("temporal_transformer_blocks.0.attn2", "x.attn2", "x.attn1")] == [
        "temporal",
        "cross",
        "spatial",
    ]


@pytest.mark.parametrize("conditioned", [True, False])
def test_a_scene_has_its_own_noise_and_caption(run, monkeypatch, conditioned):
    """What the pipeline is told, for images 2 and 3 of a seed."""
    pipe, told = run.subject.pipe, {}

    def call(self, tokens, **given):
        told.update(given, tokens=tokens)
        return SimpleNamespace(images=torch.full((len(tokens), 3, 4, 4), 0.5, dtype=torch.float64), frames=None)

    monkeypatch.setattr(type(pipe), "__call__", call)
    task = Fidelity(samples=5, steps=7, guidance=2.5, conditioned=conditioned)
    made = task.images(run, PLAIN, 3, 2, 4)
    labels = drawn(run, 5, 3)[2:4]
    assert torch.equal(told["tokens"], scenes.tokens(labels, "scenes") if conditioned else torch.zeros_like(labels))
    noise = torch.cat([pipe.noise(1, run.torch_rng(noise="judged", seed=3, image=i)) for i in (2, 3)])
    assert torch.equal(told["latents"], noise)
    assert (told["num_inference_steps"], told["guidance_scale"], told["output_type"]) == (7, 2.5, "pt")
    assert made.dtype == torch.float32 and made.shape == (2, 3, 4, 4)
    task.images(run, PLAIN, 3, 0, 2, labels=labels, prepare=lambda x: -x, draw="searched")
    searched = torch.cat([pipe.noise(1, run.torch_rng(noise="searched", seed=3, image=i)) for i in (0, 1)])
    assert torch.equal(told["latents"], -searched)
    assert drawn(run, 400, 0).amin(0).tolist() == [0, 0, 0] and drawn(run, 400, 0).amax(0).tolist() == [7, 3, 3]
    assert not torch.equal(drawn(run, 9, 0), drawn(run, 9, 0, "searched"))


class Prompted:
    """A pipeline of diffusers as far as a task looks at it."""

    def __call__(self, prompt=None, num_inference_steps=50, generator=None, output_type="pil"):
        self.told = (prompt, num_inference_steps, [g.initial_seed() for g in generator], output_type)
        return SimpleNamespace(frames=np.zeros((len(prompt), 5, 3, 2, 2)))


class Classes:
    def __call__(self, class_labels, generator=None, output_type="pil"):
        self.told = (class_labels, len(generator))
        return SimpleNamespace(images=torch.ones(len(class_labels), 3, 2, 2, dtype=torch.float16))


def test_other_pipelines_are_given_prompts_or_classes(run):
    """Each image has a generator of its own and its prompt by its number, whatever the batch."""
    subject = SimpleNamespace(pipe=Prompted())
    mine = RunContext(subject, ARMS, data={"prompts": ["a", "b", "c"]})
    task = Fidelity(samples=9, steps=4)
    made = task.images(mine, PLAIN, 3, 4, 9)
    seeds = [mine.torch_rng(noise="judged", seed=3, image=i).initial_seed() for i in range(4, 9)]
    assert subject.pipe.told == (["b", "c", "a", "b", "c"], 4, seeds, "pt")
    assert made.shape == (5, 3, 5, 2, 2)  # channels first, then frames
    mine.data = {}
    task.images(mine, PLAIN, 3, 0, 8)
    assert len(set(subject.pipe.told[0])) == 6 and subject.pipe.told[0][0] == subject.pipe.told[0][6]
    with pytest.raises(manyheads.UserError, match="known contents"):
        task.images(mine, PLAIN, 3, 0, 1, labels=torch.zeros(1, 3))
    with pytest.raises(manyheads.UserError, match="known contents"):
        task.images(mine, PLAIN, 3, 0, 1, prepare=lambda x: x)
    subject.pipe = Classes()
    made = task.images(mine, PLAIN, 3, 998, 1002)
    assert subject.pipe.told == ([998, 999, 0, 1], 4) and made.dtype == torch.float32


def test_contents_are_known_of_scenes_alone(run):
    assert KeptBackground().unsupported_reason(run) is None and Fidelity().unsupported_reason(run) is None
    other = RunContext(SimpleNamespace(pipe=Prompted()), ARMS)
    assert Fidelity().unsupported_reason(other) is None
    for task in (KeptBackground(), SceneQuality()):
        assert "contents of the images have to be known" in task.unsupported_reason(other)
    assert judge_of(run) is judge_of(run) and judge_of(run).kind == "scenes"
    assert issubclass(KeptBackground, ImageTask)
