# SPDX-License-Identifier: Apache-2.0
"""Shares of a world where objects keep company, and texts that say what is in their pictures."""

import pytest
import torch

from manyheads.data import captions, scenes
from manyheads.data.captions import OFTEN, PAIRS, WORDS, absent, ask, caption, describe, draw_there, mentioned, texts
from manyheads.data.object_scenes import draw_pictures
from manyheads.data.scenes import OBJECTS
from manyheads.data.visual_questions import Language
from tolerance import DRAWN, WRONG, mean_error

needs_data = pytest.mark.skipif(not scenes.available(), reason="CIFAR-10 and Noto Emoji are not on this machine")
TOKEN = {word: i + 3 for i, word in enumerate(WORDS)}
WORD = {i: word for word, i in TOKEN.items()}
LANGUAGE = Language(lambda said: [TOKEN[word] for word in said.split()], start=(1,), image=2, pad=0)
PIECES = Language(lambda said: [x for w in said.split() for x in (100, TOKEN[w])], start=(1,), image=2, pad=0)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def said(tokens):
    return " ".join(WORD[int(x)] for x in tokens)


def test_pairs_keep_company_in_training_alone():
    own, apart = (draw_there(4000, generator(), together) for together in (0.9, None))
    for there, shares in ((own, (0.9, 0.1)), (apart, (0.5, 0.5))):
        for i, often in enumerate(OFTEN):
            assert mean_error(there[:, i].double(), often, (often * (1 - often)) ** 0.5) < 2 * DRAWN, i
        for first, second in PAIRS:
            for with_it, share in ((True, shares[0]), (False, shares[1])):
                drawn = there[there[:, first] == with_it, second].double()
                assert mean_error(drawn, share, (share * (1 - share)) ** 0.5) < 2 * DRAWN
                assert mean_error(drawn, 0.5 if share != 0.5 else 0.9, 0.5) > WRONG
    apple, heart = own[:, 0], own[:, 2].double()
    assert mean_error(heart[apple], float(heart[~apple].mean()), 0.5) < 2 * DRAWN


@pytest.mark.parametrize("language", [LANGUAGE, PIECES])
def test_a_caption_names_what_is_there(language):
    for there in draw_there(20, generator(1), 0.9):
        tokens = caption(language, there)
        assert mentioned(language, tokens) == there.nonzero()[:, 0].tolist()
        assert tokens[-1] == language.encode(".")[-1]
    assert said(caption(LANGUAGE, torch.zeros(8))) == "nothing ."
    both = torch.tensor([1, 0, 0, 0, 0, 0, 1, 0])
    assert said(caption(LANGUAGE, both)) == "a apple and a tree ."
    assert mentioned(LANGUAGE, [TOKEN["a"], TOKEN["ball"], TOKEN["and"], TOKEN["a"], TOKEN["ball"]]) == [7, 7]


def test_questions_are_about_what_is_absent():
    there = torch.tensor([1, 0, 1, 0, 0, 1, 0, 0]).bool()  # apple, heart, octopus
    drawn = {kind: {absent(there, kind, generator(seed)) for seed in range(60)} for kind in captions.KINDS}
    assert drawn == {"random": {1, 3, 4, 6, 7}, "popular": {6}, "adversarial": {1, 4}}
    assert absent(torch.ones(8).bool(), "random", generator()) is None
    assert absent(torch.tensor([1, 1, 0, 0, 0, 0, 0, 0]).bool(), "adversarial", generator()) is None


def test_prompts_begin_with_the_picture():
    assert describe(LANGUAGE, 2)[:5] == [1, 2, 2, 2, 2] and said(describe(LANGUAGE, 2)[5:]) == "what is there"
    assert said(ask(LANGUAGE, 2, 7)[5:]) == "is there a ball"


@needs_data
def test_pictures_show_what_they_are_told_to():
    there = draw_there(5, generator(), 0.9)
    found = draw_pictures(5, generator(), grid=3, size=4, there=there)
    assert torch.equal(found.cells >= 0, there)
    assert not torch.equal(draw_pictures(5, generator(), grid=3, size=4).cells >= 0, there)


@needs_data
def test_texts_ask_and_tell_what_their_pictures_show():
    found = texts(LANGUAGE, 6, generator(), grid=3, size=4, patches=3, together=0.9, asked=2)
    assert found.images.shape == (6, 3, 12, 12) and found.ids.shape == found.real.shape
    counted = found.answers >= 0
    after = found.ids.gather(1, (found.at + 1).clamp(max=found.ids.shape[1] - 1))
    last = counted & (torch.arange(counted.shape[1]) == 1)  # the last answer of a question text is not read
    last[:3] = False
    assert torch.equal(after[counted & ~last], found.answers[counted & ~last])
    for i in range(3):
        assert mentioned(LANGUAGE, found.answers[i][counted[i]].tolist()) == found.there[i].nonzero()[:, 0].tolist()
    for i in range(3, 6):
        for at, answer in zip(found.at[i][:2], found.answers[i][:2], strict=True):
            thing = OBJECTS.index(WORD[int(found.ids[i, at])])
            assert WORD[int(answer)] == ("yes" if found.there[i, thing] else "no")
