# SPDX-License-Identifier: Apache-2.0
"""Bigram-Backcopy: every rule of the task holds of what is drawn."""

import pytest
import torch

from manyheads.data import files
from manyheads.data.bigram_backcopy import BigramBackcopy
from manyheads.errors import UserError
from tolerance import DRAWN, WRONG, is_close, share_error

TEXT = "the cat sat on the mat and the rat ate the hat that the cat had " * 3


def drawn(task, batch=64, length=200, seed=0):
    return task.draw(batch, length, torch.Generator().manual_seed(seed))


def tasks():
    made = [BigramBackcopy.of_text(TEXT), BigramBackcopy.of_text(TEXT[::-1].upper(), triggers=4, letters=10)]
    if files.local("tinyshakespeare"):
        made.append(BigramBackcopy.of_text(files.text("tinyshakespeare"), triggers=5))
    return made


@pytest.mark.parametrize("task", tasks(), ids=lambda task: str(task.bos))
def test_the_rules(task):
    ids = drawn(task)
    assert bool((ids[:, 0] == task.bos).all()) and int(ids[:, 1:].max()) < task.bos and int(ids.min()) >= 0
    trigger = torch.isin(ids, task.triggers)
    assert not trigger[:, 1].any()
    after = trigger[:, 2:-1]
    assert after.sum() > 100
    assert torch.equal(ids[:, 3:][after], ids[:, 1:-2][after])  # every trigger is followed by what came before it
    assert not (trigger[:, 1:-1] & trigger[:, 2:]).any()  # so what is copied is no trigger
    assert torch.equal(task.copies(ids), trigger[:, :-1])
    assert torch.equal(drawn(task), ids) and not torch.equal(drawn(task, seed=1), ids)
    likely = task.log_probability(ids)
    assert bool(likely.isfinite().all()) and bool((likely[task.copies(ids)] == 0).all())
    backwards = torch.cat([ids[:, :1], ids[:, 1:].flip(1)], 1)
    assert float(task.log_probability(backwards).mean()) < float(likely.mean()) - 0.2


def test_letters_follow_the_pairs_of_the_text():
    task = BigramBackcopy.of_text(TEXT)
    letters = sorted(set(TEXT))
    assert {letters[i] for i in task.triggers.tolist()} == {" ", "t", "a"}
    assert task.transition[letters.index("c"), letters.index("a")] == 1  # "c" occurs in "cat" alone
    assert is_close(task.transition.sum(1), torch.ones(task.bos).double())
    ids = drawn(task, batch=1000)
    free = ~torch.isin(ids[:, 1:-1], task.triggers)
    a, b = ids[:, 1:-1][free], ids[:, 2:][free]
    counted = torch.bincount(a * task.bos + b, minlength=task.bos**2).reshape(task.bos, -1).double()
    often = counted.sum(1) > 2000
    assert int(often.sum()) >= 3
    for pairs, p in zip(counted[often], task.transition[often], strict=True):
        assert share_error(pairs, p) < DRAWN
        assert share_error(pairs, task.start) > WRONG  # the control: the letters alone are another distribution


def test_first_letters_are_those_of_the_text_without_the_triggers():
    task = BigramBackcopy.of_text(TEXT)
    first = torch.bincount(drawn(task, batch=2000, length=2)[:, 1], minlength=task.bos)
    letters = sorted(set(TEXT))
    counted = torch.tensor([0 if letter in " ta" else TEXT.count(letter) for letter in letters]).double()
    assert share_error(first, counted / counted.sum()) < DRAWN
    for wrong in ((counted > 0).double(), torch.tensor([TEXT.count(letter) for letter in letters]).double()):
        assert share_error(first, wrong / wrong.sum()) > WRONG  # each letter alike; triggers among them


def test_few_letters_and_rare_ones():
    small = BigramBackcopy.of_text(TEXT, triggers=1, letters=5)
    assert small.vocab == 6 and small.triggers.shape == (1,)
    alone = BigramBackcopy.of_text("abcabcz", triggers=1)  # nothing ever follows z
    assert is_close(alone.transition[-1], torch.tensor([2, 2, 2, 1]).double() / 7)
    with pytest.raises(UserError, match="3 triggers need at least 4 letters"):
        BigramBackcopy.of_text("abab")
