# SPDX-License-Identifier: Apache-2.0
"""Scenes in depth and questions about them are what they say; one training for all arms, and schedules from it."""

import pytest
import torch

from manyheads import UserError
from manyheads.data import scenes
from manyheads.data.object_scenes import draw_depths
from manyheads.data.scenes import OBJECTS
from manyheads.data.visual_questions import SIDES, sides
from manyheads.experiment import Arm, Experiment, RunContext, Trainable, run
from manyheads.models import joined_vlm
from manyheads.recipes import spatial_gating as recipe
from manyheads.tasks.vision.spatial_questions import SpatialQuestions
from manyheads.tokens.spatial_gating import schedule_of
from tiny.joined import make_parts

pytestmark = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")
ARMS = (
    Arm("full"), Arm("gated", "spatial_gating:least=1,start=1", options={"calibrated": True}),
    Arm("anew", "spatial_gating:least=1,start=1,eta=0.5"),
    Arm("once", "spatial_gating:least=1,start=1", options={"keep": 0.25, "by": "last"}),
    Arm("random", "spatial_gating:least=1,start=1", options={"keep": 0.25, "by": "random"}),
)  # fmt: skip
TINY = {"dim": 16, "layers": 3, "align": 2, "batch": 2, "steps": 2, "samples": 3, "wider": 16, "longer": 4, "rounds": 2}


def test_scenes_are_where_they_say_and_paler_behind():
    scene = draw_depths(3, torch.Generator().manual_seed(0), planes=4, grid=3, size=10, objects=6)
    empty = draw_depths(3, torch.Generator().manual_seed(0), planes=4, grid=3, size=10, objects=1)
    assert scene.images.shape == (3, 4, 3, 30, 30) and scene.places.shape == (3, 6, 3)
    for n in range(3):
        assert len({tuple(place) for place in scene.places[n].tolist()}) == 6
        assert len(set(scene.objects[n].tolist())) == 6
        for kind, (plane, row, column) in zip(scene.objects[n].tolist(), scene.places[n].tolist(), strict=True):
            at = (n, plane, slice(None), slice(row * 10, row * 10 + 10), slice(column * 10, column * 10 + 10))
            sprite, haze = scenes.sprites(10)[kind], 0.6 * plane / 3
            whole = sprite[3] > 0.999
            seen = (scene.images[at] + 1) / 2
            wanted = sprite[:3] + haze * (1 - sprite[:3])
            assert (seen - wanted)[:, whole].abs().max() < 2e-3  # of pixels that are all but opaque
    assert scene.images[:, 3].mean() > scene.images[:, 0].mean() and empty.images[:, 3].amin() > -0.2
    with pytest.raises(UserError, match="not 9"):
        draw_depths(1, torch.Generator(), planes=2, grid=2, size=4, objects=9)


def test_answers_are_true_and_about_half_are_yes():
    """Read back from the ids: word by word, against places that are drawn alike."""
    vlm = joined_vlm.small(patches=4, size=8, dim=16, layers=1, heads=1, words=SpatialQuestions.words)
    words = {i + 3: word for i, word in enumerate(SpatialQuestions.words)}
    given = {"planes": 4, "grid": 4, "size": 8, "objects": 5}
    asked = sides(vlm.language, 200, torch.Generator().manual_seed(2), patches=4, **given)
    scene = draw_depths(200, torch.Generator().manual_seed(2), **given)
    alone = sides(vlm.language, 3, torch.Generator().manual_seed(2), patches=4, apart=True, **given)
    assert alone.ids.shape == (24, 64 + 1 + 2 + 3) and alone.images.shape == (24 * 4, 3, 32, 32)
    few = sides(vlm.language, 3, torch.Generator().manual_seed(2), patches=4, **given)
    assert torch.equal(alone.truth.view(3, 8), few.truth) and torch.equal(alone.images[4 * 8 : 4 * 9], few.images[4:8])
    for q in range(8):
        words_of = [alone.ids[q, at - 1 : at + 2] for at in alone.at[q].tolist()]
        assert torch.equal(words_of[0], few.ids[0, few.at[0, q] - 1 : few.at[0, q] + 2])
    counts = {word: [] for word in SIDES}
    for n in range(200):
        where = dict(zip(scene.objects[n].tolist(), scene.places[n].tolist(), strict=True))
        assert int((asked.ids[n] == vlm.language.image).sum()) == 64
        for q, at in enumerate(asked.at[n].tolist()):
            side, thing, answer = (words[int(i)] for i in asked.ids[n, at - 1 : at + 2])
            place = where.get(OBJECTS.index(thing))
            true = place is not None and (side == "there" or place[SIDES.index(side)] < 2)
            assert (answer == "yes") == true == bool(asked.truth[n, q])
            assert SIDES[int(asked.cells[n, q])] == side and (place is not None or side == "there")
            counts[side].append(true)
    assert all(0.3 < sum(each) / len(each) < 0.7 for each in counts.values())


