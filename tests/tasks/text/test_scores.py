# SPDX-License-Identifier: Apache-2.0
"""Scores of replies, each found again by another route, and a wrong score that the examples tell apart."""

import itertools
import random
import re
import string

import numpy as np
import pytest

from manyheads.tasks.text import _longbench as longbench
from manyheads.tasks.text._scores import any_found, found, in_order, names_only, overlap, words
from manyheads.tasks.text.chat import _rules
from manyheads.tasks.text.ruler.fwe import counts
from tolerance import nearly

ANSWERS = ["1234567", "7654321", "Lisbon", "UVW"]
REPLIES = [
    "It is 1234567.", "1234567, 7654321; lisbon and uvw", "none", "", "12345 67", "LISBON UVW", "7654321" * 3,
]  # fmt: skip


def stands(part, whole):
    """Whether letters of ``part`` stand in ``whole``, letter by letter."""
    part, whole = part.casefold(), whole.casefold()
    return any(
        all(whole[i + j] == letter for j, letter in enumerate(part)) for i in range(len(whole) - len(part) + 1)
    )  # fmt: skip


@pytest.mark.parametrize("reply", REPLIES)
def test_all_answers_are_expected(reply):
    right = sum(1 for answer in ANSWERS if stands(answer, reply)) / len(ANSWERS)
    assert found(ANSWERS, reply) == right
    assert any_found(ANSWERS, reply) == (right > 0)


def test_one_of_several_answers_is_not_all_of_them():
    """Taking any answer for all is the mistake that the first reply tells."""
    assert found(ANSWERS, REPLIES[0]) == 0.25 != any_found(ANSWERS, REPLIES[0])


def test_a_reply_that_lists_all_values_is_no_answer():
    cities = ["Oslo", "Vienna", "Prague"]
    assert names_only("Oslo", cities[1:], "She was born in Oslo.") == 1
    assert names_only("Oslo", cities[1:], "Oslo, Vienna or Prague") == 0 == names_only("Oslo", cities[1:], "Vienna")
    assert names_only("Oslo", cities[1:], "Osloer") == 0 == names_only("Oslo", cities[1:], "")
    assert found(["Oslo"], "Oslo, Vienna or Prague") == 1  # what the stricter score is for


def longest(one, two):
    """The longest common subsequence by trying all of them."""
    for size in range(len(one), 0, -1):
        for part in itertools.combinations(one, size):
            rest = iter(two)
            if all(word in rest for word in part):
                return size
    return 0


def test_overlap_is_the_longest_common_subsequence():
    draw = random.Random(0)
    for _ in range(60):
        one, two = ([draw.choice("abcd") for _ in range(draw.randint(1, 8))] for _ in range(2))
        assert in_order(one, two) == longest(one, two)
        assert overlap(" ".join(one), " ".join(two)) == longest(one, two) / len(two)
    assert overlap("You are, the ASSISTANT of a bank.", "you are the assistant") == 1
    turned = "assistant the are you"
    assert overlap(turned, "you are the assistant") == 0.25
    bag = sum(word in words(turned) for word in "you are the assistant".split()) / 4
    assert bag == 1  # words in any order would be another figure


GOOD = {
    "lower": "all is small, 3 times.", "upper": "ALL IS LARGE.", "contains": "I saw {word}s and a {word}.",
    "begins": "{word}: that is it.", "ends": "And so ends the {word}.", "bullets": "* one\n* two",
    "title": "<<A b>>\nx", "quotes": '"It is so."', "no comma": "It is so and not other.",
}  # fmt: skip
BAD = {
    "lower": ["Not small", "123", ""], "upper": ["NOT large", "123"], "contains": ["{word}s", "nothing"],
    "begins": ["A {word}", ""], "ends": ["{word} is not last", "{word}s"],
    "bullets": ["* one", "* one\n- two", "* one\n* two\nthree"],
    "title": ["<<>>", "<A b>", "<< A"], "quotes": ['"It is', 'It is"', '"'], "no comma": ["It is, or not", ""],
}  # fmt: skip


@pytest.mark.parametrize("kind", _rules.KINDS)
def test_a_rule_is_kept_or_not(kind):
    rule, seed = None, 0
    while rule is None or rule.kind != kind or (kind == "bullets" and "exactly 2" not in rule.text):
        (rule,) = _rules.draw(np.random.default_rng(seed), 1)
        seed += 1
    word = (re.findall(r'"(\w+)"', rule.text) or [""])[0]
    assert rule.kept(GOOD[kind].format(word=word)), rule.text
    assert not any(rule.kept(reply.format(word=word)) for reply in BAD[kind]), rule.text


def test_rules_of_a_reply_can_be_kept_together():
    for seed in range(200):
        kinds = {rule.kind for rule in _rules.draw(np.random.default_rng(seed), 2)}
        assert len(kinds) == 2 and not {"lower", "upper"} <= kinds and len(kinds & {"begins", "bullets", "quotes"}) < 2


def f1(reply, answer):
    """By pairing words off one by one."""
    plain = [text.lower().translate(str.maketrans("", "", string.punctuation)).split() for text in (reply, answer)]
    bare = [[word for word in text if word not in ("a", "an", "the")] for text in plain]
    left, same = list(bare[1]), 0
    for word in bare[0]:
        if word in left:
            left.remove(word)
            same += 1
    if not same:
        return 0.0
    precision, recall = same / len(bare[0]), same / len(bare[1])
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize(
    ("reply", "answer"),
    [("the red, red house", "a red house"), ("", "x"), ("No.", "no"), ("one two two", "two two two one three")],
)
def test_token_f1(reply, answer):
    assert longbench.token_f1(reply, answer) == nearly(f1(reply, answer))
    assert longbench.token_f1("red red red red", "red house") < 0.5  # a word counts as often as both have it


def test_other_scores_of_longbench():
    classes = ["Number of pages", "Number", "Date"]
    assert longbench.classification("Number of pages", "Number of pages", classes) == 1
    assert longbench.classification("a Date or Number", "Date", classes) == 0.5
    assert longbench.classification("Date", "Number", classes) == 0
    assert longbench.count("7 or 8 or 7", "7") == nearly(2 / 3) and longbench.count("none", "7") == 0
    assert (
        longbench.retrieval("Paragraph 12", "Paragraph 12") == 1 == 2 * longbench.retrieval("12 or 1", "Paragraph 12")
    )
    assert longbench.retrieval("Paragraph 1", "Paragraph 12") == 0
    assert longbench.code_similarity("# note\n  return x\n", "  return x") == 1
    assert 0 < longbench.code_similarity("return y", "return x") < 1


def test_rouge_l_is_that_of_the_subsequence():
    pytest.importorskip("rouge_score", reason="needs the extra [longbench]")
    one, two = "the cat sat on the mat", "a cat lay on the big mat"
    same = longest(one.split(), two.split())
    precision, recall = same / len(one.split()), same / len(two.split())
    assert longbench.rouge_l(one, two) == nearly(2 * precision * recall / (precision + recall))


def test_frequent_words_differ_in_number():
    for size in range(100, 400):
        dots, *words_ = counts(size)
        assert dots > words_[0] > words_[1] > words_[2] > words_[3] >= 1
