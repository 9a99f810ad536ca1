# SPDX-License-Identifier: Apache-2.0
"""Scores of translations: correlations as scipy's, what is kept, the controls; every arm has a value a sentence."""

import numpy as np
import pytest
import torch
from scipy import stats

import manyheads
from manyheads.claims import load
from manyheads.data.translations import made_up
from manyheads.experiment import Arm
from manyheads.models.translator import new_tokenizer, new_translator, translate
from manyheads.tasks.lenses import spoken_digits
from manyheads.tasks.lenses._scored import Shuffled, by_prompt, judged, score_of
from manyheads.tasks.lenses.translated_sentences import TranslatedSentences, _read, character_f
from oracles.tasks import context, rows, values
from tolerance import FORMULA, SAME, assert_close, is_far

RNG = np.random.default_rng(0)
LENGTH = RNG.integers(5, 20, 60).astype(float)
QUALITY = RNG.normal(size=60) - LENGTH / 5
SCORE = QUALITY + RNG.normal(size=60)


def found(score, lengths=None):
    return {name: x.mean() for name, x in judged(score, QUALITY, lengths or {"output": LENGTH})}


def test_correlations_are_those_of_ranks():
    got = found(SCORE)
    assert_close(got["goes_with_quality"], stats.spearmanr(SCORE, QUALITY).statistic, FORMULA)
    assert is_far(got["goes_with_quality"], stats.pearsonr(SCORE, QUALITY).statistic, FORMULA)
    a, b, c = (
        stats.spearmanr(*pair).statistic for pair in ((SCORE, QUALITY), (SCORE, LENGTH), (QUALITY, LENGTH))
    )  # fmt: skip
    partial = (a - b * c) / np.sqrt((1 - b**2) * (1 - c**2))
    assert_close(got["beyond_length"], partial, 8 * FORMULA)
    assert found(-LENGTH)["beyond_length"] == 0 and found(-LENGTH)["goes_with_quality"] > 0.5


def test_what_is_kept():
    kept = np.argsort(-SCORE)[:30]
    assert_close(found(SCORE)["kept_quality"], QUALITY[kept].mean(), FORMULA, unit=1.0)
    assert found(QUALITY)["kept_quality"] > found(SCORE)["kept_quality"] > found(-SCORE)["kept_quality"]
    none = np.where(np.arange(60) == 3, np.nan, SCORE)  # what has no score is thought worst
    assert_close(found(none)["kept_quality"], QUALITY[np.argsort(-np.nan_to_num(none, nan=-99))[:30]].mean(), FORMULA)
    assert np.isfinite(found(np.full(60, np.nan))["goes_with_quality"])


def test_shuffled_attention_keeps_how_even_each_row_is():
    """Its rows have the same entropy at other source tokens: only what is told of the source is another."""
    pairs = made_up(12, np.random.default_rng(0))
    tokenizer = new_tokenizer([text for pair in pairs for text in pair], 320)
    torch.manual_seed(0)
    model = new_translator(len(tokenizer), 32).eval()
    made = translate(model, tokenizer, [source for source, _ in pairs], longest=6)
    seen = []
    for lens in (Shuffled(), manyheads.parse("attention_confidence")):
        with manyheads.watch(model, lens) as watched, torch.no_grad():
            for part, batch in _read(model, made):
                watched.roles = manyheads.TokenSpans({"target": [[(0, len(x.target))] for x in part]})
                model(**{name: x for name, x in batch.items() if name != "labels"}, use_cache=False)
        seen.append(by_prompt(watched.compute()))
    assert_close(seen[0]["AP_out"], seen[1]["AP_out"], SAME)
    assert is_far(seen[0]["AP_in"], seen[1]["AP_in"], SAME) and is_far(seen[0]["CDP"], seen[1]["CDP"], SAME)


def test_every_arm_has_a_value_for_each_sentence():
    claim = load("attention_confidence")
    plan = claim.experiment.at("quick")
    task = TranslatedSentences(corpus="made", vocab=320, dim=32, layers=2, batch=16, steps=40, samples=6)
    table = rows(task, context(*plan.arms))
    for arm in plan.arms:
        assert len(values(table, "hybrid_quality", arm.name)) == 6
        if arm.name != "later system":
            assert len(values(table, "goes_with_quality", arm.name)) == 6
    best, later = values(table, "chrf"), values(table, "hybrid_quality", "later system")
    assert_close(best, later, FORMULA)


def test_chance_is_drawn_for_each_system():
    arm, run = Arm("chance", options={"score": "chance"}), context(Arm("full"))
    first, second = (score_of(run, arm, 0, [5] * 200, list, dict, system) for system in (0, 1))
    assert 70 < (second > first).sum() < 130 and (first == score_of(run, arm, 0, [5] * 200, list, dict)).all()


def test_quality():
    same = "two dogs play in the snow"
    assert character_f([same, "QZ"], [same, same]) == pytest.approx([100, 0], abs=1e-3)
    assert spoken_digits.words_of("1, 2 Three.") == ["one", "two", "three"] and spoken_digits.words_of("68") == [
        "six", "eight",
    ]  # fmt: skip


def test_without_the_model_nothing_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("MANYHEADS_MODELS", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = context(Arm("chance"))
    assert "no-such-model" in spoken_digits.SpokenDigits(model=str(tmp_path / "no-such-model")).unsupported_reason(run)
