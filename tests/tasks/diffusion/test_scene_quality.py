# SPDX-License-Identifier: Apache-2.0
"""What is chosen for an arm: a scale of its own or that of another arm, and heads by the measure that it names."""

import pytest
import torch

pytest.importorskip("diffusers", reason="needs the extra [diffusion]")

from manyheads.diffusion._styles import style
from manyheads.errors import UserError
from manyheads.experiment import Arm, Experiment, Pipeline, RunContext, run
from manyheads.models.scenes import load_scenes
from manyheads.tasks.diffusion.scene_quality import SceneQuality

PLAIN = Arm("plain")
SCALES = {"scale": (0.1, 0.3, 1.0)}


@pytest.fixture(scope="module")
def subject():
    return Pipeline("scenes", load_scenes("scenes"))


def test_arms_take_the_scale_that_is_best_for_the_arm_they_name(subject, monkeypatch):
    asked = []

    def distance(self, run, arm, strategy):
        asked.append((arm.name, strategy.mask, strategy.scale))
        return abs(strategy.scale - {"attention": 0.3, "all": 1.0, "random": 0.1}[strategy.mask])

    monkeypatch.setattr(SceneQuality, "_distance", distance)
    attended = Arm("attended", "sag:mask=attention", options={"tune": SCALES, "tuned_for": "attended"})
    shared = Arm("shared", "sag:mask=all", options={"tune": SCALES, "tuned_for": "attended"})
    own = Arm("own", "sag:mask=all", options={"tune": SCALES})
    fixed = Arm("fixed", "sag:mask=random", options={"tune": {"scale": (1.0,)}})
    lost = Arm("lost", "sag", options={"tune": SCALES, "tuned_for": "nobody"})
    made, task = RunContext(subject, (PLAIN, shared, attended, own, fixed, lost)), SceneQuality()
    found = {}
    for arm in (shared, attended, own, fixed):
        ((strategy,),) = task.chosen(made, arm, 0)
        found[arm.name] = (strategy.mask, strategy.scale)
    assert found == {
        "shared": ("all", 0.3),
        "attended": ("attention", 0.3),
        "own": ("all", 1.0),
        "fixed": ("random", 1),
    }
    assert {name for name, *_ in asked} == {"attended", "own"} and len(asked) == 6  # once each, by its own mask
    with pytest.raises(UserError, match="nobody"):
        task.chosen(made, lost, 0)


def test_heads_are_chosen_by_the_measure_that_the_arm_names(subject, monkeypatch):
    worth = {"": {"0.1": 3.0, "2.2": 2.0}, "edges": {"5.5": 3.0, "1.0": 2.0}}

    def scores(self, run, arm, seed, strategy):
        return {name: sum(best.get(head, -1.0) for head in strategy.heads) for name, best in worth.items()}

    monkeypatch.setattr(SceneQuality, "_scores", scores)
    made, task = RunContext(subject, (PLAIN,)), SceneQuality(styles=("edges",))

    def heads(**options):
        ((strategy,),) = task.chosen(
            made, Arm("x", "headhunter", options={"heads": "searched", "count": 2, **options}), 0
        )
        return strategy.heads

    assert heads() == ("0.1", "2.2") and heads(style="edges") == ("5.5", "1.0")
    with pytest.raises(UserError, match="warmth"):
        heads(style="warmth")


def test_figures_are_of_the_images_that_were_made(subject, tmp_path):
    arms = (Arm("guided", "headhunter:heads=4.1+1.4,scale=3,strength=1"),)
    task = SceneQuality(samples=3, steps=2, guidance=1.0, batch=2, styles=("edges",))
    experiment = Experiment(subject=subject, arms=arms, baseline=PLAIN, tasks=(task,), equal="steps", seeds=1)
    rows = run(experiment.at("cpu"), tmp_path).rows
    by = {(row.arm, row.metric, row.sample): row.value for row in rows}
    assert {row.metric for row in rows} == {"likelihood", "fd_small", "object", "edges"}
    made = RunContext(subject, (PLAIN, *arms))
    for arm in made.arms:
        images = task._made(made, arm, 0, 3, "judged", [arm.strategies])
        assert [by[arm.key, "edges", f"{i}"] for i in range(3)] == pytest.approx(
            style("edges")(images).tolist(), rel=1e-4
        )
    assert by["guided", "edges", "0"] != pytest.approx(by["plain", "edges", "0"], rel=1e-2)  # control: arms differ
    free = SceneQuality(samples=3, steps=2, conditioned=False, batch=2)
    tuned = Arm("tuned", "sag", options={"tune": {"scale": (0.5,)}})
    experiment = Experiment(subject=subject, arms=(tuned,), baseline=PLAIN, tasks=(free,), equal="steps", seeds=1)
    rows = run(experiment.at("cpu"), tmp_path / "free").rows
    assert {row.metric for row in rows} == {"fd_small", "tuned"}
    assert [(row.arm, row.value) for row in rows if row.metric == "tuned"] == [("tuned", 0.5)]
    assert all(torch.isfinite(torch.tensor(row.value)) for row in rows)
