# SPDX-License-Identifier: Apache-2.0
"""Scores in worked answers: peaks are those of the response, replies are greedy, a forced token changes the rest."""

import numpy as np
import pytest
import torch

from manyheads.data.word_problems import _plain, word_problems
from manyheads.experiment import Arm, CausalLM
from manyheads.tasks.lenses import worked_answers
from manyheads.tasks.lenses._chat import greedy, rendered
from manyheads.tasks.lenses.worked_answers import WorkedAnswers, _places, _words
from oracles.tasks import context, rows, values

ARMS = Arm("blind"), *(Arm(name, options={"score": name}) for name in ("waad", "fai", "entropy"))
TASK = WorkedAnswers(problems=3, tokens=48, source="sums")


@pytest.fixture(scope="module")
def lm():
    subject = CausalLM("default")
    subject.load("cpu")
    return subject


@pytest.mark.slow
def test_rows_of_both_answers(lm):
    found = rows(TASK, context(*ARMS, subject=lm))
    for kind in ("own", "given"):
        assert (values(found, "follows_waad", "waad", answer=kind) == 1).all()
        most, blind = (values(found, "peak_entropy", arm, answer=kind) for arm in ("entropy", "blind"))
        assert len(blind) == 3 and (most > blind).all()
    assert (values(found, "follows_waad", "blind") < 1).any()
    assert {row.arm for row in found if row.metric == "same_words"} == {"fai"}
    assert len(values(found, "same_words", forced="beside")) == len(values(found, "same_words", forced="greatest FAI"))


def test_peaks_are_of_the_response_alone(lm, monkeypatch):
    known = worked_answers.scores

    def scored(run, model, ids, first, number):
        found, logits = known(run, model, ids, first, number)
        for name in ("waad", "fai"):  # greatest in the prompt, where no peak may be
            found[0][name] = np.where(np.isfinite(found[0]["fai"]), -np.arange(ids.shape[1], dtype=float), np.nan)
        found[0]["entropy"] = (np.arange(ids.shape[1]) >= first).astype(float)
        return found, logits

    monkeypatch.setattr(worked_answers, "scores", scored)
    found = rows(TASK, context(*ARMS, subject=lm))
    assert (values(found, "peak_entropy", "waad") == 1).all() and (values(found, "peak_entropy", "fai") == 1).all()


def test_places_are_near_each_other_and_early():
    fai = np.full(100, 0.5)
    fai[40], fai[44], fai[10], fai[20], fai[90] = 0.9, 0.1, 0.0, 1.0, 2.0
    assert _places(fai, 30, 60) == {"greatest FAI": 40, "beside": 44}  # 20 is the prompt's, 90 too late, 10 too far
    assert _places(np.full(100, np.nan), 30, 60) == {}


def test_words_are_numbers_and_long_words():
    assert _words("He has 12 apples, of 3.") == {"has", "12", "apples", "3"}


def test_greedy_is_that_of_single_prompts(lm):
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(100, 400, (n,), generator=generator).tolist() for n in (5, 9)]
    together = greedy(lm.model, lm.tokenizer, prompts, 6)
    assert together == [greedy(lm.model, lm.tokenizer, [prompt], 6)[0] for prompt in prompts]
    with torch.no_grad():
        assert together[1][0] == int(lm.model(torch.tensor([prompts[1]])).logits[0, -1].argmax())


def test_a_base_model_reads_plain_lines(lm):
    text = rendered(lm.tokenizer, [{"role": "user", "content": "Add 2 and 3."}])
    assert text.endswith("user: Add 2 and 3.\nassistant:")


def test_problems():
    assert _plain("So 2*3=<<2*3=6>>6.\n#### 6") == "So 2*3=6.\nThe answer is 6."
    question, answer = word_problems("sums")[5]
    assert "apples" in question and answer.endswith(".") and len(word_problems("sums")) == 40
