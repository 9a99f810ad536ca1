# SPDX-License-Identifier: Apache-2.0
"""Byte language models of arms: equal terms, units that need no other, and weights that are judged twice."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from manyheads.errors import UserError
from manyheads.experiment import Arm
from manyheads.models.decoder import Decoder
from manyheads.tasks.training.byte_lm import ByteLM, spans
from manyheads.training import token_nll
from tolerance import nearly

from .conftest import SOFTMAX, TEXT, context, values

WINDOW = Arm("window", "softmax:window=8")


def test_arms_are_on_equal_terms(measured):
    results = measured(ByteLM(**TEXT), arms=(SOFTMAX, WINDOW), seeds=2)
    about = [row.about for row in results.rows if row.metric == "training_nll"]
    assert max(one["parameters"] for one in about) <= 1.02 * min(one["parameters"] for one in about)
    orders = {(row.arm, row.seed): row.about["order"] for row in results.rows if row.metric == "training_nll"}
    for seed in (0, 1):
        assert orders["softmax", seed] == orders["window", seed]
    assert orders["softmax", 0] != orders["softmax", 1]
    for arm in ("softmax", "window"):
        tuned = {row.at["rate"]: row.value for row in results.rows if (row.metric, row.arm) == ("tuning_nll", arm)}
        assert set(tuned) == {3e-3, 1e-2}
        rates = {row.about["rate"] for row in results.rows if (row.metric, row.arm) == ("training_nll", arm)}
        assert rates == {min(tuned, key=tuned.get)}
    assert len(values(results, "token_nll", "window")) == 2 * 4


def test_the_kept_model_is_the_one_that_was_judged(measured, texts, tmp_path):
    task = ByteLM(**TEXT)
    results = measured(task)
    model = Decoder.load(tmp_path / "run" / "models" / "softmax" / "seed-0")
    ids, _ = task._windows(context(texts), 1)
    wanted = [value for *_, value in values(results, "token_nll")]
    assert token_nll(model, ids).mean(1).tolist() == pytest.approx(wanted, rel=1e-6)
    torch.nn.init.normal_(model.embed.weight)
    assert token_nll(model, ids).mean(1).tolist() != pytest.approx(wanted, rel=1e-2)


@pytest.mark.parametrize("lost", ["units", "models", "both"])
def test_units_need_no_other(measured, tmp_path, lost):
    """Whatever of a run is lost, what is measured again is the same; another seed of the run is not."""
    whole = measured(ByteLM(**TEXT), seeds=2)
    before = values(whole, "token_nll")
    folder = tmp_path / "run"
    if lost != "units":
        shutil.rmtree(folder / "models")
    for path in sorted((folder / "units").iterdir())[1 if lost == "models" else 0 :]:
        path.unlink()
    assert values(measured(ByteLM(**TEXT), seeds=2), "token_nll") == before
    other = measured(ByteLM(**TEXT), seeds=2, seed=1, out=tmp_path / "other")
    assert [one[-1] for one in values(other, "token_nll")] != [one[-1] for one in before]


def test_a_model_of_other_settings_is_not_taken(measured, tmp_path):
    """A folder of models that other settings trained: the losses are those of a fresh run."""
    measured(ByteLM(**TEXT))
    longer = ByteLM(**{**TEXT, "steps": 12})
    fresh = values(measured(longer, out=tmp_path / "fresh"), "token_nll")
    shutil.rmtree(tmp_path / "run" / "units")
    (tmp_path / "run" / "run.json").unlink()
    assert values(measured(longer), "token_nll") == fresh


def test_tuning_runs_are_shorter_where_asked(measured):
    results = measured(ByteLM(**TEXT, tune_steps=3))
    (trained,) = [row for row in results.rows if row.metric == "training_nll"]
    assert trained.about["tokens"] == 8 * 4 * 32 and len(values(results, "tuning_nll")) == 2


def test_weights_are_judged_under_another_strategy(measured):
    arms = (SOFTMAX, Arm("softmax + ntk", "softmax:ntk=2", options={"weights_of": "softmax"}))
    results = measured(ByteLM(**TEXT, times=(1, 4)), arms=arms)
    by = {(arm, at["times"], sample): value for arm, sample, _, at, value in values(results, "token_nll")}
    assert len(by) == 16 and {arm for arm, *_ in values(results, "training_nll")} == {"softmax"}
    for sample in "0123":
        assert (
            by["softmax", 1, sample] == by["softmax + ntk", 1, sample]
        )  # within the trained length it changes nothing
    assert any(by["softmax", 4, sample] != by["softmax + ntk", 4, sample] for sample in "0123")


def test_weights_are_judged_with_a_calibrated_temperature(measured):
    t5 = Arm("t5", "softmax:position=t5")
    options = {"weights_of": "t5", "calibrated": "t5_attention_alignment"}
    arms = (t5, *(Arm(f"t5, {align}", t5.spec, options={**options, "align": align}) for align in ("none", "logn")))
    results = measured(ByteLM(**TEXT, times=(1, 4), judged=8), arms=arms)
    by = {(arm, at["times"]): value for arm, sample, _, at, value in values(results, "token_nll") if sample == "0"}
    assert by["t5, none", 4] == by["t5", 4] and by["t5, logn", 1] == by["t5", 1] and by["t5, logn", 4] != by["t5", 4]
    found = {arm: value for arm, *_, value in values(results, "temperature")}
    assert found == {"t5, none": 1.0, "t5, logn": nearly(math.log(32) / math.log(4 * 32))}


def test_spans_reach_as_far_as_the_text(measured, texts):
    assert spans(128, 4) == [(0, 32), (32, 128), (128, 256), (256, 512)]
    results = measured(ByteLM(**TEXT, reach=4))
    last = {at["last"] for *_, at, _ in values(results, "span_nll")}
    assert min(last) == 32 and max(last) == 4 * 32
    few = [replace(text, content=text.content[:3_000]) for text in texts]
    far = ByteLM(**TEXT, reach=2**20)
    reached = far.reached(context(few))
    assert 1 < reached < 2**20 and far._windows(context(few), reached)[0].shape[1] == reached * 32 + 1


def test_too_short_a_text_is_found_before_training(measured, texts, tmp_path):
    with pytest.raises(UserError, match="too short"):
        measured(ByteLM(**{**TEXT, "length": 10**6}))
    assert not (tmp_path / "run" / "models").exists()


def test_an_optimizer_of_the_arms_own(measured):
    results = measured(ByteLM(**TEXT), arms=(SOFTMAX, Arm("muon", "softmax", options={"optimizer": "muon"})))
    losses = [row.value for row in results.rows if row.metric == "training_nll"]
    assert losses[0] != losses[1] and len({row.about["order"] for row in results.rows if row.about.get("order")}) == 1
