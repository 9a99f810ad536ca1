# SPDX-License-Identifier: Apache-2.0
"""Classes of pictures and films under arms with fewer tokens: what is drawn, trained alike, judged and timed."""

import pytest
import torch

import manyheads
from manyheads import UserError
from manyheads.data import photograph_classes, scenes
from manyheads.experiment import Arm, Experiment, RunContext, Trainable, run
from manyheads.recipes import tokenlearner as recipe
from manyheads.tasks.vision.picture_classes import PictureClasses
from manyheads.tasks.vision.picture_cost import PictureCost
from tiny.image_encoders import forward

pytestmark = pytest.mark.skipif(
    not (scenes.available() and photograph_classes.available()),
    reason="CIFAR-10 and Noto Emoji are not on this machine",
)
TINY = {"dim": 16, "layers": 4, "heads": 2}
SHIFTS = ("score.2.bias", "mix.bias", "before.bias")  # of a softmax, and of all channels before a norm
ARMS = (
    Arm("learned", "tokenlearner:tokens=2"), Arm("pooled", "token_pool:cell=4,across=2"),
    Arm("short", options={"layers": 2}),
)  # fmt: skip


def context(*arms):
    return RunContext(Trainable(), (Arm("full"), *arms))


@pytest.mark.slow
def test_what_is_drawn():
    photographs, films = PictureClasses(**TINY), PictureClasses(**TINY, of="films")
    for task, shape, classes in ((photographs, (3, 32, 32), 10), (films, (8, 3, 16, 16), 32)):
        pixels, labels = task.training_batch(context(), 6, 0, 1)
        assert pixels.shape == (6, *shape) and pixels.abs().max() <= 1
        assert labels.min() >= 0 and labels.max() < classes == task.classes
        for seed, step, same in ((0, 1, True), (0, 2, False), (1, 1, False)):
            assert torch.equal(task.training_batch(context(), 6, seed, step)[0], pixels) == same
        test, labels = task.test_pixels(context(), 5)
        assert test.shape == (5, *shape) and len(labels) == 5
    images, labels = photograph_classes.photographs("test")
    assert images.shape == (5000, 3, 32, 32) and labels.bincount().tolist() == [500] * 10
    sample = scenes.draw("moving", 4, torch.Generator().manual_seed(3), "test", object=5)
    from manyheads.tasks.vision._picture_classifiers import _films

    assert set((_films(9, torch.Generator().manual_seed(3), "test")[1] // 4).tolist()) - set(sample.labels[:, 0])


@pytest.mark.parametrize("of", ["photographs", "films"])
def test_arms_begin_alike_and_are_judged_on_the_same(of, tmp_path):
    tasks = (
        PictureClasses(**TINY, of=of, batch=4, steps=3, samples=6, at_once=4),
        PictureCost(**TINY, of=of, at_once=2, rounds=2),
    )
    rows = run(Experiment(subject="trainable", arms=ARMS, tasks=tasks, seeds=1).at("cpu"), tmp_path).rows
    found = {name: [r for r in rows if r.metric == name] for name in ("accuracy", "training_loss", "seconds")}
    assert [len(each) for each in found.values()] == [4 * 6, 4, 4 * 2]
    assert {r.sample for r in found["accuracy"] if r.arm == "learned"} == {f"{i}" for i in range(6)}
    assert all(r.value > 0 for r in found["seconds"])
    task = tasks[0]
    full, learned, short = (task.fresh(context(), arm, 0) for arm in (Arm("full"), ARMS[0], ARMS[2]))
    assert all(torch.equal(a, b) for a, b in zip(full.parameters(), learned.parameters(), strict=True))
    assert short.config.num_hidden_layers == 2


def test_training_changes_model_and_weights_and_ends_in_evaluation(tmp_path):
    task, run_ = PictureClasses(**TINY, batch=8), context()
    model, strategy = task.fresh(run_, Arm("full"), 0), manyheads.parse("tokenlearner:tokens=2,fuse=true")
    before = [p.clone() for p in model.parameters()]
    torch.manual_seed(0)
    reducer, state = recipe.train_classifier(
        model, lambda step: task.training_batch(run_, 8, 0, step), strategy, budget=12, lr=3e-3
    )
    torch.manual_seed(0)
    untrained = strategy.new_weights(16, 4).state_dict()
    changed = {name: not torch.equal(x, untrained[name]) for name, x in reducer.trained.state_dict().items()}
    still = [name for name, was in changed.items() if not was and not name.endswith(SHIFTS)]
    assert all(name.startswith("fuse.2.") for name in still)  # a class token alone is read of what the last fuser gives
    assert sum(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) > 0.9 * len(before)
    assert not model.training and not reducer.trained.training and len(state.losses) == 12
    with pytest.raises(UserError, match="is no single one"):
        task.guard(context(Arm("other", "massive_values")))


def test_the_recipe_writes_what_the_strategy_reads(tmp_path, capsys):
    import transformers

    out = str(tmp_path / "made")
    sizes = ["--budget", "2 steps", "--dim", "32", "--layers", "2", "--batch", "2", "--device", "cpu"]
    assert recipe.main(["--out", out, "--strategy", "tokenlearner:tokens=3,version=1", *sizes]) == 0
    assert f"tokenlearner:weights={out}" in capsys.readouterr().out
    model, x = transformers.ViTForImageClassification.from_pretrained(out).eval(), torch.randn(2, 3, 32, 32)
    plain = forward(model, x)
    with manyheads.use(model, f"tokenlearner:weights={out}"):
        assert not torch.equal(forward(model, x), plain)
    with pytest.raises(UserError, match="no weights to train"):
        recipe.main(["--out", out, "--strategy", "tome", *sizes])
