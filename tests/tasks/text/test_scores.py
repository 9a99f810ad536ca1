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
    "case": {"small": "all is small, 3 times.", "capital": "ALL IS LARGE."}, "contains": "I saw {word}s and a {word}.",
    "begins": "{word}: that is it.", "ends": "And so ends the {word}.",
    "bullets": {'"* "': "* one\n* two", '"- "': "- one\n- two"},
    "title": {"angle": "<<A b>>\nx", "square": "[[A b]]\nx"},
    "enclosed": {"quotation": '"It is so."', "square": "[It is so.]", "round": "(It is so.)"},
    "without": {"comma": "It is so; and not other.", "semicolon": "It is so, and not other."},
}  # fmt: skip
BAD = {
    "case": ["Not small", "123", ""], "contains": ["{word}s", "nothing"], "begins": ["A {word}", ""],
    "ends": ["{word} is not last", "{word}s"], "bullets": ["* one", "* one\n- two", "* one\n* two\nthree", "- one"],
    "title": ["<<>>", "<A b>", "<< A", "[[]]", "[A b]"], "enclosed": ['"It is', 'It is"', '"', "[It is)", "It is."],
    "without": ["It is; or, not", ""],
}  # fmt: skip


def rules(kind):
    """Rules of a kind, as they are drawn; of lists those of two lines."""
    drawn = [_rules.draw(np.random.default_rng(seed), 1)[0] for seed in range(150)]
    return [rule for rule in drawn if rule.kind == kind and (kind != "bullets" or "exactly 2" in rule.text)]


@pytest.mark.parametrize("kind", _rules.KINDS)
def test_a_rule_is_kept_or_not(kind):
    found = {rule.text: rule for rule in rules(kind)}
    assert len(found) > 1
    for text, rule in found.items():
        word = (re.findall(r'"(\w+)"', text) or [""])[0]
        good = GOOD[kind]
        if isinstance(good, dict):
            mine = [reply for name, reply in good.items() if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
            assert len(mine) == 1, text
            assert not any(rule.kept(reply) for reply in good.values() if reply not in mine), text
        else:
            mine = [good.format(word=word)]
        assert rule.kept(mine[0]), text
        assert not any(rule.kept(reply.format(word=word)) for reply in BAD[kind]), text


def test_of_two_replies_one_keeps_the_rule():
    """And the other keeps its twin, of the same length or nearly: which is right depends on the rule alone."""
    seen = set()
    for seed in range(150):
        for rule in _rules.draw(np.random.default_rng(seed), 2):
            kept, twin = rule.replies
            assert rule.kept(kept) and not rule.kept(twin), rule
            assert abs(len(kept) - len(twin)) <= 8 and kept.count("\n") == twin.count("\n")
            seen.add(rule.replies)
    assert sum((twin, kept) in seen for kept, twin in seen) > 20  # the pair the other way round


def test_rules_of_a_reply_can_be_kept_together():
    unasked = []
    for seed in range(400):
        kinds = [rule.kind for rule in _rules.draw(np.random.default_rng(seed), 2)]
        assert len(set(kinds)) == 2 and len({*kinds} & {"begins", "bullets", "enclosed"}) < 2
        unasked += [kind == "without" for kind in kinds]
    assert np.mean(unasked) < 0.2  # what is kept without being asked for: the floor of both tasks


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


def subsequence(one, two):
    """Words of a longest common subsequence, by trying all of them."""
    for size in range(len(one), 0, -1):
        for part in itertools.combinations(one, size):
            rest = iter(two)
            if all(word in rest for word in part):
                return set(part)
    return set()


def test_rouge_l_is_of_the_sets_of_words_of_sentences():
    """As the benchmark's library has it; one sequence of all words would find less where sentences change places."""
    pytest.importorskip("rouge", reason="needs the extra [longbench]")
    reply, answer = "the cat sat on the mat. a dog ran", "one dog ran off. the old cat sat on a rug"
    texts = [[part.split() for part in text.split(".")] for text in (reply, answer)]
    words_ = [{word for part in text for word in part} for text in texts]
    same = set().union(*(subsequence(one, two) for one in texts[0] for two in texts[1]))
    precision, recall = (len(same) / len(each) for each in words_)
    want = 2 * precision * recall / (precision + recall)
    assert longbench.rouge_l(reply, answer) == nearly(want)
    plain = longest(*([word for part in text for word in part] for text in texts))
    assert 2 * plain / (9 + 11) < 0.8 * want
    assert longbench.rouge_l("", answer) == longbench.rouge_l("...", answer) == 0


def test_code_similarity_counts_matching_letters():
    """By pairing letters of the longest common runs off, in whole hundredths; lines that are no code do not count."""

    def matching(one, two):
        runs = [
            (size, i, j) for i in range(len(one)) for j in range(len(two))
            for size in range(1, min(len(one) - i, len(two) - j) + 1) if one[i : i + size] == two[j : j + size]
        ]  # fmt: skip
        if not runs:
            return 0
        size, i, j = max(runs, key=lambda run: (run[0], -run[1], -run[2]))
        return size + matching(one[:i], two[:j]) + matching(one[i + size :], two[j + size :])

    for reply, answer in (
        ("return xy", "return yx + 1"),
        ("a = b", "if c:"),
        ("x", ""),
        ("for i in y:", "for j in y:"),
    ):
        ratio = 2 * matching(reply, answer) / (len(reply) + len(answer))
        for written in (reply, f"\n\n{reply}\nmore", f"# a note\n```\n{reply}"):
            assert longbench.code_similarity(written, answer) == pytest.approx(ratio, abs=0.0051)
            assert (100 * longbench.code_similarity(written, answer)) % 1 == pytest.approx(0, abs=1e-6)


def test_frequent_words_differ_in_number():
    for size in range(100, 400):
        dots, *words_ = counts(size)
        assert dots > words_[0] > words_[1] > words_[2] > words_[3] >= 1
