# SPDX-License-Identifier: Apache-2.0
"""The task that makes models forget: all arms begin alike and are asked alike, and controls are what they say."""

import pytest
import torch

import manyheads
from manyheads.data import scenes
from manyheads.experiment import Arm
from manyheads.recipes.unlearning_bench import pooled, read
from manyheads.tasks.vision.unlearning import UnlearningTask
from manyheads.training.answers import answer_logits
from oracles import tasks
from tolerance import CLOSE, SAME, assert_close, is_close, is_far, nearly

needs_data = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")
TINY = {
    "dim": 16, "layers": 1, "heads": 4, "people": 3, "events": 3, "forget_people": 1, "forget_events": 1, "views": 1,
    "side": 3, "learn_steps": 4, "learn_batch": 4, "steps": 2, "batch": 2, "attack_steps": 1, "judged": 3, "top": 1,
    "drop": 1.0,
}  # fmt: skip
PLAIN, GOLD = Arm("plain"), Arm("gold", options={"how": "retrain"})
MOVED = Arm("moved", "unlearning_bench.gradient_ascent", options={"concepts": "person"})
NOISE = Arm("noise", options={"how": "noise", "like": "moved"})
HEADS = Arm("heads", "unlearning_bench", options={"heads": "random"})


@needs_data
def test_all_arms_are_asked_the_same_of_the_same_model():
    task = UnlearningTask(**TINY)
    run = tasks.context(PLAIN, GOLD, MOVED, NOISE, HEADS)
    task.guard(run)
    rows = tasks.rows(task, run)

    def named(arm):
        return {(r.metric, r.sample, tuple(sorted(r.at.items()))) for r in rows
                if r.arm == arm and r.metric not in ("moved", "steps_kept")}  # fmt: skip

    assert named("plain") == named("gold") == named("moved") == named("heads")
    assert tasks.values(rows, "gap", "gold") == nearly([0.0])
    assert (tasks.values(rows, "drift", "plain") == 0).all() and (tasks.values(rows, "drift", "moved") > 0).all()
    assert tasks.values(rows, "steps_kept", "moved").tolist() == [2] and not any(
        r.metric == "steps_kept" and r.arm in ("plain", "gold", "noise") for r in rows
    )
    assert sum(tasks.values(rows, "moved", "moved")) == nearly(1.0, torch.float32)
    assert tasks.values(rows, "moved", "heads", where="attention") == nearly([1.0])  # nothing but heads
    assert tasks.values(rows, "moved", "moved", where="attention")[0] < 0.99  # control
    for metric, count in (("efficacy", 6), ("generality", 6), ("scope", 12), ("retain", 12), ("real", 6)):
        assert 0 < len(tasks.values(rows, metric, "plain")) <= count, metric


@needs_data
def test_noise_is_as_long_as_what_it_is_like():
    task = UnlearningTask(**TINY)
    run = tasks.context(PLAIN)
    vlm = task.fresh(run, 0)
    first = {name: p.detach().clone() for name, p in vlm.model.named_parameters()}
    like = {name: torch.full_like(p, 0.01 * (i + 1)) for i, (name, p) in enumerate(first.items())}
    task._changed(run, NOISE, 0, vlm, task._bench(run, vlm), {"moved": like}, None)
    lengths = torch.stack([(p.detach() - first[name]).norm() for name, p in vlm.model.named_parameters()])
    want = torch.stack([p.norm() for p in like.values()])
    assert is_close(lengths, want, 100 * CLOSE)  # weights of a size of 1 are rounded, which noise of .01 feels
    assert not is_close(lengths, want.flip(0), 100 * CLOSE)  # control


def test_arms_that_do_not_unlearn_are_refused():
    task = UnlearningTask(**TINY)
    with pytest.raises(manyheads.UserError, match="unlearns; concentric_attention"):
        task.guard(tasks.context(PLAIN, Arm("rings", "concentric_attention")))
    with pytest.raises(manyheads.UserError, match="the baseline is the model as it is"):
        task.guard(tasks.context(MOVED, PLAIN))


@needs_data
def test_a_pool_is_learned_as_its_pictures_are(parts):
    joined = {"model": "joined", "tower": parts[0], "text": parts[1], "pool": 1}
    task = UnlearningTask(**{**TINY, **joined, "views": 2, "learn_steps": 30})
    run = tasks.context(PLAIN, GOLD)
    vlm = task.fresh(run, 0)
    bench = task._bench(run, vlm)
    pool = pooled(vlm, bench)
    items = [item for found in bench.trained.values() for item in found]
    assert len(pool) == len(items) and len(pool.features) == len({(i.person, i.event, i.view) for i in items})
    rows = torch.tensor([len(items) - 1, 0, 7])
    with torch.no_grad():
        found = answer_logits(vlm.model, pool.batch(rows))
        apart = [read(vlm, bench, [items[i]]) for i in rows]
        wanted = [answer_logits(vlm.model, x)[0] for x in apart]
    for mine, other, batch in zip(found, wanted, apart, strict=True):
        real = batch["answers"][0] >= 0
        assert_close(mine[: len(real)][real], other[real], SAME)
        assert is_far(found.flip(0)[0][: len(real)][real], other[real], SAME) or batch is apart[2]
    rows = tasks.rows(task, run)
    assert tasks.values(rows, "gap", "gold") == nearly([0.0]) and len(tasks.values(rows, "drift", "gold"))