def test_one_training_for_all_and_schedules_from_it(tmp_path):
    task = SpatialQuestions(**TINY)
    plan = Experiment(subject="trainable", arms=ARMS, baseline=ARMS[0], tasks=(task,), seeds=1).at("cpu")
    rows = run(plan, tmp_path).rows
    of = {(row.metric, row.arm) for row in rows}
    assert {arm for metric, arm in of if metric == "right"} == {arm.name for arm in ARMS}
    assert {arm for metric, arm in of if metric == "seconds"} == {"full", "gated", "once", "random"}
    kept = {arm.name: [r.value for r in rows if r.metric == "kept" and r.arm == arm.name] for arm in ARMS}
    assert kept["full"] == [1] and len(kept["anew"]) == 3 * 8  # text by text
    assert kept["once"] == kept["random"] == [pytest.approx((1 + 0.25 + 0.25) / 3)]
    idle = [r for r in rows if r.metric == "idle"]
    assert {r.at["block"] for r in idle} == {0, 1, 2} and len(idle) == 3 * 16 * 8
    answers = [r for r in rows if r.metric in ("right", "seen") and r.arm == "full"]
    assert len(answers) == 3 * len(OBJECTS)
    for arms, match in (((Arm("full", "spatial_gating"),), "as it is"), ((ARMS[0], Arm("x", "tome")), "is none")):
        with pytest.raises(UserError, match=match):
            task.guard(RunContext(Trainable(), arms))


def test_a_joined_model_learns_from_a_pool(tmp_path):
    tower, text = make_parts(tmp_path, words=SpatialQuestions.words)
    task = SpatialQuestions(
        model="joined",
        tower=tower,
        text=text,
        pool=4,
        align=2,
        batch=2,
        steps=2,
        samples=2,
        wider=16,
        longer=4,
        rounds=1,
    )
    plan = Experiment(subject="trainable", arms=ARMS[1:2], baseline=ARMS[0], tasks=(task,), seeds=1).at("cpu")
    rows = run(plan, tmp_path / "run").rows
    assert {row.arm for row in rows if row.metric == "seen"} == {"full", "gated"}
    assert len([row for row in rows if row.metric == "idle"]) == 2 * 16 * 8


def test_schedules_of_arms():
    flows = [torch.tensor([[8.0, 1, 0.5, 0.5]])] * 3
    made = {arm.name: SpatialQuestions(**TINY)._strategy(arm, flows) for arm in ARMS}
    assert made["full"] is None and made["anew"].schedule == ()
    assert made["gated"].schedule == schedule_of(flows, 0.95, 1) == (1.0, 0.75, 0.75)
    assert made["once"].schedule == made["random"].schedule == (1.0, 0.25, 0.25)
    assert (made["gated"].by, made["once"].by, made["random"].by) == ("question", "last", "random")


def test_the_recipe_prints_a_schedule(tmp_path, capsys):
    tower, text = make_parts(tmp_path, words=SpatialQuestions.words)
    joined_vlm.save(joined_vlm.join(tower, text), tmp_path / "joined")
    more = ["--scenes", "3", "--planes", "2", "--grid", "4", "--start", "1", "--device", "cpu"]
    assert recipe.main(["--model", str(tmp_path / "joined"), *more]) == 0
    said = capsys.readouterr().out
    assert "spatial_gating:schedule=1+" in said and said.count("%") == 3
    assert recipe.main(["--model", str(tmp_path), *more]) == 1
    assert "holds no joined model" in capsys.readouterr().err
