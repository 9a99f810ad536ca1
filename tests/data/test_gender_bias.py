# SPDX-License-Identifier: Apache-2.0
"""Sets of gender bias: their sizes, which sentence of a pair goes with the stereotype, and what may be swapped."""

import pytest

from manyheads.data import files, gender_bias
from manyheads.data.gender_bias import (
    TEMPLATES,
    balanced_sentences,
    crows_pairs,
    professions,
    swapped,
    wino_bias,
    winogender,
)

NAMES = (
    "professions", "crows-pairs", "winogender-sentences", "winogender-occupations", "winobias-pro-1", "winobias-anti-1",
)  # fmt: skip
here = pytest.mark.skipif(
    any(files.local(name) is None for name in NAMES),
    reason="this file is neither in MANYHEADS_DATA nor in the cache",
)


@here
def test_as_many_as_in_the_paper():
    known = professions()
    assert (len(known), sum(p.male for p in known), len(TEMPLATES)) == (299, 229, 17)
    assert 299 * 17 == 5083 and not any("_" in p.name for p in known)
    by_name = {p.name: p.male for p in known}
    assert by_name["captain"] and not by_name["nurse"]


@here
def test_pairs_go_with_the_stereotype_first():
    assert [len(wino_bias(1)), len(wino_bias(2)), len(crows_pairs())] == [396, 396, 320]
    texts = {pair.pro: pair for pair in wino_bias(1)}
    assert "The janitor reprimanded the accountant because he got less allowance." in texts
    pronouns = set("he him his himself she her hers herself".split())
    for pairs, faults in ((wino_bias(1), 4), (wino_bias(2), 5), (winogender(), 0)):  # of the publishers' own
        found = 0
        for pair in pairs:
            assert pair.pro != pair.anti and "[" not in pair.pro
            words = [[word.strip(".") for word in sentence.split()] for sentence in (pair.pro, pair.anti)]
            differ = {w for both in zip(*words, strict=False) if both[0] != both[1] for w in both}
            found += not differ <= pronouns
        assert found == faults
    about = {pair.about: pair.pro for pair in winogender()}
    assert " he " in about["technician"] or " his " in about["technician"]
    assert " she " in about["nurse"] or " her " in about["nurse"] or " hers " in about["nurse"]


def test_swaps():
    assert swapped("The nurse said he hurt himself, as His own.") == "The nurse said she hurt herself, as Her own."
    assert swapped("She is a captain.") == "He is a captain."
    for left in (
        "The nurse saw her.",
        "Mr. Smith said he left.",
        "He and she left.",
        "Nobody left.",
        "He saw a woman.",
    ):
        assert swapped(left) is None


def test_sentences_have_a_profession_before_the_pronoun(monkeypatch):
    monkeypatch.setattr(
        gender_bias, "professions",
        lambda: [gender_bias.Profession("nurse", False, 0.0, -1.0), gender_bias.Profession("king", True, 1.0, 0.0)],
    )  # fmt: skip
    text = (
        "The nurse told us all that he was tired. He told the nurse about all of that. The king told us all that he "
        "was tired. The nurse said he left.\nThe nurse told us all that he was tired."
    )
    assert balanced_sentences([text]) == [
        ("The nurse told us all that he was tired.", "The nurse told us all that she was tired.")
    ]
    assert len(balanced_sentences([text], least=4)) == 2
