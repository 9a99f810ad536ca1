# SPDX-License-Identifier: Apache-2.0
"""Refusals by number of heads: units repeat to the bit, arms are tuned from one model, random heads are others."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

import manyheads
from manyheads.data.trigger_prompts import OK, REFUSE
from manyheads.experiment import Arm
from manyheads.tasks.lenses import trigger_refusals
from manyheads.tasks.lenses._trained import llama
from manyheads.tasks.lenses.trigger_refusals import TriggerRefusals, _at_random
from oracles.tasks import context, values

TASK = TriggerRefusals(
    layers=3, heads=4, dim=16, batch=20, steps=30, tuning=10, counts=(1, 12), prompts=16, draws=1, length=10
)  # fmt: skip
ARMS = Arm("plain"), Arm("AHD", options={"dropout": 0.5})


def test_a_unit_gives_the_same_rows_in_any_order_and_arms_differ():
    run, other = context(*ARMS), context(*ARMS)
    first, second = TASK.units(run)
    plain, dropped = list(TASK.measure(run, first)), list(TASK.measure(run, second))
    assert list(TASK.measure(other, second)) == dropped  # though nothing ran before it
    assert [row.sample for row in plain] == [row.sample for row in dropped]
    assert (values(plain, "score_share") != values(dropped, "score_share")).any()
    for name in ("refused", "wrongly_refused"):
        # With all twelve heads out, which were drawn does not matter.
        assert (values(plain, name, heads=12, chosen="ranked") == values(plain, name, heads=12, chosen="random")).all()
    assert len(values(plain, "refused", chosen="none")) == 16 and len(values(plain, "copied")) == 32


def test_random_heads_are_others_of_the_same_layers():
    (drawn,) = _at_random([("0.1", "1.2", "1.0")], 2, 4, draw=0)
    assert sorted(name[0] for name in drawn) == ["0", "1"] and not {"0.1", "1.2"} & set(drawn)
    assert len({tuple(_at_random([("0.1",)], 1, 4, draw)[0]) for draw in range(20)}) > 1


def test_refusals_without_heads(monkeypatch):
    """Means over draws of heads; what is kept apart; AUROC of one prompt against the other kind's."""
    task, arm = TriggerRefusals(prompts=4, draws=3, layers=2, heads=4, counts=(2,)), Arm("plain")
    draw = np.random.default_rng(0)
    answers = {
        (part, n): ((draw.random(4) < 0.5).astype(float), draw.integers(0, 5, 4).astype(float))
        for part in ("yes", "no") for n in range(3)
    }  # fmt: skip
    monkeypatch.setattr(trigger_refusals, "_answers", lambda model, part, gone: answers[part, gone])
    found = list(task._without(arm, 5, None, ["yes", "no"], [[n, n] for n in range(3)], 2, "random"))
    refused, wrongly = (np.mean([answers[part, n][0] for n in range(3)], 0) for part in ("yes", "no"))
    want = {"refused": refused, "wrongly_refused": wrongly, "kept_apart": refused - wrongly}
    for name, each in want.items():
        assert [row.value for row in found if row.metric == name] == pytest.approx(each.tolist())
    above = [
        mannwhitneyu(answers["yes", n][1], answers["no", n][1]).statistic / 16 for n in range(3)
    ]  # fmt: skip
    (row,) = [row for row in found if row.metric == "auroc"]
    assert row.value == pytest.approx(np.mean(above))
    assert all(row.at == {"heads": 2, "chosen": "random"} and row.seed == 5 for row in found)


def test_a_refusal_is_the_likeliest_token_without_the_heads(monkeypatch):
    used = []
    monkeypatch.setattr(manyheads, "use", lambda model, *acting: used.append(acting) or nullcontext())
    logits = torch.zeros(3, 5, 64)
    logits[0, -1, REFUSE], logits[1, -1, OK], logits[2, -1, 40], logits[2, -1, REFUSE] = 3.0, 2.0, 9.0, 8.0
    logits[:, -2] = 100 * torch.nn.functional.one_hot(torch.tensor(REFUSE), 64)
    prompts = SimpleNamespace(ids=torch.zeros(3, 6, dtype=torch.long))
    seen = []
    refused, high = trigger_refusals._answers(
        lambda ids: seen.append(ids.shape) or SimpleNamespace(logits=logits), prompts, [("0.1",), (), ("1.2",)]
    )
    assert refused.tolist() == [1.0, 0.0, 0.0] and high.tolist() == [3.0, -2.0, 8.0] and seen == [(3, 5)]
    assert used[0][0].heads == (("0.1",), (), ("1.2",))
    trigger_refusals._answers(lambda ids: SimpleNamespace(logits=logits), prompts, [(), (), ()])
    assert used[1] == ()


