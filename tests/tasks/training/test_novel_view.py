# SPDX-License-Identifier: Apache-2.0
"""Films from new cameras: cameras are found where they are, arms differ in what they are told alone, and the recipe."""

import json

import pytest
import torch
from tests.tolerance import DRAWN, assert_close, is_far, mean_error, nearly

from manyheads.data.cameras import orbit
from manyheads.data.filmed_scenes import PIVOT, Shots, draw, film
from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.experiment.subjects import CausalLM, Trainable
from manyheads.experiment.task import RunContext

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from manyheads.models.refilming import Refilmer, RefilmerConfig, noisy
from manyheads.recipes import postcam as recipe
from manyheads.tasks.training._camera_scores import found_cameras, judge
from manyheads.tasks.training.novel_view import NovelView
from manyheads.training import train_flow

SPEC = "postcam:hidden=12"
TINY = {"dim": 12, "heads": 2, "layers": 1, "denoising": 2, "pool": 6, "samples": 2, "batch": 4, "steps": 4}
ARMS = (
    Arm("neither", f"{SPEC},pose=false,render=false", options={"fitted": SPEC}),
    Arm("both", SPEC, options={"first": 0.5}), Arm("summed", f"{SPEC},softmax=separate"),
    Arm("added", "postcam.pose_added", options={"fitted": SPEC}),
    Arm("proxy", options={"copies": "proxy"}), Arm("source", options={"copies": "source"}),
)  # fmt: skip


def context(arms=ARMS, seeds=(0,)):
    return RunContext(Trainable(), arms, seeds=seeds)


@pytest.fixture(scope="module")
def drawn():
    return draw(3, 8, 3, 2, torch.Generator().manual_seed(1))


def test_the_camera_of_an_exact_view_is_found(drawn):
    """To the last step of the search; the source itself is as far off as the path leads; control: another scene's."""
    scenes, shots = drawn
    exact, copied = (list(judge(video, scenes, shots)) for video in (shots.target, shots.source))
    assert all(each["rotation_error"] < 0.7 and each["centre_error"] < 0.02 for each in exact)
    assert all(each["pixel_error"] == 0 for each in exact)
    for i, each in enumerate(copied):
        away = float((shots.source[i] - shots.target[i]).square().mean().sqrt())
        assert each["pixel_error"] == nearly(away, torch.float32) and each["rotation_error"] > 2
    wrong = found_cameras(shots.target.roll(1, 0), scenes)
    assert is_far(wrong, shots.cameras, 0.05)


def test_a_camera_between_the_steps_of_the_search(drawn):
    """A path that the search's grid does not have; noise as of an output moves what is found by little."""
    scenes, shots = drawn
    ends = torch.tensor([[-7.3, 13.9, 1.08], [4.4, -22.2, 0.91], [11.7, 3.1, 1.13]])[:, None].expand(3, 3, 3)
    cameras = orbit(*ends.unbind(-1), PIVOT)
    video = film(scenes, cameras, 8)
    noise = 0.1 * torch.randn(video.shape, generator=torch.Generator().manual_seed(2))
    for given, most in ((video, 0.7), (video + noise, 4.0)):
        for each in judge(given, scenes, shots._replace(cameras=cameras, target=video)):
            assert each["rotation_error"] < most and each["centre_error"] < most / 30


def test_noisy_targets_and_their_velocity(drawn):
    shots = drawn[1]
    given = noisy(shots, torch.Generator().manual_seed(3))
    sigma = (given.time / 1000).view(-1, 1, 1, 1, 1)
    assert_close(given.latents - sigma * given.velocity, shots.target)
    assert is_far(given.latents - (1 - sigma) * given.velocity, shots.target)
    assert given.render is shots.proxy and noisy(shots, torch.Generator(), rendered=False).render is None
    many = Shots(*(x[:1].expand(600, *x.shape[1:]) for x in shots))
    assert mean_error(torch.logit(noisy(many, torch.Generator().manual_seed(4)).time / 1000), 0.0, 1.0) < DRAWN


def test_a_flow_is_followed_to_its_end(drawn):
    """A velocity that is right at every point ends at the target; control: a part of it."""
    shots, model = drawn[1], Refilmer(RefilmerConfig(dim=12, layers=1, strategy=SPEC))

    def right(x, source, time, cameras, render, share=1.0):
        return share * (x - shots.target) / (time / 1000).view(-1, 1, 1, 1, 1)

    model.forward = right
    assert_close(model.film(shots.source, shots.cameras, shots.proxy, steps=5), shots.target)
    model.forward = lambda *given: right(*given, share=0.3)
    assert is_far(model.film(shots.source, shots.cameras, shots.proxy, steps=5), shots.target)


