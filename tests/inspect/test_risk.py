# SPDX-License-Identifier: Apache-2.0
"""Answers are looked at as one forward says; a report's figures are those of its parts; its page and JSON."""

import json

import numpy as np
import pytest
import torch

from manyheads.data.known_answers import Question
from manyheads.errors import UserError
from manyheads.experiment.risk_bounds import clopper_pearson
from manyheads.inspect import risk
from manyheads.inspect.answers import _cut, _prompt, read_answers
from manyheads.inspect.detectors import judged
from manyheads.inspect.risk import built_in_questions, read_questions, risk_report
from manyheads.models import load_default
from manyheads.report import risk as shown_by
from manyheads.report.page import render
from tiny.answers import drawn
from tolerance import nearly


@pytest.fixture(scope="module")
def lm():
    return load_default()


@pytest.fixture
def report(lm, monkeypatch):
    answers = drawn(330, told=2.0, by_heads=2.0)
    monkeypatch.setattr(risk, "read_answers", lambda *args, **more: answers)
    return risk_report(*lm, [a.question for a in answers], risk=0.35, origin="drawn")


def test_answers_are_those_of_one_forward(lm):
    model, tokenizer = lm
    asked = [
        Question("def add(a, b):\n    return a", ("b",), "add(a, b)", opening="+", words=1),
        Question("import os", ("path",)),
    ]
    found = read_answers(model, tokenizer, asked, lambda question, text: question is asked[1], tokens=5)
    assert [a.right for a in found] == [False, True] and [a.question for a in found] == asked
    for answer in found:
        ids, (start, stop) = _prompt(tokenizer, answer.question)
        text = tokenizer.decode(ids[start:stop])
        assert (answer.question.source or answer.question.text) in text and len(text) < len(tokenizer.decode(ids))
        said = tokenizer.encode(answer.text, add_special_tokens=False)
        if tokenizer.decode(said) != answer.text or len(said) != len(answer.tokens):
            said = [tokenizer.encode(t, add_special_tokens=False)[0] for t in answer.tokens]
        with torch.no_grad():
            logs = model(torch.tensor([ids + said])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        assert answer.entropy.tolist() == pytest.approx(torch.special.entr(logs.exp()).sum(-1).tolist(), abs=1e-3)
        assert answer.logprob.tolist() == pytest.approx(logs[range(len(said)), said].tolist(), abs=1e-3)
        assert logs.argmax(-1).tolist() == said and answer.lookback[0] == 1 and (answer.mass > 0).all()
        assert answer.confidence == pytest.approx(float(np.exp(answer.logprob.sum())))
        assert answer.heads[0].mean() == pytest.approx(answer.mass.mean(), rel=1e-4)


def test_an_answer_is_cut_behind_its_words(lm):
    _, tokenizer = lm
    ids = tokenizer.encode(" os path\nimport", add_special_tokens=False)
    assert tokenizer.decode(_cut(tokenizer, ids, 1)).strip() == "os" and _cut(tokenizer, ids, 0) == ids
    assert (
        tokenizer.decode(_cut(tokenizer, ids, 2)).split() == ["os", "path"] and _cut(tokenizer, ids[:1], 1) == ids[:1]
    )


def test_a_report_is_what_its_parts_say(report):
    found = judged(report.answers)
    wrong, n = int(found.wrong.sum()), len(found.wrong)
    assert report.kinds["all"].value == nearly(wrong / n) and set(report.kinds) == {"all", "sums", "facts"}
    assert report.bounds["Clopper-Pearson"] == clopper_pearson(wrong, n, 0.1)[1]
    assert wrong / n < report.bounds["PAC-Bayes, kl"] < report.bounds["PAC-Bayes, McAllester"] < 1
    assert report.auroc["both"].low > 0.7 > report.auroc["lookback"].low
    assert report.area("both") < report.area("lookback") and report.curves["both"][1][-1] == nearly(wrong / n)
    chosen = report.chosen
    assert chosen.detector == "both" and chosen.answered > 0.2 and chosen.wrong.value <= 0.35
    fresh = drawn(200, told=2.0, by_heads=2.0, seed=9)
    back = chosen.holds_back(fresh)
    right = np.array([a.right for a in fresh])
    assert (~right[~back]).mean() < 0.35 < (~right).mean() and 0.1 < back.mean() < 0.9
    assert (report.thresholds["entropy"].holds_back(fresh) != back).any()


def test_page_and_json(report):
    text = json.dumps(report.document(), allow_nan=False)
    assert json.loads(text)["detectors"]["both"]["answered"] == report.chosen.answered and len(text) < 900_000
    html = render(shown_by.page(report))
    for word in ("Clopper-Pearson", "lookback", "share of questions answered", "are to be held back", "surest first"):
        assert word in html


def test_an_adapter_has_no_bound_of_an_unseen_model(lm, monkeypatch):
    monkeypatch.setattr(risk, "read_answers", lambda *args, **more: drawn(60))
    plain, adapted = (risk_report(*lm, [None] * 60, kl=kl, detector="entropy") for kl in (0.0, 8.0))
    assert "Hoeffding" in plain.bounds and set(adapted.bounds) == {"PAC-Bayes, kl", "PAC-Bayes, McAllester"}
    assert adapted.bounds["PAC-Bayes, kl"] > plain.bounds["PAC-Bayes, kl"]
    assert plain.chosen.wrong is None and "nothing is to be answered" in render(shown_by.page(plain))


def test_what_cannot_be_reported_is_refused(lm, monkeypatch):
    for more, word in (({"detector": "oracle"}, "there are entropy"), ({"risk": 1.0}, "between 0 and 1")):
        with pytest.raises(UserError, match=word):
            risk_report(*lm, [], **more)
    with pytest.raises(UserError, match="0 of 0 answers"):
        risk_report(*lm, [])
    monkeypatch.setattr(risk, "read_answers", lambda *args, **more: drawn(40, wrong=0.05))
    with pytest.raises(UserError, match="--questions"):
        risk_report(*lm, [None] * 40)


def test_questions_from_a_file(tmp_path):
    place = tmp_path / "q.json"
    rows = [{"question": "Ann has 3 cats. How many?", "answers": ["3", "three"], "source": "Ann has 3 cats."}]
    place.write_text(json.dumps(rows))
    (found,) = read_questions(place)
    assert found.answers == ("3", "three") and found.source == "Ann has 3 cats." and found.kind == "questions"
    for wrong, word in (
        ([{"question": "Why?"}], "write questions"), ([{**rows[0], "source": "dogs"}], "is not"), ({}, "write"),
        ([{**rows[0], "anwser": "3"}], "write questions"), (["Why?"], "write questions"),
    ):  # fmt: skip
        place.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=word):
            read_questions(place)
    with pytest.raises(UserError, match="no such file"):
        read_questions(tmp_path / "none.json")
    place.write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read_questions(place)
    assert {q.kind for q in built_in_questions(6)} == {"arithmetic", "facts"}
