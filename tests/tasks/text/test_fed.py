# SPDX-License-Identifier: Apache-2.0
"""Tasks that judge every token fed behind a context: what they draw, and what they say of caches that are known."""

from pathlib import Path

import numpy as np
import pytest
import torch

from manyheads.experiment import Arm, CausalLM
from manyheads.recipes.gist import new_gists
from manyheads.tasks.text._gists import GistMemory, GistRecitation
from manyheads.tasks.text.boundary_loss import BoundaryLoss
from manyheads.tasks.text.exact_string import ExactString
from manyheads.tasks.text.recitation import Recitation
from oracles import tasks

LENGTH = 96
FULL, FEW = Arm("full"), Arm("streaming_llm", "streaming_llm:schedule=prefill", 0.25)


@pytest.fixture(scope="module")
def run():
    subject = CausalLM("default")
    return tasks.context(FULL, FEW, subject=subject)


def test_recitation(run):
    """A passage that is cached is said again; a foreign one stands in its place and in the same words behind."""
    task = Recitation(lengths=(LENGTH,), samples=2)
    drawn = task.drawn(run, LENGTH)
    for (own, said), (foreign, planted) in zip(drawn["own"], drawn["foreign"], strict=True):
        assert len(own) == len(foreign) == LENGTH and len(said) == len(planted)
        changed = np.flatnonzero(own != foreign)
        at = changed[0] - next(i for i in range(32) if said[-32:][i] != planted[-32:][i])
        assert (own[at : at + 32] == said[-32:]).all() and (foreign[at : at + 32] == planted[-32:]).all()
        assert changed[-1] < at + 32
    rows = tasks.rows(task, run)
    for passage in ("own", "foreign"):
        full, few = (tasks.values(rows, "token_nll", arm, passage=passage) for arm in ("full", FEW.key))
        assert len(full) == 2 and (full < 1).all() and (few > full + 1).all()


def test_exact_string(run):
    """The digits stand in the context once; right digits only fall along the string, and a cut one is not known."""
    task = ExactString(lengths=(LENGTH,), samples=2)
    for context, fed in task.drawn(run, LENGTH)["code"]:
        code = fed[-32:].tolist()
        places = [i for i in range(LENGTH - 31) if context[i : i + 32].tolist() == code]
        assert len(context) == LENGTH and len(places) == 1 and len(set(code)) > 4
    rows = tasks.rows(task, run)
    full, few = (tasks.values(rows, "digit_nll", arm) for arm in ("full", FEW.key))
    assert (full < few - 0.5).all() and (few > 2).all() and len(tasks.values(rows, "right", "full", digits=32)) == 2
    fed = torch.arange(40)[None]
    logits = torch.nn.functional.one_hot(fed[:, 1:], 40).float()
    logits[:, 39 - 32 + 10] = 0  # the eleventh digit is missed
    found = {(metric, *at.values()): value for metric, at, (value,) in task.judged("code", logits, fed)}
    assert [found["right", k] for k in (8, 16, 32)] == [1, 0, 0]


def test_boundary_loss(run):
    """Of 64 tokens the first 12 and the last 12; the second do not see what was dropped any more than they need."""
    rows = tasks.rows(BoundaryLoss(lengths=(LENGTH,), samples=2), run)
    for part in ("after", "later"):
        full, few = (tasks.values(rows, "token_nll", arm, part=part) for arm in ("full", FEW.key))
        assert len(full) == 2 and (full != few).all()
    with torch.inference_mode():
        ids = torch.tensor(run.kept(("code", 2, 0.0), None).plain("boundary", LENGTH, 2, 64)[0][0])[None]
        nats = torch.nn.functional.cross_entropy(
            run.subject.model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none"
        )
    first = tasks.values(rows, "token_nll", "full", part="after")[0]
    assert abs(first - float(nats[LENGTH : LENGTH + 12].mean())) < 1e-4


def test_arms_that_are_trained(tmp_path, monkeypatch):
    """An arm is trained once for each seed and all tasks, and what is held is of its gists."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    asked = []

    def train(model, batches, *, segments, seed, **more):
        asked.append((segments.ratio, segments.granularity, more["ae"], more["tie"], seed, tuple(batches(0).shape)))
        return new_gists(model, segments, lora=1, seed=seed)

    monkeypatch.setattr("manyheads.recipes.gist.train_gists", train)
    arm = Arm("gists", options={"ratio": 4, "ae": 0.5, "tie": True})
    run = tasks.context(FULL, arm, Arm("snapkv", "snapkv", 0.25), subject=CausalLM("default"), seeds=(0, 1))
    run.folder = Path(tmp_path)
    size = {"lengths": (64,), "samples": 1, "segment": 32, "length": 64, "train_text": str(text)}
    memory = tasks.rows(GistMemory(label="memory", **size), run)
    again = tasks.rows(
        GistRecitation(label="again", lengths=(96,), **{k: x for k, x in size.items() if k != "lengths"}), run
    )
    assert asked == [(4, "fine", 0.5, True, seed, (1, 65)) for seed in (0, 1)]
    held = {arm: tasks.values(memory, "cache", arm) for arm in ("full", "gists", "snapkv:budget=0.25")}
    assert (held["gists"] * 4 == held["full"]).all() and len(held["gists"]) == 2
    assert (held["gists"] <= held["snapkv:budget=0.25"]).all()
    assert {row.seed for row in again} == {0, 1} and len(tasks.values(again, "token_nll", "gists", passage="own")) == 2