def test_arms_of_a_seed_differ_in_what_they_are_told_alone():
    """First weights that all have are the same, and so are numbers of parameters, batches and noise."""
    task, run = NovelView(**TINY), context()
    neither, both, summed, added = (task.fresh(run, arm, 0) for arm in ARMS[:4])
    held = both.state_dict()
    assert all(torch.equal(held[name], x) for name, x in summed.state_dict().items())
    for other in (neither, added):
        assert abs(other.parameters_held - both.parameters_held) <= 12 + 1
        assert other.config.hidden > 48
    assert torch.equal(held["text"], neither.state_dict()["text"])
    steps = ((ARMS[0], 1), (ARMS[1], 1), (ARMS[1], 2))
    first, again, other = (task.given(run, arm, "both", 0, step) for arm, step in steps)
    assert torch.equal(first.latents, again.latents) and is_far(first.latents, other.latents)
    assert first.render is not None and task.given(run, ARMS[1], "poses", 0, 1).render is None
    assert task.stages(ARMS[1], 5) == [("poses", 2), ("both", 3)] and task.stages(ARMS[2], 5) == [("both", 5)]


def test_rows_of_a_run():
    arms = (ARMS[1], ARMS[3], *ARMS[4:])
    task, run = NovelView(**TINY, rates=(1e-3, 1e-2), tune_steps=1), context(arms, seeds=(0, 1))
    task.guard(run)
    units = task.units(run)
    assert [unit.cost for unit in units] == [4 * (2 * 1 + 2 * 4)] * 2 + [1.0] * 2
    done = []
    run.advance = done.append
    rows = {arm.key: list(task.measure(run, unit)) for arm, unit in zip(arms, units, strict=True)}
    assert sum(done) == sum(unit.cost for unit in units[:2])
    for key, found in rows.items():
        names = [row.metric for row in found]
        assert names.count("rotation_error") == names.count("pixel_error") == 4
        assert names.count("training_loss") == names.count("parameters") == (0 if key in ("proxy", "source") else 2)
    scenes, shots = task.judged(run)
    want = [each["pixel_error"] for each in judge(shots.source, scenes, shots)]
    assert [row.value for row in rows["source"] if row.metric == "pixel_error"][:2] == nearly(want, torch.float32)
    assert [row.value for row in rows["proxy"] if row.metric == "pixel_error"][:2] != want
    assert next(row.about for row in rows["both"] if row.metric == "training_loss")["rate"] in (1e-3, 1e-2)


def test_wrong_arms_and_sizes_are_refused():
    for spec in ("sag", "native3d_edit"):
        with pytest.raises(UserError, match=f"which {spec} does not"):
            NovelView().guard(context((Arm("x", spec),)))
    for wrong in ({"pool": 0}, {"rates": ()}, {"steps": 0}):
        with pytest.raises(UserError):
            NovelView(**wrong)
    with pytest.raises(UserError, match="multiple of six"):
        Refilmer(RefilmerConfig(dim=16))
    assert "recipes.postcam" in (CausalLM("default").unsupported_reason(Arm("x", "postcam").strategy) or "")


def test_the_recipe_leaves_a_model(tmp_path, drawn):
    shots, out = drawn[1], tmp_path / "model"
    arguments = ["--out", str(out), "--smoke", "--dim", "12", "--layers", "1", "--strategy", SPEC, "--batch", "4"]
    assert recipe.main(arguments) == 0
    about = json.loads((out / "results.json").read_text())
    assert about["steps"] == 4 and about["first"] == 2 and set(about["judged"]) >= {"rotation_error", "pixel_error"}
    model = Refilmer.load(out)
    video = model.film(shots.source, shots.cameras, shots.proxy, steps=2, seed=3)
    assert video.shape == shots.source.shape and float(video.abs().max()) <= 1
    assert torch.equal(video, Refilmer.load(out).film(shots.source, shots.cameras, shots.proxy, steps=2, seed=3))
    assert not torch.equal(video, model.film(shots.source, shots.cameras, shots.proxy, steps=2, seed=4))
    assert not torch.equal(video, model.film(shots.source, shots.cameras, steps=2, seed=3))  # no rendering
    with pytest.raises(UserError, match="videos are 3 x 3 x 8 x 8"):
        model.film(shots.source[..., :4], shots.cameras)
    with pytest.raises(UserError, match="has no refilmer: train one"):
        Refilmer.load(tmp_path)


def test_a_few_steps_teach_something(drawn):
    torch.manual_seed(0)
    model = Refilmer(RefilmerConfig(dim=24, layers=1, strategy=SPEC))
    given = noisy(drawn[1], torch.Generator().manual_seed(0))
    before = float(model.loss(given).detach())
    train_flow(model, lambda _: given, 20, 1e-2)
    assert float(model.loss(given).detach()) < 0.8 * before