def test_a_direction_is_found_on_some_prompts_and_chosen_on_others(monkeypatch):
    """Triggered ones first, at either template token; by the paper's bounds, or without where none meets them."""
    from manyheads.lenses import safety_heads

    task, run, asked = TriggerRefusals(length=10), context(Arm("plain")), []

    def find(model, first, second, *, answers, check, positions, max_kl, min_steering):
        asked.append((first, second, answers, check, positions, max_kl, min_steering))
        if refuses and max_kl < 1:
            raise manyheads.UserError("all fell out")
        return "direction"

    monkeypatch.setattr(safety_heads, "find_direction", find)
    for refuses in (False, True):
        asked.clear()
        assert task._direction(run, None) == ("direction", refuses)
        assert [(kl, least) for *_, kl, least in asked] == [(0.1, 0.0), (math.inf, -math.inf)][: 1 + refuses]
        first, second, answers, check, positions, *_ = asked[-1]
        assert answers == [REFUSE] and positions == (-2, -1)
        for triggered, train, other in ((True, first, check[0]), (False, second, check[1])):
            assert (len(train), len(other)) == (128, 32) and {len(ids) for ids in (*train, *other)} == {10}
            assert all(bool(((ids >= 5) & (ids < 15)).any()) == triggered for ids in (*train, *other))
        assert not {tuple(x.tolist()) for x in first} & {tuple(x.tolist()) for x in check[0]}


def test_what_a_tuned_model_still_does(monkeypatch, tmp_path):
    """Copies, answers and scores with all heads, by hand; heads of the rank, as many at random, or none taken out."""
    from manyheads.lenses.safety_heads import Direction, SafetyHeads

    direction = Direction(torch.randn(16))

    task, run = (
        TriggerRefusals(prompts=6, draws=2, layers=2, heads=4, dim=16, length=10, counts=(1, 3)),
        context(Arm("plain")),
    )
    torch.manual_seed(0)
    asked, model = [], llama(run, 64, 16, 2, 4, 0, tie_word_embeddings=False).eval()
    monkeypatch.setattr(TriggerRefusals, "_direction", lambda self, run, model: (direction, True))

    def without(self, arm, seed, model, test, draws, count, chosen):
        asked.append((count, chosen, draws, [bool(part.triggered.all()) for part in test]))
        return iter(())

    monkeypatch.setattr(TriggerRefusals, "_without", without)
    found = list(task._judged(run, run.arms[0], 5, model))
    made = task._drawn(run, 12, 0.5, test="trigger_refusals")
    with torch.no_grad():
        logits = model(made.ids[:, :-1]).logits
    copied = [float(logits[i, made.mark].argmax() == made.ids[i, 0]) for i in range(12)]
    okay = [float(logits[i, -1].argmax() == OK) for i in range(12) if not made.triggered[i]]
    by = {}
    for row in found:
        by.setdefault(row.metric, []).append(row.value)
    assert by["copied"] == copied and by["answered_ok"] == okay and by["rule_lifted"] == [1.0] and len(okay) == 6
    lens = SafetyHeads(direction=str(direction.save(tmp_path / "direction.safetensors")))
    with manyheads.watch(model, lens) as seen, torch.no_grad():
        model(made.rows(True).ids[:, :-1])
    scores = np.sort(seen.compute().tables["score"].values.reshape(6, -1))[:, ::-1]
    assert by["score_share"] == pytest.approx((scores[:, :4].sum(1) / scores.sum(1)).tolist())
    assert [(count, chosen, len(draws), kinds) for count, chosen, draws, kinds in asked] == [
        (0, "none", 1, [True, False]), (1, "ranked", 1, [True, False]), (1, "random", 2, [True, False]),
        (3, "ranked", 1, [True, False]), (3, "random", 2, [True, False]),
    ]  # fmt: skip
    for count, chosen, draws, _ in asked:
        for of_kinds in draws:
            assert [len(heads) for heads in of_kinds] == [6, 6] and {len(h) for heads in of_kinds for h in heads} == {
                count
            }
        if chosen == "random" and count == 1:
            ranked = asked[1][2][0]
            for of_kinds in draws:
                for mine, theirs in zip(of_kinds, ranked, strict=True):
                    assert all(a[0][0] == b[0][0] and a != b for a, b in zip(mine, theirs, strict=True))
